"""Each structure against the network without it: Fashion-MNIST, equal parameters, epochs and seeds.

    OMP_NUM_THREADS=1 python benchmarks/architectures.py --fractions 0.01 --output benchmarks/results/architectures.json
    OMP_NUM_THREADS=1 python benchmarks/architectures.py --pairs ReViT --fractions 0.1 1.0

ReViT and ReSwin differ from their twin in the residual attention alone. ExMobileViT's twin takes its classifier from
the last scale, widened to the same parameters; ViTAE's and ViTAEv2's is a ViT of the nearest width. All learn by one
recipe (below), at 1%, 10% and 100% of the labels for 40, 8 and 1 epochs, and are measured after the last one:
top-1 on the 10,000 test images; accuracy and consistency under shifts of up to 4 pixels on the first 500 of them;
token diversity in the last layer, of 256. Of a pair both train in the precision that is faster for them on a CPU.
Rows are written as they come, and those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import timm
from timm.models import register_model
from torch import nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import attention_layers, layer_tokens, token_diversity
from leanvit.checkpoint import load_checkpoint
from leanvit.config import TrainConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.errors import ModelError
from leanvit.evaluation import network_predict, shift_robustness
from leanvit.files import read_json, write_json
from leanvit.progress import note
from leanvit.train import run
from measure import facts

EPOCHS = {0.01: 40, 0.1: 8, 1.0: 1}
SHIFT, SHIFTED_IMAGES, TOKEN_IMAGES = 4, 500, 256
MOBILE = ("exmobilevit_micro", "mobilevit_micro_twin")


def parameters(model: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in model.parameters())


def _create(name: str, **options: Any) -> nn.Module:
    return timm.create_model(name, **options)


def _register(name: str, base: str, **options: Any) -> None:
    """Give an architecture with other options a name of its own, for checkpoints to find."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(base, **{**options, **kwargs})

    create.__name__, create.__module__ = name, __name__
    register_model(create)


def nearest(target: str, options: Callable[[int], dict[str, Any]], base: str, widths: range) -> dict[str, Any]:
    """Options of `base` whose parameters are nearest to those of `target`."""
    wanted = parameters(_create(target, num_classes=10))
    best = min(widths, key=lambda width: abs(parameters(_create(base, num_classes=10, **options(width))) - wanted))
    return options(best)


def register_twins() -> dict[str, tuple[str, str]]:
    """{structure: (network with it, its twin without)}; registers the twins."""
    _register("revit_micro_alone", "revit_micro", alpha="none")
    _register("reswin_micro_alone", "reswin_micro", alpha="none")
    last = nearest("exmobilevit_micro", lambda c: {"channels": (0, 0, c)}, "exmobilevit_micro", range(128, 640, 8))
    _register("mobilevit_micro_twin", "exmobilevit_micro", **last)
    for name in ("vitae_micro", "vitaev2_micro"):
        _register(
            f"vit_micro_for_{name}", "vit_micro",
            **nearest(name, lambda width: {"embed_dim": width}, "vit_micro", range(72, 120, 3)),
        )  # fmt: skip
    return {
        "ReViT": ("revit_micro", "revit_micro_alone"),
        "ReSwin": ("reswin_micro", "reswin_micro_alone"),
        "ExMobileViT": ("exmobilevit_micro", "mobilevit_micro_twin"),
        "ViTAE": ("vitae_micro", "vit_micro_for_vitae_micro"),
        "ViTAEv2": ("vitaev2_micro", "vit_micro_for_vitaev2_micro"),
    }


def recipe(model: str, fraction: float, seed: int, output: str) -> TrainConfig:
    """The one recipe."""
    return TrainConfig(
        data="fashion-mnist", model=model, output=output, train_fraction=fraction, seed=seed, epochs=EPOCHS[fraction],
        val_interval=EPOCHS[fraction], batch_size=64, lr=1.5e-3, warmup_epochs=EPOCHS[fraction] / 12,
        crop_scale=(0.85, 1.0), hflip=0.5, degrees=0.0,
        # Depthwise convolutions are slower in bf16 on a CPU, the rest is twice as fast.
        amp="none" if model in MOBILE else "auto", channels_last=model in MOBILE,
    )  # fmt: skip


def measure(pair: str, model: str, fraction: float, seed: int) -> dict[str, Any]:
    """Train one network and measure it."""
    with tempfile.TemporaryDirectory() as folder:
        result = run(recipe(model, fraction, seed, folder))
        network, info = load_checkpoint(folder)
    # The checkpoint is that of the only validation, after the last epoch.
    test = load_split("fashion-mnist", "val")
    shifted = Loader(test.subset(np.arange(SHIFTED_IMAGES)), info.preprocess, 250)
    moved = shift_robustness(network_predict(network, info.preprocess), shifted, SHIFT)[-1]
    return {
        "pair": pair, "model": model, "parameters": parameters(network), "fraction": fraction, "seed": seed,
        "epochs": EPOCHS[fraction], "shifted_images": SHIFTED_IMAGES,
        "top1": result.best.top1, "correct": result.best.correct, "images": result.best.images,
        "shifted_top1": moved.top1, "consistency": moved.consistency,
        "diversity": last_diversity(network, shifted, info.preprocess), "seconds": round(result.seconds, 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def last_diversity(network: nn.Module, loader: Loader, preprocess: Any) -> float | None:
    """Mean token diversity after the last block with attention; None where there are no tokens to compare."""
    pixels, _ = next(iter(loader))
    x = to_input(pixels[:TOKEN_IMAGES], preprocess)
    try:
        tokens = layer_tokens(network, x, attention_layers(network, x))
        return float(token_diversity(list(tokens.values())[-1]).mean())
    except ModelError as error:
        note(str(error))
        return None


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each network and share of the labels."""
    lines = [
        "| pair | network | parameters | labels | seeds | top-1, % | shifted by 4 px, % | consistency, % | diversity |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for key in dict.fromkeys((r["pair"], r["model"], r["fraction"]) for r in rows):
        found = [r for r in rows if (r["pair"], r["model"], r["fraction"]) == key]
        cells = [spread([r[name] for r in found]) for name in ("top1", "shifted_top1", "consistency")]
        diverse = [r["diversity"] for r in found if r["diversity"] is not None]
        cells.append(spread(diverse) if diverse else "")
        lines.append(
            f"| {key[0]} | {key[1]} | {found[0]['parameters']:,} | {key[2]:.0%} | {len(found)} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Train and measure what is not stored yet; print the table of everything."""
    twins = register_twins()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", default=list(twins), choices=list(twins))
    parser.add_argument("--fractions", nargs="+", type=float, default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="JSON file; rows that it has are not measured again")
    options = parser.parse_args()
    rows = read_json(options.output)["rows"] if options.output and options.output.is_file() else []
    # Rows of another recipe are no neighbours of these.
    rows = [r for r in rows if (r.get("epochs"), r.get("shifted_images")) == (EPOCHS[r["fraction"]], SHIFTED_IMAGES)]
    known = {(r["model"], r["fraction"], r["seed"]) for r in rows}
    for fraction in options.fractions:
        for seed in options.seeds:
            for pair in options.pairs:
                for model in twins[pair]:
                    if (model, fraction, seed) in known:
                        continue
                    rows.append(measure(pair, model, fraction, seed))
                    note(f"{rows[-1]}")
                    if options.output:
                        write_json(options.output, {**facts(), "seed": options.seeds, "rows": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
