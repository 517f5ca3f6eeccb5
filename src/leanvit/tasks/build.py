"""A task's network from what its checkpoint says, and its outputs as a bundle returns them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanvit.annotations import KeypointScheme, Outputs
from leanvit.checkpoint import CheckpointInfo
from leanvit.errors import CheckpointError
from leanvit.load.api import build, load_checkpoint
from leanvit.tasks import TASKS, TrainingTask, task_named


def task_of_network(info: CheckpointInfo) -> TrainingTask:
    """The task that a checkpoint is for. Raises CheckpointError where none is registered under its name."""
    if info.task not in TASKS:
        raise CheckpointError(
            f"the checkpoint is for task '{info.task}', expected one of {', '.join(TASKS)}. Import the module that "
            "registers that task."
        )
    return TASKS[info.task]


def build_network(info: CheckpointInfo) -> nn.Module:
    """The network of a task with random weights, on the CPU.

    Raises CheckpointError for a task that is not registered, UnknownModelError, ConfigError.
    """
    return build(info)


def keypoints_of(scheme: KeypointScheme | None) -> dict[str, Any] | None:
    """A scheme as CheckpointInfo keeps it."""
    return asdict(scheme) if scheme else None


def load_network(path: str | Path) -> tuple[nn.Module, CheckpointInfo]:
    """Network (eval mode, CPU) and info of a checkpoint or run folder, of any task.

    Raises CheckpointError where it is missing, damaged, or of a task that is not registered.
    """
    return load_checkpoint(path)


def raw_outputs(network: nn.Module, task: str, x: Tensor) -> Outputs:
    """Outputs of a network in eval mode for x (B, 3, H, W) float32 normalised, as a bundle returns them."""
    return task_named(task).outputs(network, x)
