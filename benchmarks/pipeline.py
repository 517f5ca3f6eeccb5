"""How much of a training's CPU time is the network's, and how much goes into getting its images.

    OMP_NUM_THREADS=1 python benchmarks/pipeline.py --output benchmarks/results/pipeline.json

For each model the first steps of an epoch of its shipped recipe (Fashion-MNIST in memory) are run as in training, and
the same steps again without the network: reading, augmenting and normalising only. Both in CPU seconds of the whole
process, threads that load ahead included, in turns; the share of the network is 1 - without / with, of medians.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from leanvit.config import TrainConfig, from_dict, load_yaml
from leanvit.files import write_json
from leanvit.train import Trainer
from measure import facts

RECIPES = Path(__file__).parent.parent / "configs" / "train"


def cpu_seconds(trainer: Trainer, steps: int, *, network: bool) -> float:
    """CPU seconds of the first steps of an epoch."""
    started = time.process_time()
    for part in itertools.islice(trainer.batches.epoch(0), steps):
        if network:
            trainer._learn(part, part.step)
            trainer._step_optimizer(part.step)
        else:
            trainer.learning.prepare(part, part.step)
    return time.process_time() - started


def measure(model: str, steps: int, rounds: int, extra: dict[str, Any]) -> dict[str, Any]:
    """Both, in turns."""
    recipe = from_dict(TrainConfig, load_yaml(RECIPES / f"{model}_fmnist.yaml"), model)
    with tempfile.TemporaryDirectory() as folder:
        # Fresh weights: DeiT's and ReSwin's recipes start from files that another script writes.
        trainer = Trainer(replace(recipe, output=folder, initial_checkpoint=None, train_fraction=0.2, **extra))
        trainer.running.train()
        cpu_seconds(trainer, 5, network=True)
        found = [[cpu_seconds(trainer, steps, network=on) for on in (True, False)] for _ in range(rounds)]
    with_network, without = (median(values) for values in zip(*found, strict=True))
    return {
        "model": model, "steps": steps, "images": steps * recipe.batch_size, "seconds": with_network,
        "seconds_without_network": without, "share_of_network": 1 - without / with_network, **extra,
    }  # fmt: skip


def main() -> None:
    """Measure every model with its recipe, and once with everything that augments."""
    known = sorted(path.name.removesuffix("_fmnist.yaml") for path in RECIPES.glob("*_micro_fmnist.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=known)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="JSON file")
    options = parser.parse_args()
    heavy = {"degrees": 10.0, "reprob": 0.25, "mixup": 0.8, "cutmix": 1.0}
    rows = []
    print("| model | CPU seconds | without the network | share of the network |")
    print("|---|---:|---:|---:|")
    for model, extra in [*((m, {}) for m in options.models), (options.models[0], heavy)]:
        row = measure(model, options.steps, options.rounds, extra)
        rows.append(row)
        name = f"{model}, rotated, erased and mixed" if extra else model
        print(
            f"| {name} | {row['seconds']:.2f} | {row['seconds_without_network']:.3f} | {row['share_of_network']:.1%} |",
            flush=True,
        )
    if options.output:
        write_json(options.output, {**facts(), "rows": rows})


if __name__ == "__main__":
    main()
