"""Reading folders of JPEGs: leanvit's loader against timm's create_loader, in turns.

    python benchmarks/data.py

Writes 3,000 JPEGs of 500 x 375 pixels (parts of scikit-learn's two photographs, turned, tinted and with the noise of a
sensor, 60 to 140 kB each) to a temporary folder and reads them at 224 pixels, as batches of 64 normalised float32
images on the CPU: for evaluation (resize to 256, centre crop) and for training (random resized crop, no other
augmentation), bicubic. timm has `--workers` worker processes; leanvit has threads, and in training worker processes as
well. Nothing is kept in memory between rounds, but the files lie in the page cache of the system. Every reader takes
its turn in every round; a ratio is the median over the rounds of what was read in the same round. CPU seconds are
those of all processes and tell what a busy machine hides. About 4 minutes on 2 cores that have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import create_dataset, create_loader

from leanvit.config import Preprocess, TrainConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.files import write_json
from leanvit.train.batches import Batches
from leanvit.train.processes import Processes
from measure import SEED, facts

RESULTS = Path(__file__).parent / "results" / "data.json"
PREPROCESS = Preprocess(input_size=(224, 224), crop_pct=0.875)
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
BATCH = 64


def write_photographs(folder: Path, count: int) -> int:
    """`count` JPEGs in two classes; returns the bytes of an average one."""
    rng = np.random.default_rng(SEED)
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    sizes = []
    for number in range(count):
        path = folder / f"class{number % 2}" / f"{number:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph = photographs[number % 2].rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC)
        width = rng.uniform(250, 440)
        left, top = rng.uniform(80, 560 - width), rng.uniform(40, 387 - 0.75 * width)
        box = (left, top, left + width, top + 0.75 * width)
        part = np.asarray(photograph.resize((500, 375), Image.Resampling.BICUBIC, box=box), np.float32)
        noisy = part * rng.uniform(0.8, 1.2, 3) + rng.normal(0, 4, part.shape)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=90)
        sizes.append(path.stat().st_size)
    return round(statistics.mean(sizes))


Read = Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]


def readers(folder: Path, workers: int) -> dict[str, dict[str, Read]]:
    """For evaluation and training: name of a reader and what gives its normalised batches of an epoch; timm first."""
    images = load_split(str(folder), "train", val_fraction=1 / 1500)
    kept = folder.parent / "kept"
    for index in range(len(images)):
        source = Path(str(images.sources[index]))
        (kept / source.parent.name).mkdir(parents=True, exist_ok=True)
        (kept / source.parent.name / source.name).hardlink_to(source)
    loader = Loader(images, PREPROCESS, BATCH, in_memory=False)

    def timm_loader(training: bool) -> Any:
        return create_loader(
            create_dataset("", str(kept)), (3, 224, 224), BATCH, is_training=training, scale=SCALE, ratio=RATIO,
            hflip=0.0, color_jitter=None, interpolation="bicubic", mean=PREPROCESS.mean, std=PREPROCESS.std,
            crop_pct=0.875, num_workers=workers, device=torch.device("cpu"),
        )  # fmt: skip

    def batches(processes: int) -> Read:
        config = TrainConfig(
            data=str(folder), batch_size=BATCH, crop_scale=SCALE, crop_ratio=RATIO, cache="none", workers=processes
        )
        read = Batches(loader, config, Processes())
        return lambda epoch: ((to_input(p.images, PREPROCESS), p.labels) for p in read.epoch(epoch))

    evaluation, training = timm_loader(False), timm_loader(True)
    return {
        "evaluation": {
            f"timm, {workers} worker processes": lambda epoch: evaluation,
            "leanvit, threads": lambda epoch: ((to_input(x, PREPROCESS), y) for x, y in loader),
        },
        "training": {
            f"timm, {workers} worker processes": lambda epoch: training,
            "leanvit, threads": batches(0),
            f"leanvit, {workers} worker processes": batches(workers),
        },
    }


def cpu_seconds() -> float:
    """Processor time of this process and of all its children, those that still run included."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = 0
    for listing in Path("/proc/self/task").glob("*/children"):
        for child in listing.read_text(encoding="ascii").split():
            fields = Path(f"/proc/{child}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            living += int(fields[11]) + int(fields[12])
    return time.process_time() + ended.ru_utime + ended.ru_stime + living / os.sysconf("SC_CLK_TCK")


def read_epoch(read: Read, epoch: int) -> dict[str, float]:
    """Images and seconds of one epoch."""
    cpu, started, count = cpu_seconds(), time.perf_counter(), 0
    for images, _ in read(epoch):
        count += len(images)
    return {"images": count, "seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu}


def compare(group: dict[str, Read], rounds: int) -> list[dict[str, Any]]:
    """Let all read in turns; the first is what ratios refer to."""
    epochs: dict[str, list[dict[str, float]]] = {name: [] for name in group}
    for epoch in range(rounds + 1):
        # Who is first changes, so that a burst of another program does not always hit the same one.
        for name in list(group)[:: 1 if epoch % 2 else -1]:
            epochs[name].append(read_epoch(group[name], epoch))
    first, *_ = (found[1:] for found in epochs.values())
    rows = []
    for name, found in epochs.items():
        pairs = list(zip(found[1:], first, strict=True))
        rows.append(
            {
                "reader": name,
                "images": found[0]["images"],
                "images_per_second": round(statistics.median(a["images"] / a["seconds"] for a, _ in pairs), 1),
                "cpu_ms_per_image": round(statistics.median(1e3 * a["cpu_seconds"] / a["images"] for a, _ in pairs), 3),
                "cpu_ratio": round(statistics.median(_per_cpu(a) / _per_cpu(b) for a, b in pairs), 3),
                "speed_ratio": round(statistics.median(_pace(a) / _pace(b) for a, b in pairs), 3),
                "speed_ratio_lowest": round(min(_pace(a) / _pace(b) for a, b in pairs), 3),
                "speed_ratio_highest": round(max(_pace(a) / _pace(b) for a, b in pairs), 3),
            }
        )
    return rows


def _per_cpu(epoch: dict[str, float]) -> float:
    return epoch["images"] / epoch["cpu_seconds"]


def _pace(epoch: dict[str, float]) -> float:
    return epoch["images"] / epoch["seconds"]


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="leanvit-data-") as folder:
        size = write_photographs(Path(folder) / "images", options.images)
        results = {kind: compare(group, options.rounds) for kind, group in
                   readers(Path(folder) / "images", options.workers).items()}  # fmt: skip
    given = {"files": options.images, "bytes_per_file": size, "batch_size": BATCH, "rounds": options.rounds}
    write_json(options.output, {**given, "load_average_before": load, "results": results, **facts()})
    print(json.dumps({**given, "results": results}, indent=2))


if __name__ == "__main__":
    main()
