"""What trained weights are worth where images are few: digits at five images a class.

    OMP_NUM_THREADS=1 python benchmarks/finetune.py --output benchmarks/results/finetune.json

Each model learns digits (scikit-learn's 8 x 8 scans) from five images of each class and is measured on the 20% held
out: from fresh weights, from Fashion-MNIST weights (`.fmnist`) with and without layer-wise decay of the rates, and as a
linear probe of them.
Each way has the learning rate of its recipe in configs/train; all have the same epochs, images and seeds, and are
judged after the last epoch, so that the held-out images choose nothing.
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
from leanvit.progress import note
from leanvit.train import run
from measure import facts

RECIPES = Path(__file__).parent.parent / "configs" / "train"
WAYS = {
    "scratch": "revit_micro_few_images_digits.yaml",
    "fine-tuned": "revit_micro_finetune_digits.yaml",
    "fine-tuned, layer decay": "revit_micro_layer_decay_digits.yaml",
    "linear probe": "revit_micro_probe_digits.yaml",
}


def configure(way: str, model: str, seed: int, output: str) -> TrainConfig:
    """The recipe of a way for another model and seed."""
    config = from_dict(TrainConfig, load_yaml(RECIPES / WAYS[way]), WAYS[way])
    name = model if way == "scratch" else f"{model}.fmnist"
    return replace(config, model=name, seed=seed, output=output)


def measure(way: str, model: str, seed: int) -> dict[str, Any]:
    """Train one way and count what the last epoch gets right."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(configure(way, model, seed, folder))
    last = result.history[-1]
    images = result.best.images
    return {
        "model": model, "way": way, "seed": seed, "top1": last["val_top1"],
        "correct": round(last["val_top1"] * images / 100), "images": images, "seconds": round(result.seconds, 1),
    }  # fmt: skip


def main() -> None:
    """Train every model in every way with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["revit_micro", "vit_micro", "vitaev2_micro"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    rows = [measure(way, model, seed) for model in options.models for seed in options.seeds for way in WAYS]
    print("| model | way | top-1, mean | spread (standard deviation) | correct of images, by seed |")
    print("|---|---|---:|---:|---|")
    for model in options.models:
        for way in WAYS:
            found = [row for row in rows if (row["model"], row["way"]) == (model, way)]
            values = [row["top1"] for row in found]
            counts = ", ".join(f"{row['correct']} of {row['images']}" for row in found)
            print(
                f"| {model} | {way} | {mean(values):.1f} | {stdev(values) if len(values) > 1 else 0:.1f} | {counts} |"
            )
    if options.output:
        write_json(options.output, {**facts(), "seed": options.seeds, "rows": rows})
        note(f"{options.output} written")


if __name__ == "__main__":
    main()
