"""Norms of tokens through the depth: do a few patches stand far above the others, as attention sinks do.

Large transformers keep global facts in patches of little content, whose norm is several times that of the others
(Darcet et al., "Vision Transformers Need Registers", ICLR 2024, arXiv 2309.16588, figure 3; Sun et al., "Massive
Activations in Large Language Models", arXiv 2402.17762). One such token sets the range of an activation quantizer, and
leaves few steps to all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

SINK_TIMES = 3.0
"""The median of an image's norms, from which a token counts as a sink: in figure 3 of Darcet et al. most patches of
DINOv2 lie around 50, and their sinks from 150 on."""


def token_norms(tokens: Tensor) -> Tensor:
    """Euclidean norm of every token: (B, N, C) to (B, N), not negative."""
    return tokens.double().square().sum(-1).sqrt()


def norm_facts(tokens: Tensor) -> Tensor:
    """Of each image's tokens (B, N, C): median norm, largest norm, and how many are sinks. Returns (B, 3)."""
    norms = token_norms(tokens)
    median = norms.median(1).values
    sinks = (norms > SINK_TIMES * median[:, None]).sum(1)
    return torch.stack([median, norms.amax(1), sinks.to(norms)], 1)
