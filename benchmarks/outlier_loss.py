"""What a loss on outliers in training (`--outlier-weight`) does to quantization, on micro models from fresh weights.

    OMP_NUM_THREADS=1 python benchmarks/outlier_loss.py --output benchmarks/results/outlier_loss.json

Each model is trained on a quarter of Fashion-MNIST for four epochs of its recipe (configs/train), with and without the
loss, and judged after the last epoch on all 10,000 test images: float, at W8A8 with scope full, at W4A4 (mode paper,
128 training images calibrate). The peak is the largest of what LayerNorms read on the first 1,000 test images.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leanvit.config import MPTQConfig, TrainConfig, from_dict, load_yaml
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.files import write_json
from leanvit.load.api import load_classifier
from leanvit.progress import note
from leanvit.quant import quantize
from leanvit.train import run
from measure import facts, merged

RECIPES = Path(__file__).parent.parent / "configs" / "train"
SETTINGS = {
    "W8A8 full": MPTQConfig(scope="full"),
    "W4A4": MPTQConfig(weight_bits=4, activation_bits=4),
}
KEYS = ("model", "outlier_weight", "seed")


def trained(name: str, weight: float, seed: int, folder: str) -> tuple[nn.Module, Any]:
    """A model after the last epoch, and what it takes images as."""
    config = from_dict(TrainConfig, load_yaml(RECIPES / f"{name}_fmnist.yaml"), name)
    config = replace(
        config, epochs=4, warmup_epochs=0.5, train_fraction=0.25, val_interval=4, outlier_weight=weight, seed=seed,
        output=folder,
    )  # fmt: skip
    run(config)
    model, info = load_classifier(folder)  # the one that was validated: of the last epoch
    return model.eval(), info.preprocess


def images_of(split: str, preprocess: Any, chosen: Any) -> list[Tensor]:
    """Batches of one split, normalised."""
    loader = Loader(load_split("fashion-mnist", split).subset(chosen), preprocess, 250)
    return [to_input(pixels, preprocess) for pixels, _ in loader]


@torch.no_grad()
def peak(model: nn.Module, batches: list[Tensor]) -> float:
    """The largest of what LayerNorms read."""
    largest = [0.0]
    hooks = [
        module.register_forward_pre_hook(lambda _, given: largest.append(float(given[0].abs().max())))
        for module in model.modules()
        if isinstance(module, nn.LayerNorm)
    ]
    for batch in batches:
        model(batch)
    for hook in hooks:
        hook.remove()
    return max(largest)


@torch.no_grad()
def correct(module: nn.Module, batches: list[Tensor], labels: Tensor) -> int:
    """How many images a network gets right."""
    return int((torch.cat([module(batch).argmax(1) for batch in batches]) == labels).sum())


def measure(name: str, weight: float, seed: int) -> dict[str, Any]:
    """Train once, and count what the float and the quantized networks get right."""
    with tempfile.TemporaryDirectory() as folder:
        model, preprocess = trained(name, weight, seed, folder)
    test = load_split("fashion-mnist", "val")
    batches, labels = images_of("val", preprocess, np.arange(len(test))), torch.as_tensor(test.labels)
    drawn = np.random.default_rng(seed).permutation(60_000)[:128]
    calibration = torch.cat(images_of("train", preprocess, drawn))
    row = {"model": name, "outlier_weight": weight, "seed": seed, "images": len(labels)}
    row |= {"peak": round(peak(model, batches[:4]), 2), "float": correct(model, batches, labels)}
    for setting, config in SETTINGS.items():
        found = quantize(model, calibration, replace(config, seed=seed))
        row |= {setting: correct(found.module, batches, labels)}
        row |= {f"{setting} kl": found.report["calibration"]["kl_divergence"]}
    return {**row, **facts()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means and spreads over the seeds."""
    lines = ["| Model | Weight | Seeds | Peak | Float | W8A8 full | W4A4 | W4A4 KL |", "|---" * 8 + "|"]
    for name, weight in dict.fromkeys((row["model"], row["outlier_weight"]) for row in rows):
        own = [row for row in rows if (row["model"], row["outlier_weight"]) == (name, weight)]
        cells = [f"{mean(row['peak'] for row in own):.1f}"]
        for key in ("float", *SETTINGS):
            tops = [100 * row[key] / row["images"] for row in own]
            cells.append(f"{mean(tops):.2f} ± {stdev(tops) if len(tops) > 1 else 0:.2f}")
        cells.append(f"{mean(row['W4A4 kl'] for row in own):.4f}")
        lines.append(f"| {name} | {weight:g} | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train every model with every weight and seed; rows that the file has are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_micro", "swin_micro"])
    parser.add_argument("--weights", nargs="+", type=float, default=[0.0, 0.01])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file of the rows, written after every training")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.models:
            for weight in args.weights:
                rows.append(measure(name, weight, seed))
                note(str({key: rows[-1][key] for key in (*KEYS, "peak", "float", *SETTINGS)}))
                if args.output:
                    write_json(args.output, {"results": merged(args.output, rows[-1:], KEYS)})
    print(table(rows))


if __name__ == "__main__":
    main()
