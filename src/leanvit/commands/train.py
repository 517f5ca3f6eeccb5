"""leanvit train: fit a network to labelled images or annotated pictures."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs
    from leanvit.train import TrainResult


def run(config: configs.TrainConfig) -> int:
    """Train, and say where the result is."""
    from leanvit.runtime.task import TASKS

    if config.task not in TASKS:
        raise errors.ConfigError(
            f"task is '{config.task}'.{errors.did_you_mean(config.task, TASKS)} Expected one of: {', '.join(TASKS)}."
        )
    from leanvit.passed_over import forget
    from leanvit.train.processes import from_environment

    if not from_environment().first:
        # It writes nothing. Python's handler would wait for the first process, which may have ended, until torchrun
        # kills this one half a minute later.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    result = _train(config)
    if from_environment().world > 1:
        forget()  # torchrun takes exit code 6 for a crash, and may start again
    if not from_environment().first:
        return errors.EXIT_OK
    percent = "%" if TASKS[config.task].points == 1.0 else ""
    value = f"{result.value:.2f}{percent}" if percent else f"{result.value:.4f}"
    print(f"best {result.metric} {value} in {result.seconds:.0f} s ({result.cpu_seconds / 60:.1f} CPU-minutes)")
    print(f"checkpoint {result.checkpoint}")
    print(f"next: leanvit quantize {result.checkpoint.parent} --data {config.data}")
    return errors.EXIT_OK


def _train(config: configs.TrainConfig) -> TrainResult:
    """Train in this process, as one of torchrun's, or on Ray."""
    from leanvit.train.processes import from_environment

    if config.ray is None:
        from leanvit.train import run as run_here

        return run_here(config)
    if from_environment().world > 1:
        raise errors.ConfigError("torchrun and --ray both start processes, expected one of them. Leave --ray out.")
    from leanvit.scale.train import run as run_on_ray

    return run_on_ray(config)
