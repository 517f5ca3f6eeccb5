"""Search of ranges and scales: the ones with the least squared error on calibration data."""

from __future__ import annotations

import torch
from torch import Tensor

from leanvit.quant.observe import Statistics
from leanvit.quant.quantizers import (
    asymmetric_parameters,
    code_range,
    fake_quantize,
    symmetric_scale,
)

_SHARES = torch.cat([torch.linspace(0.1, 0.5, 9)[:-1], torch.linspace(0.5, 1.0, 51)])


def search_range(statistics: Statistics, bits: int) -> tuple[Tensor, Tensor]:
    """The (minimum, maximum) whose `bits`-bit asymmetric grid has the least squared error.

    Every candidate shrinks the observed range by one share; the whole range is among them, so the result
    is never worse than min-max on the sample.
    """
    shares = _SHARES.to(statistics.sample.device)
    scale, zero_point = asymmetric_parameters(statistics.minimum * shares, statistics.maximum * shares, bits)
    low, high = code_range(bits, symmetric=False)
    # The extremes are appended: a sample rarely holds them, and clipping them is what a narrow range costs.
    values = torch.cat([statistics.sample, statistics.minimum.view(1), statistics.maximum.view(1)])
    errors = torch.stack(
        [
            (fake_quantize(values, s, z, low, high) - values).square().sum()
            for s, z in zip(scale, zero_point, strict=True)
        ]
    )
    best = int(errors.argmin())
    return statistics.minimum * shares[best], statistics.maximum * shares[best]


def search_weight_scale(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """One scale per output channel with the least weighted squared error.

    weight: (out, ...). importance: mean squared input of every input channel, broadcast against one
    channel's weights (diagonal of the Hessian of the site's output error); None weighs all alike.
    Returns (out,) scales.
    """
    rows = weight.reshape(weight.shape[0], -1)
    low, high = code_range(bits, symmetric=True)
    weights = torch.ones_like(rows[0]) if importance is None else importance.reshape(-1).expand_as(rows[0])
    largest = rows.abs().amax(1)
    best_scale = symmetric_scale(largest, bits)
    best_error = torch.full_like(largest, torch.inf)
    for share in _SHARES.to(weight.device):
        scale = symmetric_scale(largest * share, bits)
        error = (fake_quantize(rows, scale[:, None], torch.zeros_like(scale)[:, None], low, high) - rows).square()
        total = (error * weights).sum(1)
        better = total < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, total, best_error)
    return best_scale
