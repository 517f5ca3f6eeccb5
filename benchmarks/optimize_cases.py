"""Does optimize keep its word where that is hard? 20 networks, each optimized, then measured again by other means.

    python benchmarks/optimize_cases.py --output benchmarks/results/optimize_cases.json

Small vision transformers with random weights (the seed is the case), of five kinds: plain; with the outliers of
benchmarks/outliers.py, up to 100 times as large as other channels, which leave the float function alone; narrow and
shallow; on labels that are noise; and without labels. Aims turn over latency, throughput and size. Of every file that
is left, this script counts the drop by itself, from what the bundle predicts for the validation files, and times the
file against the float file once more, in turns. `ok` says that neither promise was broken: the drop is at most
max_drop, and the time at most MARGIN of float's, or the file is float's to the byte. The time of the float file against
itself says how far medians differ there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import leanvit.models  # noqa: F401 - registers its architectures
from leanvit import imaging
from leanvit.bench import describe
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import OptimizeOptions, Preprocess
from leanvit.data.sets import ImageSet
from leanvit.files import read_json, sha256, write_json
from leanvit.optimize import api
from leanvit.optimize.images import read_images
from leanvit.optimize.timing import Timer, time_files
from leanvit.runtime.bundle import MODEL_NAME
from leanvit.runtime.predictor import Predictor
from measure import facts
from outliers import add_outliers

KINDS = ("plain", "outliers", "narrow", "noise labels", "no labels")
AIMS = ("latency", "throughput", "size")
CLASSES = tuple("abcde")
SIZE = 64
MAX_DROP = 2.0
MARGIN = 1.05
"""Of float's time, in a measurement of its own; what medians of one file against itself differ by is in the result."""


def make_network(kind: str, seed: int) -> nn.Module:
    """A vision transformer at SIZE pixels."""
    torch.manual_seed(seed)
    width, depth = (16, 1) if kind == "narrow" else (96, 2)
    network = timm.create_model(
        "vit_tiny_patch16_224", img_size=SIZE, patch_size=8, embed_dim=width, depth=depth, num_heads=2,
        num_classes=len(CLASSES),
    ).eval()  # fmt: skip
    with torch.no_grad():
        network.head.weight.mul_(20.0)
        if kind == "outliers":
            add_outliers(network, scale=100.0, shift=3.0, head_scale=10.0)
    return network


def make_data(folder: Path, kind: str, seed: int, network: nn.Module) -> Path:
    """60 smooth pictures for calibration and 20 held out, in folders by what the network says, or by noise."""
    rng = np.random.default_rng(seed)
    info = describe_network()
    for split, count in (("train", 60), ("val", 40)):
        for number in range(count):
            coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            pixels = imaging.resize(coarse, Preprocess((SIZE, SIZE), interpolation="bicubic", crop_mode="squash"))
            label = "" if kind == "no labels" else said(network, pixels, info)
            if kind == "noise labels" or (label and number < len(CLASSES)):
                label = CLASSES[number % len(CLASSES)]  # every class has a picture
            path = folder / split / label / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(imaging.encode_png(pixels))
    return folder


def describe_network() -> CheckpointInfo:
    half = (0.5, 0.5, 0.5)
    return CheckpointInfo("vit_tiny_patch16_224", CLASSES, Preprocess((SIZE, SIZE), half, half))


@torch.inference_mode()
def said(network: nn.Module, pixels: imaging.Pixels, info: CheckpointInfo) -> str:
    x = torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255
    return CLASSES[int(network((x - 0.5) / 0.5).argmax())]


def correct(bundle: Path, images: ImageSet) -> int:
    """Images whose label the bundle predicts, one by one, from their files."""
    predictor = Predictor(bundle)
    found = [predictor.predict(Path(str(source)), top_k=1)[0][0] for source in images.sources]
    return sum(name == images.classes[label] for name, label in zip(found, images.labels, strict=True))


def run_case(seed: int, timer: Timer = time_files) -> dict[str, Any]:
    """Optimize one network and measure what is left. timer: of a test, which does not depend on times."""
    kind, aim = KINDS[seed % len(KINDS)], AIMS[seed % len(AIMS)]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        network = make_network(kind, seed)
        data = make_data(Path(scratch) / "data", kind, seed, network)
        options = OptimizeOptions(by=aim, max_drop=MAX_DROP)  # type: ignore[arg-type]
        output, info = Path(scratch) / "out", describe_network()
        result = api.run(network, data, output, options, info=info, timer=timer)
        val = read_images(network, info, str(data), options).val
        bundle, float_file = output / "bundle", output / "candidates" / "float"
        counts = {name: correct(path, val) for name, path in (("float", float_file), ("bundle", bundle))}
        shutil.copytree(float_file, output / "float again")
        targets = [describe(path) for path in (float_file, bundle, output / "float again")]
        same_file = sha256(bundle / MODEL_NAME) == sha256(float_file / MODEL_NAME)
        timed = timer(targets, result["batch_size"], 0)["results"]
    drop = 100 * (counts["float"] - counts["bundle"]) / len(val)
    slower = timed[1]["median_ms"] / timed[0]["median_ms"]
    return {
        "seed": seed, "kind": kind, "aim": aim, "best": result["best"], "images": len(val), "correct": counts,
        "drop": drop, "time_of_float": slower, "float_against_itself": timed[2]["median_ms"] / timed[0]["median_ms"],
        "size": result["size"],
        "lifted": {row["name"]: len(row["lifted"]) for row in result["files"] if row["state"] == "made"},
        "lost": {row["name"]: row["lost"] for row in result["files"] if row["lost"]},
        "seconds": round(time.monotonic() - started, 1),
        "same_file": same_file,
        "ok": drop <= MAX_DROP and (same_file or slower <= MARGIN),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument("--output", required=True, help="JSON file; cases that it has are not run again")
    options = parser.parse_args()
    found = read_json(options.output)["cases"] if Path(options.output).is_file() else []
    known = {case["seed"] for case in found}
    for seed in (number for number in range(options.cases) if number not in known):
        case = run_case(seed)
        found = sorted([*found, case], key=lambda one: int(one["seed"]))
        print(case, file=sys.stderr, flush=True)
        write_json(options.output, {**facts(), "max_drop": MAX_DROP, "margin": MARGIN, "cases": found})
    print(f"{sum(case['ok'] for case in found)} of {len(found)} cases hold both promises")
    return 0 if all(case["ok"] for case in found) else 1


if __name__ == "__main__":
    sys.exit(main())
