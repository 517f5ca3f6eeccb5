"""Train the micro models from their recipes and pack their weights into the package.

    OMP_NUM_THREADS=1 python benchmarks/train_micro.py revit_micro

trains configs/train/revit_micro_fmnist.yaml, goes on where a run was cut off, and skips a run that is finished.
Packed are the weights of the LAST epoch: the 10,000 test images choose nothing. They are rounded to fp16 and
measured again as they will be loaded; a file above 3 MB is refused.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from leanvit.checkpoint import load_checkpoint, load_weights, read_tensors, save_checkpoint, with_metrics
from leanvit.config import TrainConfig, from_dict, load_yaml
from leanvit.data import Loader, load_split
from leanvit.errors import CheckpointError
from leanvit.files import read_json
from leanvit.models._pretrained import weights_file
from leanvit.train import LAST_NAME, SUMMARY_NAME, evaluate, run

RECIPES = Path(__file__).parent.parent / "configs" / "train"
LARGEST_BYTES = 3_000_000


def finished(config: TrainConfig) -> bool:
    """Whether the run of `config` has all its epochs."""
    summary = Path(config.output) / SUMMARY_NAME
    return summary.is_file() and len(read_json(summary)["history"]) == config.epochs


def pack(config: TrainConfig, recipe: Path) -> str:
    """Write the package's file for a finished run; returns a line for the table.

    Raises CheckpointError where the file would be larger than 3 MB.
    """
    folder = Path(config.output)
    model, info = load_checkpoint(folder)
    tensors, _ = read_tensors(folder / LAST_NAME)
    weights = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    load_weights(model, weights, folder / LAST_NAME)
    # Measure what will be loaded: fp16 values in float32 arithmetic.
    loader = Loader(load_split(config.data, "val"), info.preprocess, 256)
    accuracy = evaluate(model.half().float(), loader)
    seconds = sum(row["seconds"] for row in read_json(folder / SUMMARY_NAME)["history"])
    metrics = {
        "top1": accuracy.top1,
        "correct": accuracy.correct,
        "images": accuracy.images,
        "epoch": config.epochs,
        "minutes": round(seconds / 60, 1),
        "command": f"leanvit train --config configs/train/{recipe.name}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    path = weights_file(config.model)
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, model.half(), with_metrics(replace(info, metrics={}), **metrics))
    size = path.stat().st_size
    if size > LARGEST_BYTES:
        path.unlink()
        raise CheckpointError(f"{path} would have {size} bytes, expected at most {LARGEST_BYTES}. Shrink the model.")
    parameters = sum(p.numel() for p in model.parameters())
    return (
        f"| {config.model} | {parameters:,} | {size / 1e6:.2f} MB | {accuracy.correct:,} of {accuracy.images:,} "
        f"| {seconds / 60:.1f} | `{metrics['command']}` |"
    )


def main() -> None:
    """Train and pack the models named on the command line, or all that have a recipe."""
    known = sorted(path.name.removesuffix("_fmnist.yaml") for path in RECIPES.glob("*_micro_fmnist.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=known, help="default: all with a recipe")
    arguments = parser.parse_args()
    for name in arguments.models:
        recipe = RECIPES / f"{name}_fmnist.yaml"
        config = from_dict(TrainConfig, load_yaml(recipe), str(recipe))
        if not finished(config):
            run(replace(config, resume=(Path(config.output) / LAST_NAME).is_file()))
        sys.stdout.write(pack(config, recipe) + "\n")


if __name__ == "__main__":
    main()
