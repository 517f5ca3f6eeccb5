"""Outliers in a vision transformer that leave its function alone: what quantization has to survive.

Trained large transformers have a few channels behind every LayerNorm that are tens of times wider than the others, and
off centre. Here they are put into any timm VisionTransformer: a channel is multiplied and moved in the norm, and
both are undone in the linear that reads it; channels of q are multiplied and those of k divided. All arithmetic is
float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def add_outliers(
    model: Any,
    *,
    channels: float = 0.05,
    scale: float = 60.0,
    shift: float = 1.0,
    head_scale: float = 1.0,
    seed: int = 0,
) -> None:
    """Put outliers into a timm VisionTransformer (or a distilled one), in place; its float answers stay.

    channels: share of the channels of each norm. scale: largest factor; factors are drawn from scale / 3 to scale.
    shift: by which outlying channels are moved, in units of their factor, to either side.
    head_scale: largest factor between the channels of q and of k; 1 leaves them alone.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.blocks:
        widen_channels(block.norm1, [block.attn.qkv], channels, scale, shift, generator)
        widen_channels(block.norm2, [block.mlp.fc1], channels, scale, shift, generator)
        if head_scale > 1:
            unbalance_heads(block.attn.qkv, head_scale, generator)
    heads = [
        getattr(model, name) for name in ("head", "head_dist") if isinstance(getattr(model, name, None), nn.Linear)
    ]
    widen_channels(model.norm, heads, channels, scale, shift, generator)


def widen_channels(
    norm: nn.LayerNorm, linears: list[nn.Linear], share: float, scale: float, shift: float, generator: torch.Generator
) -> None:
    """Multiply and move some channels of a norm, and undo it in all linears that read it."""
    width = norm.weight.shape[0]
    chosen = torch.randperm(width, generator=generator)[: max(1, round(share * width))]
    factor, moved = torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    drawn = torch.rand(len(chosen), generator=generator, dtype=torch.float64)
    factor[chosen] = scale * 3.0 ** (drawn - 1)
    signs = torch.randint(0, 2, (len(chosen),), generator=generator) * 2 - 1
    moved[chosen] = shift * factor[chosen] * signs
    assign(norm.weight, norm.weight.double() * factor)
    assign(norm.bias, norm.bias.double() * factor + moved)
    for linear in linears:
        weight = linear.weight.double() / factor
        assign(linear.weight, weight)
        assign(linear.bias, linear.bias.double() - weight @ moved)


def unbalance_heads(qkv: nn.Linear, scale: float, generator: torch.Generator) -> None:
    """Multiply the channels of q by random factors and divide those of k by them; q k^T stays."""
    width = qkv.weight.shape[0] // 3
    exponent = torch.rand(width, generator=generator, dtype=torch.float64) * 2 - 1
    factor = torch.cat([scale**exponent, scale**-exponent, torch.ones(width, dtype=torch.float64)])
    assign(qkv.weight, qkv.weight.double() * factor[:, None])
    assign(qkv.bias, qkv.bias.double() * factor)


def assign(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter in its own precision."""
    parameter.data.copy_(value)
