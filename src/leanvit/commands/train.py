"""leanvit train: fit a network to labelled images or annotated pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.TrainConfig) -> int:
    """Train, and say where the result is."""
    from leanvit.runtime.task_of import CLASSIFY

    if getattr(config, "task", CLASSIFY) != CLASSIFY:
        return _run_task(cast("configs.TaskTrainConfig", config))
    from leanvit.train import run as run_it
    from leanvit.train.processes import from_environment

    result = run_it(config)
    if not from_environment().first:
        return errors.EXIT_OK
    best = result.best
    print(f"best top-1 {best.top1:.2f}% ({best.correct} of {best.images} images) in {result.seconds:.0f} s")
    print(f"checkpoint {result.checkpoint}")
    print(f"next: leanvit quantize {config.output} --data {config.data}")
    return errors.EXIT_OK


def _run_task(config: configs.TaskTrainConfig) -> int:
    """Train, and say where the result is."""
    from leanvit.runtime.answers import METRICS
    from leanvit.train.tasks import run as run_it

    result = run_it(config)
    print(f"best {METRICS[config.task]} {result.best:.4f} in {result.cpu_seconds / 60:.1f} CPU-minutes")
    print(f"checkpoint {result.checkpoint}")
    print(f"next: leanvit quantize {config.output} --data {config.data}")
    return errors.EXIT_OK
