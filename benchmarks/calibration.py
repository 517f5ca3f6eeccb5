"""How many calibration images, and which: mode `best` at W4A4 on micro models, judged on 10,000 real test images.

    OMP_NUM_THREADS=1 python benchmarks/calibration.py --output benchmarks/results/calibration.json

Training images of Fashion-MNIST are drawn by seed: 16 to 1,024 of them; 128 with as many of each class; 128 of one
class (that of the seed's number); and 128 digits, which the network was never trained on. `outliers`: with outliers put
into the network, which change no float answer (benchmarks/outliers.py).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from leanvit.config import MPTQConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.quant import quantize
from ptq import Bench, Results

COUNTS = (16, 32, 64, 128, 256, 512, 1024)
CHOSEN = 128
"""Images of every way but the numbers: the default of `leanvit quantize`."""

Draw = Callable[[Any, np.random.Generator, int], Any]


def at_random(count: int) -> Draw:
    """So many images, whatever their class."""
    return lambda images, generator, seed: generator.permutation(len(images))[:count]


def balanced(images: Any, generator: np.random.Generator, seed: int) -> Any:
    """As many images of each class, the first classes one more."""
    shuffled = generator.permutation(len(images))
    of_class = [shuffled[images.labels[shuffled] == label] for label in range(len(images.classes))]
    return np.concatenate(
        [own[: CHOSEN // len(of_class) + (i < CHOSEN % len(of_class))] for i, own in enumerate(of_class)]
    )


def one_class(images: Any, generator: np.random.Generator, seed: int) -> Any:
    """Images of one class."""
    return generator.permutation(np.flatnonzero(images.labels == seed))[:CHOSEN]


WAYS: dict[str, tuple[str, Draw]] = {
    **{str(count): ("fashion-mnist", at_random(count)) for count in COUNTS},
    "128, classes balanced": ("fashion-mnist", balanced),
    "128 of one class": ("fashion-mnist", one_class),
    "128 digits": ("digits", at_random(CHOSEN)),
}


def images_of(bench: Bench, way: str, seed: int) -> Tensor:
    """Calibration images (N, 3, H, W) of one way."""
    data, draw = WAYS[way]
    images = load_split(data, "train")
    chosen = images.subset(draw(images, np.random.default_rng(seed), seed))
    return torch.cat([to_input(pixels, bench.preprocess) for pixels, _ in Loader(chosen, bench.preprocess, 128)])


def measure(bench: Bench, way: str, seed: int, results: Results) -> None:
    """One row; one that is there is not measured again."""
    key = {"model": bench.name, "outliers": bench.args.outliers, "calibration": way, "seed": seed}
    if results.find(**key):
        return
    config = MPTQConfig(weight_bits=4, activation_bits=4, mode="best", seed=seed)
    found = quantize(bench.model, images_of(bench, way, seed), config)
    correct, test_kl = bench.judge(found.module)
    row = {**key, "correct": correct, "images": sum(len(y) for _, y in bench.batches), "test_kl": test_kl}
    row["kl"] = found.report["calibration"]["kl_divergence"]
    results.add({**row, "seconds": round(found.report["seconds"], 1)})
    print({**key, "top1": 100 * correct / row["images"], "test_kl": round(test_kl, 5)}, flush=True)


def table(results: Results) -> str:
    """Markdown: top-1 and divergence by way, means and spreads over the seeds."""
    beds = list(dict.fromkeys((row["model"], row["outliers"]) for row in results.rows if "test_kl" in row))
    names = [model + (" with outliers" if outliers else "") for model, outliers in beds]
    lines = ["| calibration images | " + " | ".join(f"{name} | KL" for name in names) + " |"]
    lines.append("|---" * (1 + 2 * len(beds)) + "|")
    for way in WAYS:
        cells = []
        for model, outliers in beds:
            own = [
                r
                for r in results.rows
                if (r["model"], r.get("outliers"), r.get("calibration")) == (model, outliers, way)
            ]
            tops, kls = ([100 * r["correct"] / r["images"] for r in own], [r["test_kl"] for r in own])
            cells += [_spread(tops, 2), _spread(kls, 4)]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}" if len(values) > 1 else ""


def main() -> None:
    """Measure every way on every bed with every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_micro"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="JSON of the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.images, args.calibration = 10_000, CHOSEN
    results = Results(args.output)
    for name in args.models:
        for args.outliers in (False, True):
            bench = Bench(name, args, results)
            for seed in args.seeds:
                for way in WAYS:
                    measure(bench, way, seed, results)
    print(table(results))


if __name__ == "__main__":
    main()
