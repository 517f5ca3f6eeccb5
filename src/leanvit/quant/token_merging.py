"""Where a network merges its tokens: in the block in which that costs the outputs least for the work that it saves.

All tokens that are to go are merged in one block, as what merging itself takes is then paid once; the earlier the
block, the more blocks behind it are spared, and the less alike are the tokens. Every block of the first third is tried
on calibration images, and the one taken has the least

    score = divergence of the outputs from those with all tokens / share of the multiply-adds saved

which is the score by which Greedy MP takes its steps (MPTQ-ViT, arXiv 2401.14895; merging: arXiv 2210.09461).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leanvit.checkpoint import merging_layout, with_merged_tokens
from leanvit.progress import Bar, note
from leanvit.quant.losses import divergence, outputs_of

if TYPE_CHECKING:
    from leanvit.models import Layout

MERGE_IMAGES = 64
"""Calibration images on which blocks are compared. At 0.6 of the tokens six choices of 64, three of each of two micro
models, all took the block that 3,000 test images take. At 0.5, where the best two are near (scores of 0.152 and 0.171,
0.175 and 0.187), four of the six took the second."""


@dataclass(frozen=True)
class Tried:
    """What merging costs and saves: tokens that each block merges, divergence of outputs, share of multiply-adds."""

    counts: tuple[int, ...]
    loss: float
    saved: float

    @property
    def score(self) -> float:
        """Loss for the work saved."""
        return self.loss / self.saved if self.saved else self.loss


def merge_where_it_costs_least(
    model: nn.Module, batches: Sequence[Tensor], keep_tokens: float | Sequence[int]
) -> tuple[nn.Module, tuple[int, ...], dict[str, Any]]:
    """A copy of a plain vision transformer that merges tokens; the model itself is not changed.

    batches: calibration images (B, 3, H, W) float32, normalised. keep_tokens: share of the patch tokens to keep, in
    (0, 1], or how many each block merges.
    Returns the copy, how many tokens each block merges, and for the report what was tried.
    Raises ConfigError where the network can't merge, or not that many tokens.
    """
    layout = merging_layout(model)
    tried: list[Tried] = []
    if isinstance(keep_tokens, float | int):
        device = next(model.parameters()).device
        images = torch.cat([batch[:MERGE_IMAGES] for batch in batches])[:MERGE_IMAGES].to(device, torch.float32)
        tried = _try_blocks(model, layout, images, keep_tokens)
        best = min(tried, key=lambda one: one.score)
        counts = best.counts
        note(
            f"{sum(counts)} of {layout.tokens} tokens are merged in block {counts.index(max(counts))}: "
            f"{100 * best.saved:.0f}% fewer multiply-adds, divergence {best.loss:.3g}"
        )
    else:
        counts = tuple(keep_tokens)
    merged = with_merged_tokens(copy.deepcopy(model), counts)
    facts = {
        "tokens": layout.tokens,
        "counts": counts,
        "saved": layout.saved(counts),
        "tried": list(map(asdict, tried)),
    }
    return merged, counts, facts


def _try_blocks(model: nn.Module, layout: Layout, images: Tensor, keep: float) -> list[Tried]:
    truth = outputs_of(model, images)
    found = []
    candidates = layout.candidates(keep)
    with Bar("trying blocks that merge tokens", len(candidates)) as bar:
        for counts in candidates:
            outputs = outputs_of(with_merged_tokens(copy.deepcopy(model), counts), images)
            found.append(Tried(counts, divergence(truth, outputs), layout.saved(counts)))
            bar.advance()
    return found
