"""What a paper says of a model, and what a converted checkpoint of its authors holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PaperResult:
    """Numbers that a paper or its program states for one architecture.

    params: number of parameters with the paper's class count.
    macs: multiply-adds of one forward pass at the model's default input size, in units of 1e9
        (linear, convolution and both attention products).
    top1: ImageNet-1k top-1 in percent, or None where the paper states none.
    """

    params: int
    macs: float
    top1: float | None


@dataclass(frozen=True)
class Converted:
    """A checkpoint of the authors, in leanvit's terms.

    kwargs: keyword arguments of the model class.
    state_dict: the weights under leanvit's names; loads with strict=True.
    """

    kwargs: dict[str, Any]
    state_dict: dict[str, Tensor]
