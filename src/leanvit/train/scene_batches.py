"""The annotated pictures of each step: which ones, in which process, and where in the step they stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from leanvit.config import TrainConfig
from leanvit.data.scene_loader import SceneLoader
from leanvit.tasks.task import Targets
from leanvit.train.batches import split_step
from leanvit.train.processes import Processes


@dataclass(frozen=True)
class ScenePart:
    """What one process works on at once; see train.learning.AnyPart.

    images: (B, 3, H, W) uint8, augmented. targets: one an image. positions: of the images within the step.
    """

    step: int
    images: Tensor
    targets: Targets
    positions: tuple[int, ...]
    position: int
    total: int
    last: bool
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Pictures that could be read."""
        return len(self.targets)


@dataclass
class SceneBatches:
    """All parts of an epoch that one process works on, in order."""

    loader: SceneLoader
    config: TrainConfig
    processes: Processes

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.loader)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[ScenePart]:
        """The parts of an epoch. Raises ImageError for a bad picture where bad_images is "fail", DataError."""
        accumulated, processes = self.config.grad_accum_steps, self.processes
        mine = range(processes.rank * accumulated, (processes.rank + 1) * accumulated)
        self.loader.set_epoch(epoch)
        plan, keys = [], []
        for step, whole in enumerate(self.loader.plan()[first_step:], first_step):
            pieces = split_step(len(whole), processes.world * accumulated)
            for number in mine:
                piece = pieces[number]
                plan.append((step, piece.start, len(whole), number == mine[-1]))
                keys.append(whole[piece])
        for (step, start, total, last), (images, targets, places) in zip(plan, self.loader.read(keys), strict=True):
            yield ScenePart(step, images, targets, tuple(start + place for place in places), start, total, last)
