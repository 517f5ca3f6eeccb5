"""What a detector's heads are calibrated on."""

from __future__ import annotations

import numpy as np
import torch

from leanvit.tasks.detect import CELLS_KEPT, _SomeCells


def test_cells_are_a_fair_sample_of_all_runs() -> None:
    counts = np.zeros(4 * CELLS_KEPT)
    for seed in range(200):
        some = _SomeCells(torch.Generator().manual_seed(seed))
        numbers = torch.arange(4.0 * CELLS_KEPT).view(-1, 1, 1, 1)
        for run in torch.split(numbers, [1, CELLS_KEPT, 700, len(numbers) - CELLS_KEPT - 701]):
            some.add(run)
        found = some.cells.flatten().long().numpy()
        assert len(set(found.tolist())) == CELLS_KEPT
        assert (np.sort(found) == found).all()
        counts[found] += 1
    # A quarter of 200 draws each; 5.5 deviations of a binomial.
    assert np.abs(counts - 50).max() < 5.5 * (200 * 0.25 * 0.75) ** 0.5


def test_cells_are_few_where_few_were_pooled() -> None:
    some = _SomeCells(torch.Generator().manual_seed(0))
    some.add(torch.zeros(0, 2, 7, 7))
    assert some.cells.shape == (0, 2, 7, 7)
    some.add(torch.ones(3, 2, 7, 7))
    assert some.cells.shape == (3, 2, 7, 7)
