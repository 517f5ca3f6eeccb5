"""Losses of plans that other processes compute beside a search, before it asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor, nn

from leanvit.config import MPTQConfig
from leanvit.quant.costs import Candidate
from leanvit.quant.graph import Measure
from leanvit.quant.plan import Plan


class Ahead(Protocol):
    """What a search is given to compute its losses elsewhere. They are those that it would compute itself.

    width: losses that are computed at a time.
    """

    width: int

    def begin(
        self, model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None = None
    ) -> None:
        """Make ready for the search of a network; see leanvit.quant.mptq.PlanLosses for what is given."""

    def expect(self, plans: Sequence[Plan]) -> None:
        """Losses that are likely to be asked for next."""

    def loss(self, plan: Plan) -> float:
        """The loss of a plan; waits for it."""

    def expect_local(self, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
        """Squared output errors of these parts of sites at all levels will be asked for."""

    def local_error(self, candidate: Candidate, bits: int) -> float:
        """leanvit.quant.evaluate.local_error of what was expected; waits for it."""
