"""Checks of embeddings: the file's vectors point where the network's do, and have the same neighbours. Torch-free."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from leanvit.export.gate.calibration import hint_of_difference
from leanvit.export.gate.check import Check
from leanvit.export.gate.evaluation import in_batches
from leanvit.export.gate.given import Given
from leanvit.export.gate.limits import NEIGHBOURS_KEPT, TIED_NOISE
from leanvit.runtime.bundle import load_golden
from leanvit.runtime.neighbours import cosines, nearest
from leanvit.runtime.task import kept_values

Values = NDArray[np.float32]


def least_cosine(minimum_db: float) -> float:
    """The cosine below which a vector whose error is `minimum_db` dB below it can't fall.

    An error of length e of a vector of length 1 turns it most where it is square to the vector it leads to: the sine
    of that angle is e.
    """
    return float(np.sqrt(max(0.0, 1 - 10 ** (-minimum_db / 10))))


def check_cosine(given: Given) -> list[Check]:
    """Embeddings of golden images point where those of the network before export do."""
    images, expected = load_golden(given.folder)
    pixels = np.stack([given.bundle.prepare(image, f"golden image {i}") for i, image in enumerate(images)])
    found = kept_values(given.task, in_batches(given.bundle.outputs, pixels, len(pixels)))
    worst, least = float(cosines(expected, found).min()), least_cosine(given.bundle.minimum_sqnr_db)
    hint = hint_of_difference(given)
    return [Check("golden cosine", worst >= least, f"{worst:.5f} in the worst image", f"at least {least:.5f}", hint)]


def check_neighbours(given: Given) -> list[Check]:
    """On the evaluation's images: cosine to the network's embeddings, and the nearest other image stays the same.

    Where two images are equally near but for rounding, either may come first; those count as kept.
    """
    evaluation, task = given.evaluation, given.task
    if evaluation is None or evaluation.expected is None:
        return []
    expected, found = (kept_values(task, outputs) for outputs in (evaluation.expected, given.evaluated))
    mean, least = float(cosines(expected, found).mean()), least_cosine(given.bundle.minimum_sqnr_db)
    hint = hint_of_difference(given)
    checks = [Check("cosine", mean >= least, f"{mean:.5f} in the mean image", f"at least {least:.5f}", hint)]
    if len(expected) < 3:
        return checks
    share = neighbours_kept(expected, found, given.bundle.minimum_sqnr_db)
    text = f"{share:.2%} of {len(expected)} images have the same nearest image, near ties left aside"
    return [*checks, Check("neighbours", share >= NEIGHBOURS_KEPT, text, f"at least {NEIGHBOURS_KEPT:.0%}", hint)]


def neighbours_kept(expected: Values, found: Values, minimum_db: float) -> float:
    """Share of vectors (N, D) whose nearest other one is the same in both, or tied with it but for rounding.

    minimum_db: SQNR in dB that is asked of `found`. An error of that power, spread over D directions, moves a cosine by
    sqrt(2 / D) of its length; where less was moved in these very vectors, less counts as tied.
    """
    first, near = nearest(expected, expected, 1, but_itself=True)
    second, _ = nearest(found, found, 1, but_itself=True)
    moved = near[:, 0] - cosines(found, found[first[:, 0]])
    allowed = np.sqrt(2 / expected.shape[1] * 10 ** (-minimum_db / 10))
    noise = min(float(np.sqrt(np.square(moved).mean())), float(allowed))
    tied = near[:, 0] - cosines(expected, expected[second[:, 0]]) <= TIED_NOISE * noise
    return float(((first == second)[:, 0] | tied).mean())
