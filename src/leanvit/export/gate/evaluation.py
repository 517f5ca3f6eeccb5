"""The data that a bundle of any task is measured on, and what is known of the network before export. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs
from leanvit.config import Preprocess
from leanvit.imaging import Pixels

Run = Callable[[Pixels], Outputs]
"""From prepared images (N, H, W, 3) uint8 to a network's outputs by name."""

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """The task's metrics of a bundle in ONNX Runtime, as measured a moment ago on the same data.

    sha256: of the model.onnx that was run; metrics of another file are not believed.
    """

    metrics: Metrics
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """Labelled data of any task, and what the network before export says of it.

    name: of the data set. classes: its class names in the order of the indices, or None.
    pixels: (N, H, W, 3) uint8, prepared images whose outputs are compared one by one: all that have one label, or
    COMPARED_PICTURES annotated ones. labels: (N,) int64 of `pixels`, -1 where unknown; None for annotated pictures.
    measure: metrics of a network's outputs on all of the data; None where nothing is known to measure against.
    expected: outputs for `pixels` of the simulated or float network that was exported, or None.
    before: the task's metric of the float network on the same data, or None. measured: of the bundle, or None.
    batch_size: images that run at a time; 0: as many as fit memory.
    """

    name: str
    pixels: Pixels
    classes: tuple[str, ...] | None = None
    labels: NDArray[np.int64] | None = None
    measure: Callable[[Run], Metrics] | None = None
    expected: Outputs | None = None
    before: float | None = None
    measured: Measured | None = None
    batch_size: int = 0


@dataclass(frozen=True)
class Origin:
    """What the exported model says of itself, whatever export was told; None where it says nothing."""

    labels: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None


def in_batches(run: Run, pixels: Pixels, batch_size: int) -> Outputs:
    """Outputs for all of some prepared images (N, H, W, 3) uint8, `batch_size` at a time."""
    parts = [run(pixels[i : i + batch_size]) for i in range(0, len(pixels), batch_size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
