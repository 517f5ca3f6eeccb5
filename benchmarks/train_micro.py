"""Train the micro models from their recipes and pack their weights into the package.

    OMP_NUM_THREADS=1 python benchmarks/train_micro.py revit_micro

trains configs/train/revit_micro_fmnist.yaml, goes on where a run was cut off, and skips a run that is finished.
Packed are the weights of the LAST epoch: the 10,000 test images choose nothing. They are rounded to fp16 and
measured again as they will be loaded; a file above 3 MB is refused.

DeiT and ReSwin start from the packed weights of their plain siblings, ViT and Swin (see STARTS): what they add, the
distillation token and the carried logits, is learned in few epochs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from leanvit.checkpoint import build, load_checkpoint, load_weights, read_tensors, save_checkpoint, with_metrics
from leanvit.config import TrainConfig, from_dict, load_yaml
from leanvit.data.loader import Loader
from leanvit.data.sets import load_split
from leanvit.errors import CheckpointError
from leanvit.files import read_json
from leanvit.models._pretrained import weights_file
from leanvit.train import LAST_NAME, SUMMARY_NAME, evaluate, run

RECIPES = Path(__file__).parent.parent / "configs" / "train"
LARGEST_BYTES = 3_000_000
STARTS: dict[str, tuple[str, dict[str, str]]] = {
    "deit_micro": ("vit_micro", {}),
    # The authors of ReSwin count a downsampling to the stage before it.
    "reswin_micro": (
        "swin_micro",
        {"layers.1.downsample": "layers.0.downsample", "layers.2.downsample": "layers.1.downsample", "head.fc": "head"},
    ),
}
"""model: (whose packed weights it starts from, prefixes of parameters that are called otherwise)"""


def command(name: str) -> str:
    """What trains a model anew."""
    plain = f"leanvit train --config configs/train/{name}_fmnist.yaml"
    return f"python benchmarks/train_micro.py {name}" if name in STARTS else plain


def finished(config: TrainConfig) -> bool:
    """Whether the run of `config` has all its epochs."""
    summary = Path(config.output) / SUMMARY_NAME
    return summary.is_file() and len(read_json(summary)["history"]) == config.epochs


def write_start(config: TrainConfig) -> None:
    """Write config.initial_checkpoint: the sibling's weights, and fresh ones for what the sibling hasn't."""
    sibling, renamed = STARTS[config.model]
    torch.manual_seed(config.seed)
    weights: dict[str, Tensor] = dict(build(config.model, 10).state_dict())
    for key, value in read_tensors(weights_file(sibling))[0].items():
        prefix = next((old for old in renamed if key.startswith(f"{old}.")), "")
        key = renamed[prefix] + key.removeprefix(prefix) if prefix else key
        if key == "pos_embed":
            # The tokens that are not of the image come first; the new one among them keeps its fresh position.
            new = weights[key].shape[1] - value.shape[1]
            value = torch.cat([value[:, :1], weights[key][:, 1 : 1 + new].to(value.dtype), value[:, 1:]], dim=1)
        weights[key] = value.to(weights[key].dtype)
    path = Path(str(config.initial_checkpoint))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in weights.items()}, path)


def pack(config: TrainConfig) -> str:
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
        "command": command(config.model),
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
            if name in STARTS:
                write_start(config)
            run(replace(config, resume=(Path(config.output) / LAST_NAME).is_file()))
        sys.stdout.write(pack(config) + "\n")


if __name__ == "__main__":
    main()
