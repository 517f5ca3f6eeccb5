"""Losses of a search that other processes compute, each for a share of the calibration images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from torch import Tensor, nn

from leanvit.config import MPTQConfig
from leanvit.quant.costs import Candidate
from leanvit.quant.graph import Measure
from leanvit.quant.plan import Plan


class Losses(Protocol):
    """What a search asks for: leanvit.quant.evaluate.PlanLosses in its own process, or `Elsewhere`."""

    def loss(self, plan: Plan) -> float:
        """Divergence of a plan's outputs from the float ones."""

    def losses(self, plans: Sequence[Plan]) -> Iterator[float]:
        """The same of several plans, in their order."""

    def local_error(self, candidate: Candidate, bits: int) -> float:
        """Squared output error of a part of a site on its sample."""


class Elsewhere(Losses, Protocol):
    """What a search is given to compute its losses elsewhere. They are those that it would compute itself."""

    def begin(
        self, model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None = None
    ) -> None:
        """Make ready for the search of a network; see leanvit.quant.mptq.quantize_part for what is given."""

    def prepare(self, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
        """Make the quantizers of these parts of sites at all levels; their local errors will be asked for."""
