"""Ranges, channel extrema and a sample of the rows of chosen tensors, over batches of calibration images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from leanvit.progress import Bar
from leanvit.quant.graph import QuantGraph
from leanvit.quant.interpret import observe_nodes
from leanvit.quant.samples import ROWS, some_rows


@dataclass
class Statistics:
    """What calibration saw of one tensor, by the channels of its last dimension.

    channel_minimum, channel_maximum: (C,). rows: (up to 768, C) float32, drawn evenly over the batches.
    """

    channel_minimum: Tensor
    channel_maximum: Tensor
    rows: Tensor


def observe(graph: QuantGraph, nodes: set[str], batches: Iterable[Tensor], description: str) -> dict[str, Statistics]:
    """Statistics of the named nodes over calibration batches, deterministic in the order of the batches.

    batches: tensors (B, C, H, W), normalised as the model expects.
    """
    batches = list(batches)
    share = max(1, ROWS // max(1, len(batches)))
    seen: dict[str, Statistics] = {}

    def record(name: str, value: Tensor) -> None:
        rows = value.detach().float().reshape(-1, value.shape[-1])
        current = Statistics(rows.amin(0), rows.amax(0), some_rows(rows, share))
        seen[name] = _merge(seen[name], current) if name in seen else current

    with Bar(description, len(batches)) as bar:
        for batch in batches:
            observe_nodes(graph.module, nodes, batch, record)
            bar.advance()
    return seen


def _merge(a: Statistics, b: Statistics) -> Statistics:
    return Statistics(
        torch.minimum(a.channel_minimum, b.channel_minimum),
        torch.maximum(a.channel_maximum, b.channel_maximum),
        torch.cat([a.rows, b.rows]),
    )
