"""What a teacher is worth: a micro student on a fiftieth of Fashion-MNIST, with and without it.

    OMP_NUM_THREADS=1 python benchmarks/distill.py --output benchmarks/results/distill.json

The student (ViT micro by default) learns from 1,200 of the 60,000 training images for 40 epochs, by its recipe in
configs/train: from labels alone, and with the shipped weights of a teacher, which has learned from all 60,000.
Measured on the 10,000 test images after the last epoch, so that they choose nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from leanvit.config import TrainConfig, from_dict, load_yaml
from leanvit.files import write_json
from leanvit.train import run
from measure import facts

RECIPE = Path(__file__).parent.parent / "configs" / "train" / "vit_micro_distill_fmnist.yaml"
WAYS: dict[str, dict[str, Any]] = {
    "labels": {"teacher": None},
    "soft": {},
    "hard": {"distillation": "hard"},
    "soft and hints": {"hint_weight": 1.0},
}


def measure(way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train one way and count what the last epoch gets right."""
    recipe = from_dict(TrainConfig, load_yaml(RECIPE), RECIPE.name)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"model": options.student, "teacher": options.teacher, "seed": seed, "output": folder, **WAYS[way]}
        result = run(replace(recipe, **settings))
    last, images = result.history[-1], result.best.images
    return {
        "student": options.student, "teacher": options.teacher, "way": way, "seed": seed, "top1": last["val_top1"],
        "correct": round(last["val_top1"] * images / 100), "images": images, "seconds": round(result.seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Train in every way with every seed; rows are written as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="vit_micro")
    parser.add_argument("--teacher", default="vitae_micro.fmnist")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        for way in options.ways:
            rows.append(measure(way, seed, options))
            if options.output:
                write_json(options.output, {**facts(), "seed": options.seeds, "rows": rows})
    print("| way | top-1, mean | spread (standard deviation) | correct of images, by seed |")
    print("|---|---:|---:|---|")
    for way in options.ways:
        found = [row for row in rows if row["way"] == way]
        values = [row["top1"] for row in found]
        counts = ", ".join(f"{row['correct']:,} of {row['images']:,}" for row in found)
        print(f"| {way} | {mean(values):.2f} | {stdev(values) if len(values) > 1 else 0:.2f} | {counts} |")


if __name__ == "__main__":
    main()
