"""The names of leanvit.runtime.golden_objects and leanvit.runtime.task before they had rows, for the exporter."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs
from leanvit.runtime.bundle import sqnr_db
from leanvit.runtime.golden_objects import (
    CLEAR_SCORE,
    LEAST_SHARE,
    MATCHED_SHARE,
    SHARE_MARGIN,
    golden_records,
    least_share,
    matched_share,
)
from leanvit.runtime.task import kept_values, task_named

__all__ = [
    "CLEAR_SCORE", "LEAST_SHARE", "MATCHED_SHARE", "SHARE_MARGIN", "golden_records", "golden_values", "least_share",
    "matched_share", "worst_sqnr_db",
]  # fmt: skip


def golden_values(outputs: Outputs, task: str) -> NDArray[np.float32]:
    """A fixed choice of values (N, V) of the continuous output."""
    return kept_values(task_named(task), outputs)


def worst_sqnr_db(expected: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """SQNR in dB of the picture whose values (N, V) are furthest off."""
    return min(sqnr_db(*pair) for pair in zip(expected, found, strict=True))
