"""One calibration pass: ranges, channel extrema, second moments and a sample of every tensor that matters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from leanvit.progress import Bar
from leanvit.quant.graph import QuantGraph, Recorder

SAMPLE_SIZE = 2**16


@dataclass
class Statistics:
    """What calibration saw of one tensor.

    minimum, maximum: (). channel_minimum, channel_maximum, second_moment: (C,) over the last dimension.
    sample: (up to 65,536,) values, drawn evenly over the batches. rows: vectors of the last dimension seen.
    """

    minimum: Tensor
    maximum: Tensor
    channel_minimum: Tensor
    channel_maximum: Tensor
    second_moment: Tensor
    sample: Tensor
    rows: int


def observe(graph: QuantGraph, nodes: set[str], batches: Iterable[Tensor], description: str) -> dict[str, Statistics]:
    """Statistics of the named nodes over calibration batches, deterministic in the order of the batches.

    batches: tensors (B, C, H, W), normalised as the model expects.
    """
    batches = list(batches)
    share = max(1, SAMPLE_SIZE // max(1, len(batches)))
    seen: dict[str, Statistics] = {}

    def record(name: str, value: Tensor) -> None:
        current = _measure(value, share)
        seen[name] = _merge(seen[name], current) if name in seen else current

    recorder = Recorder(graph.module, nodes, record)
    with torch.no_grad(), Bar(description, len(batches)) as bar:
        for batch in batches:
            recorder.run(batch)
            bar.advance()
    return seen


def _measure(value: Tensor, share: int) -> Statistics:
    rows = value.detach().float().reshape(-1, value.shape[-1])
    low, high = rows.amin(0), rows.amax(0)
    flat = rows.reshape(-1)
    # A fixed generator and not a stride: a stride that divides the row length would see few channels only.
    picks = torch.randint(flat.numel(), (min(share, flat.numel()),), generator=torch.Generator().manual_seed(0))
    return Statistics(low.min(), high.max(), low, high, rows.square().mean(0), flat[picks.to(flat.device)], len(rows))


def _merge(a: Statistics, b: Statistics) -> Statistics:
    rows = a.rows + b.rows
    if a.second_moment.shape != b.second_moment.shape:
        # The last dimension is the batch's own (e.g. tokens by batch): only the tensor's range means something.
        channels = (a.minimum, a.maximum, a.second_moment.mean())
        low, high, moment = (t.reshape(1) for t in channels)
    else:
        low = torch.minimum(a.channel_minimum, b.channel_minimum)
        high = torch.maximum(a.channel_maximum, b.channel_maximum)
        moment = (a.second_moment * a.rows + b.second_moment * b.rows) / rows
    return Statistics(
        torch.minimum(a.minimum, b.minimum),
        torch.maximum(a.maximum, b.maximum),
        low,
        high,
        moment,
        torch.cat([a.sample, b.sample]),
        rows,
    )
