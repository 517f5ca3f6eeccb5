"""What a task adds to a training: the trainer (loop.py) asks a Learning, and knows neither images nor targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import TrainConfig
from leanvit.train.processes import Processes


@dataclass(frozen=True)
class Setting:
    """Where and in what numbers a run computes."""

    processes: Processes
    device: torch.device
    dtype: torch.dtype | None
    memory_format: torch.memory_format

    def autocast(self) -> torch.autocast:
        """The context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    @property
    def sharded(self) -> bool:
        """Whether there are processes to share weights."""
        return self.processes.world > 1


class AnyPart(Protocol):
    """What one process works on at once: a part of an optimizer step.

    position: of its first image within the step. total: images of the step over all processes. last: whether it is
    this process' last part of the step. unreadable: what was wrong with images that are left out and were not before.
    """

    @property
    def step(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def last(self) -> bool: ...
    @property
    def unreadable(self) -> tuple[str, ...]: ...
    def __len__(self) -> int: ...


class AnyBatches(Protocol):
    """The parts of an epoch that one process works on."""

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Any]:
        """The parts of an epoch from a step on."""


@dataclass(frozen=True)
class Learned:
    """What one part returned. losses: (B,) by name; their sum is what is learned. correct: images that were right."""

    losses: dict[str, Tensor]
    correct: Tensor | None = None


@dataclass(frozen=True)
class Scored:
    """One validation. metrics: as they are kept as the best ones. row: what the log says of them."""

    metrics: dict[str, Any]
    row: dict[str, Any]


@dataclass(frozen=True)
class BadBatch:
    """What is kept of a part whose loss was not finite, and the names of its images."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


class Learning(Protocol):
    """What a task adds to a training.

    model: what is validated and saved. learner: the module whose forward DistributedDataParallel must see. saved: the
    module whose parameters are the state. extra: modules beside the model that learn at the full rate.
    counts_correct: whether the history says how many training images were right.
    """

    info: CheckpointInfo
    model: nn.Module
    learner: nn.Module
    saved: nn.Module
    extra: tuple[nn.Module, ...]
    counts_correct: bool

    @property
    def batches(self) -> AnyBatches:
        """What is trained on."""

    def name(self) -> str:
        """What a saved state is of."""

    def groups(self) -> list[dict[str, Any]]:
        """Groups of the model's parameters, with decay and scale of the rate."""

    def of_head(self) -> Callable[[str], bool]:
        """Whether a parameter or module learns where the backbone is frozen, by its name in the model."""

    def shard(self) -> None:
        """Shard the learner's parameters over the processes."""

    def running(self) -> Any:
        """The form of the learner that runs: wrapped for many processes, compiled."""

    def prepare(self, part: Any, step: int) -> Any:
        """A part as the network's input and its targets."""

    def learn(self, running: Any, prepared: Any, part: Any, step: int) -> Learned:
        """The losses of a part; all that is random in them is a pure function of seed, step and position."""

    def without_images(self, running: Any) -> dict[str, Tensor]:
        """The losses of one image that counts for nothing, for a process that has none to meet the others."""

    def validate(self, model: nn.Module) -> Scored:
        """Measure the model on the validation images."""

    def is_better(self, new: dict[str, Any], best: dict[str, Any]) -> bool:
        """Whether metrics are better than the best so far."""

    def is_of(self, row: dict[str, Any], metrics: dict[str, Any]) -> bool:
        """Whether a row of the history is the one with these metrics."""

    def bad_batch(self, part: Any, prepared: Any) -> BadBatch:
        """What to keep of a part whose loss is not finite."""

    def summary(self) -> dict[str, Any]:
        """What train.json says of the data."""


MakeLearning = Callable[[TrainConfig, Setting], Learning]
