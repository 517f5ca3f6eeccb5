"""Attention of ReSwin: within windows, with relative position bias and carried logits.

The equations are in `reswin`; which tokens share a window, and which logits meet, is decided in `_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanvit.models._attention import Alpha, cast_like, residual_logits


class WindowAttention(nn.Module):
    """Attention within windows with relative position bias and residual logits."""

    def __init__(self, dim: int, *, num_heads: int, window: int, qkv_bias: bool = True, residual: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.area = window * window
        self.residual = residual
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        place = torch.arange(self.area)
        y, x = place // window, place % window
        index = (y[:, None] - y[None, :] + window - 1) * (2 * window - 1) + x[:, None] - x[None, :] + window - 1
        self.register_buffer("relative_position_index", index, persistent=False)
        self.relative_position_index: Tensor

    def forward(
        self, x: Tensor, mask: Tensor | None, previous: Tensor | None, known: Tensor | None, alpha: Alpha
    ) -> tuple[Tensor, Tensor]:
        """x: (B, tokens in window order, dim); mask: (windows, 1, M^2, M^2) or None.

        previous: logits to mix with, (B, windows, heads, M^2, M^2), or None; known: which of them exist,
        (windows, 1, M^2, M^2), or None for all. Returns (B, tokens, dim) and the logits to carry on.
        """
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens // self.area, self.area, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if not self.residual or previous is None:
            logits = _add(residual_logits(q, k, None, 1.0, self.scale), bias)
        elif known is None:
            logits = _add(residual_logits(q, k, previous, alpha, self.scale), bias * alpha)
        else:
            own = _add(residual_logits(q, k, None, 1.0, self.scale), bias)
            weight = cast_like(alpha, own) if isinstance(alpha, Tensor) else alpha
            logits = torch.lerp(torch.where(known, previous, own), own, weight)
        masked = logits if mask is None else logits + cast_like(mask, logits)
        x = torch.matmul(masked.softmax(dim=-1), v)
        return self.proj(x.transpose(2, 3).reshape(batch, tokens, dim)), logits


def _add(logits: Tensor, bias: Tensor) -> Tensor:
    """logits + bias, in place where no graph is recorded."""
    bias = cast_like(bias, logits)
    return logits + bias if torch.compiler.is_compiling() else logits.add_(bias)
