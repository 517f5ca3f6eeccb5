"""What every check of the gate reads: the bundle, open in one runtime, and the data where there is any. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs
from leanvit.config import Runtime
from leanvit.export.gate.evaluation import Evaluation, Origin, in_batches
from leanvit.imaging import Pixels
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.task import Task, task_named

PIXELS_AT_A_TIME = 64 * 224 * 224
"""Pixels of the images that run at a time: 64 of 224 x 224, 7 of 640 x 640."""


class Opened(Protocol):
    """A predictor, as far as the gate uses it."""

    folder: Path
    manifest: Manifest
    runtime: Runtime

    @property
    def minimum_sqnr_db(self) -> float:
        """Least SQNR of golden outputs in this runtime, in dB."""

    @property
    def minimum_share(self) -> float:
        """Least share of the objects in golden images that must be found again."""

    def prepare(self, source: bytes, name: str | None = None) -> NDArray[np.uint8]:
        """Decode one image and bring it to the input size."""

    def outputs(self, images: Pixels) -> Outputs:
        """Outputs by name of prepared images (N, H, W, 3) uint8."""


@dataclass(frozen=True)
class Given:
    """A bundle that is checked. bundle: open in the runtime that this is about. evaluation: data, where given.

    origin: what the exported model says of itself.
    """

    bundle: Opened
    evaluation: Evaluation | None = None
    origin: Origin = field(default_factory=Origin)

    @property
    def folder(self) -> Path:
        """Where the bundle is."""
        return self.bundle.folder

    @property
    def manifest(self) -> Manifest:
        """What bundle.json says."""
        return self.bundle.manifest

    @property
    def task(self) -> Task:
        """What the network does."""
        return task_named(self.manifest.task)

    def run(self, pixels: Pixels) -> Outputs:
        """Outputs of prepared images (N, H, W, 3) uint8, in batches that fit memory; the evaluation's once only."""
        if self.evaluation is not None and pixels is self.evaluation.pixels:
            return self.evaluated
        return self._run(pixels)

    @cached_property
    def evaluated(self) -> Outputs:
        """Outputs for the evaluation's own images."""
        return self._run(self.evaluation.pixels if self.evaluation is not None else np.zeros((0, 1, 1, 3), np.uint8))

    def _run(self, pixels: Pixels) -> Outputs:
        asked = self.evaluation.batch_size if self.evaluation is not None else 0
        return in_batches(self.bundle.outputs, pixels, asked or images_at_a_time(pixels))


def images_at_a_time(pixels: Pixels) -> int:
    """How many of some prepared images (N, H, W, 3) run together."""
    return max(1, min(64, PIXELS_AT_A_TIME // (pixels.shape[1] * pixels.shape[2])))
