"""The page of `leanvit web` in Chromium: labels of 100 JPEGs beside Predictor, golden dB, and speed beside float.

    python benchmarks/web.py

ViT-S/16 at 224 pixels with random weights, a head of 100 classes that tells pictures apart, as float and as W8A8. The
JPEGs are parts of the photographs that scikit-image carries, of odd sizes, with and without subsampling, some turned by
EXIF, some grey. Milliseconds are medians of seven rounds in turns, by the page's own button, in WebAssembly with
--browser-threads threads; where the cores have other work too, more than one were seen to be many times slower.
Needs chromium, node and npm; about 6 minutes on 2 cores that have nothing else to do.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

from leanvit import MPTQConfig, Predictor, imaging, quantize
from leanvit.checkpoint import preprocess_for
from leanvit.config import ExportOptions, Preprocess
from leanvit.data.loader import to_input
from leanvit.export.api import export
from leanvit.files import write_json
from leanvit.web.onnxruntime_web import PACKAGE
from leanvit.web.serving import open_server
from leanvit.web.site import write_site
from measure import SEED, facts

sys.path.append(str(Path(__file__).parents[1] / "tests" / "helpers"))

RESULTS = Path(__file__).parent / "results" / "web.json"
MODEL, CLASSES, CALIBRATION = "vit_small_patch16_224", 100, 32


def photographs() -> list[np.ndarray[Any, Any]]:
    """Colour photographs (height, width, 3) uint8."""
    from skimage import data

    return [np.asarray(found) for found in (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())]


def part(number: int, photos: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """A part of a photograph, of odd size."""
    rng = np.random.default_rng((SEED, number))
    photo = photos[number % len(photos)]
    height, width = (int(rng.integers(33, side)) | 1 for side in photo.shape[:2])
    top, left = (
        int(rng.integers(0, max(1, side - own))) for side, own in zip(photo.shape, (height, width), strict=False)
    )
    return photo[top : top + height, left : left + width]


def jpeg(number: int, photos: list[np.ndarray[Any, Any]]) -> bytes:
    """An encoded part, in one of the forms that cameras and programs write."""
    image = Image.fromarray(part(number, photos))
    exif = Image.Exif()
    if number % 5 == 2:
        exif[0x0112] = 6
    buffer = io.BytesIO()
    image = image.convert("L") if number % 11 == 3 else image
    image.save(buffer, "JPEG", quality=60 + number % 39, subsampling=number % 3, progressive=number % 4 == 1, exif=exif)
    return buffer.getvalue()


def network(photos: list[np.ndarray[Any, Any]]) -> tuple[nn.Module, torch.Tensor]:
    """ViT-S whose head is fitted so that 100 parts of photographs are the classes; and its calibration images."""
    torch.manual_seed(SEED)
    model = timm.create_model(MODEL, num_classes=CLASSES).eval()
    preprocess: Preprocess = preprocess_for(model)
    prepared = np.stack([imaging.resize(part(1000 + i, photos), preprocess) for i in range(CLASSES)])
    inputs = to_input(torch.from_numpy(prepared), preprocess)
    with torch.no_grad():
        features = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x in inputs.split(10)])
        centred = features - features.mean(0)
        model.head.weight.copy_(20 * centred / centred.square().sum(1, keepdim=True))
        model.head.bias.copy_(-model.head.weight @ features.mean(0))
    return model, inputs[:CALIBRATION]


@contextlib.contextmanager
def folder_for(work: Path | None) -> Iterator[Path]:
    """An empty folder for bundles and pictures, that stays where one is named."""
    if work is not None:
        work.mkdir(parents=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="leanvit-web-") as name:
        yield Path(name)


def measure(count: int, threads: int, browser_threads: int, work: Path | None = None) -> dict[str, Any]:
    """All numbers of the benchmark."""
    from chromium import drive, running

    photos = photographs()
    model, calibration = network(photos)
    labels = [f"part {i}" for i in range(CLASSES)]
    with folder_for(work) as folder:
        fp32 = export(model, folder / "fp32", labels=labels)
        quantized = quantize(model, calibration, MPTQConfig(weight_bits=8, activation_bits=8))
        w8a8 = export(quantized, folder / "w8a8", ExportOptions(profile="w8a8", min_speedup=0), labels=labels)
        paths = []
        for number in range(count):
            paths.append(folder / f"{number}.jpg")
            paths[-1].write_bytes(jpeg(number, photos))
        predictor = Predictor(w8a8, threads=threads)
        expected = {path.name: predictor.predict(path, top_k=1)[0][0] for path in paths}
        write_site(w8a8, folder / "site", float_bundle=fp32)
        with open_server(folder / "site") as server, running(server) as url:
            site = f"{url}?threads={browser_threads}"
            values = {"site": site, "photos": [str(path) for path in paths], "scenes": ["answers"], "timeout": 900_000}
            scene = drive("web_page.mjs", values, folder, timeout=3600)["answers"]
        sizes = {kind: (bundle / "model.onnx").stat().st_size for kind, bundle in (("fp32", fp32), ("w8a8", w8a8))}
    same = sum(expected[card["name"]] == card["first"] for card in scene["cards"])
    head, *rows = scene["times"]
    return {
        "model": MODEL,
        "runtime": PACKAGE,
        "browser": scene["browser"],
        "threads": scene["threads"],
        "bytes": sizes,
        "images": count,
        "same_top1": same,
        "labels_seen": len(set(expected.values())),
        "golden": scene["verdict"],
        "times": [dict(zip(head, row, strict=True)) for row in rows],
        "console": scene["said"]["console"],
        "facts": facts(),
    }


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="of Predictor, which is compared with")
    parser.add_argument("--browser-threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, help="folder in which bundles and pictures stay; it must not exist")
    args = parser.parse_args()
    found = measure(args.images, args.threads, args.browser_threads, args.work)
    write_json(args.output, found)
    print(f"{found['same_top1']} of {found['images']} as Predictor; {found['golden']}; {found['times']}")


if __name__ == "__main__":
    main()
