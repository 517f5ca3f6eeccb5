"""Rates of stochastic depth (Huang et al. 2016), the same floats as timm's calculate_drop_path_rates, which timm has
from 1.0.21 on only.
"""

from __future__ import annotations

import torch


def linear_rates(rate: float, depth: int) -> list[float]:
    """Rate of each of `depth` blocks: from 0 in the first to `rate` in the last, in equal steps."""
    rates: list[float] = torch.linspace(0, rate, depth, device="cpu").tolist()
    return rates
