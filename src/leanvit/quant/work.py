"""What a pass of the engine is: a function on the work at hand, and the row that says when it runs and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from leanvit.config import MPTQConfig
from leanvit.quant.calibrate import Choices
from leanvit.quant.elsewhere import Elsewhere
from leanvit.quant.graph import QuantGraph
from leanvit.quant.plan import Plan

Stage = Literal["prepare", "bits", "after"]
"""prepare: no quantizer is there yet; rewrites the float graph so that it computes the same, or says how quantizers are
set. bits: chooses the plan. after: quantizers are set; changes them or what stands around them."""


@dataclass
class Work:
    """What passes work on and hand on.

    config: what was asked for. graph: the float graph; passes of the stage `prepare` change it in place.
    batches: calibration images (B, 3, H, W) float32, normalised, on the graph's device. images: those that fit
    into memory at once, (N, 3, H, W), on which quantizers are set.
    choices: how quantizers will be set. plan: bits of every site, from the stage `bits` on.
    quantized: the graph with quantizers, in the stage `after`; its nodes bear the names of the float graph's.
    notes: JSON values that go into the report. journal: file of a search of bits, and beside it of what is learned.
    elsewhere: computes losses of that search in other processes.
    float_bytes: of the model as it came.
    """

    config: MPTQConfig
    graph: QuantGraph
    batches: list[Tensor]
    images: Tensor
    float_bytes: int
    choices: Choices
    plan: Plan | None = None
    quantized: QuantGraph | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    journal: str | Path | None = None
    elsewhere: Elsewhere | None = None


@dataclass(frozen=True)
class Pass:
    """One row of the table of passes.

    name: in MPTQConfig.passes and --passes, for what is beyond the paper. purpose: one line. source: where it is from.
    stage: when it runs. run: changes the work in place. wanted: whether a configuration asks for it; None: whether
    its name is among the active passes.
    """

    name: str
    purpose: str
    source: str
    stage: Stage
    run: Callable[[Work], None]
    wanted: Callable[[MPTQConfig], bool] | None = None

    @property
    def beyond_paper(self) -> bool:
        """Whether the pass is asked for by its name."""
        return self.wanted is None

    def runs(self, config: MPTQConfig) -> bool:
        """Whether a configuration asks for the pass."""
        return self.name in config.active_passes if self.wanted is None else self.wanted(config)
