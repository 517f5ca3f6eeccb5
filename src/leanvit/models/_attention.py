"""Attention whose logits are carried from layer to layer, shared by ReViT, ReMViTv2 and ReSwin.

    S_l = Q_l K_l^T / sqrt(d)          R_1 = S_1        R_l = alpha S_l + (1 - alpha) R_(l-1)

Three exact ways to compute it: `residual_logits` for training and export, `residual_attention_` in place
for inference, and `History` with `blockwise_attention`, which never holds an N x N tensor because
R_l = sum_i w_i Q_i K_i^T needs only the queries and keys of the layers below.

Diko et al., "ReViT", Pattern Recognition 2024, arXiv 2402.11301.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor

Alpha = float | Tensor
"""Weight of a layer's own logits in [0, 1]: a constant, or a learned tensor of shape (1,)."""

CACHE_BYTES = 4 << 20
"""Logits worked on at a time on CPU by `residual_attention_`: about one core's second-level cache."""

BLOCK_BYTES = 16 << 20
"""Logits held at a time by `blockwise_attention`."""


def residual_logits(q: Tensor, k: Tensor, previous: Tensor | None, alpha: Alpha, scale: float) -> Tensor:
    """Attention logits of one layer, mixed with those of the layer below (ReViT, Eq. 4).

    q: (..., Nq, head_dim), not yet scaled; k: (..., Nk, head_dim).
    previous: logits carried by the layer below, broadcastable to (..., Nq, Nk), or None in the first.
    alpha: weight of this layer's own logits; unused in the first layer.
    scale: usually head_dim ** -0.5.
    Returns (..., Nq, Nk): what the next layer carries on, before any softmax.
    """
    if previous is None:
        return torch.matmul(q * scale, k.transpose(-2, -1))
    if isinstance(alpha, Tensor):
        # alpha goes into q and not over the product, so that autograd need not keep the product itself.
        own = torch.matmul(q * _cast(alpha * scale, q), k.transpose(-2, -1))
        return torch.addcmul(own, previous, _cast(1.0 - alpha, own))
    own = torch.matmul(q * (alpha * scale), k.transpose(-2, -1))
    return torch.add(own, previous, alpha=1.0 - alpha)


def residual_attention_(
    q: Tensor, k: Tensor, v: Tensor, previous: Tensor | None, alpha: float, scale: float
) -> tuple[Tensor, Tensor]:
    """Inference form of one layer: scale, product and residual in one call, in place on `previous`.

    q, k, v: (B, heads, N, head_dim); previous: (B, heads, N, N), contiguous, overwritten; or None.
    Works on as many images at a time as the cache holds, so that softmax and the second product find
    the logits there. No gradients. Returns (B, N, heads head_dim) and the logits to carry on.
    """
    batch, heads, tokens, dim = q.shape
    logits = q.new_empty(batch, heads, tokens, tokens) if previous is None else previous
    beta, gain = (0.0, scale) if previous is None else (1.0 - alpha, alpha * scale)
    image_bytes = heads * tokens * tokens * q.element_size()
    step = max(1, CACHE_BYTES // image_bytes) if q.device.type == "cpu" else batch
    out = q.new_empty(batch, tokens, heads, dim)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        q_part, k_part, v_part = (t[part].reshape(-1, tokens, dim) for t in (q, k, v))
        mixed = logits[part].view(-1, tokens, tokens)
        mixed.baddbmm_(q_part, k_part.transpose(1, 2), beta=beta, alpha=gain)
        mean = torch.bmm(mixed.softmax(dim=-1), v_part)
        out[part] = mean.view(-1, heads, tokens, dim).transpose(1, 2)
    return out.flatten(2), logits


@dataclass(frozen=True)
class History:
    """Queries and keys of the layers so far: all that is needed to compute any block of carried logits.

    queries, keys: one (B, heads, N, head_dim) per layer; weights: how much each layer's product counts.
    """

    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    weights: tuple[Alpha, ...] = ()

    def extended(self, q: Tensor, k: Tensor, alpha: Alpha, scale: float) -> History:
        """The history with one more layer, q and k not yet scaled; the first layer counts fully."""
        own = alpha * scale if self.weights else scale
        below = tuple(weight * (1.0 - alpha) for weight in self.weights)
        # Copies, because views would keep the packed q, k, v alive and with it a third more memory.
        queries = (*self.queries, q.contiguous())
        return History(queries, (*self.keys, k.contiguous()), (*below, own))

    def logits(self) -> Tensor:
        """All carried logits, (B, heads, N, N): for inspection, as this is what a history avoids."""
        return _weighted_products(self.queries, torch.cat(self.keys, dim=-1), self.weights)


def blockwise_attention(history: History, v: Tensor, drop: float = 0.0) -> Tensor:
    """softmax(R) V with R from a history, exact, over blocks of heads and of queries.

    A block holds as many heads as fit whole, or some queries of one head where none does, so that neither
    the logits nor a second copy of all keys ever exist together.
    v: (B, heads, N, head_dim); drop: dropout probability of the attention weights.
    Returns (B, heads, N, head_dim). In training each block is computed again in the backward pass.
    """
    batch, heads, tokens, dim = v.shape
    head_bytes = tokens * tokens * v.element_size()
    group = min(max(1, BLOCK_BYTES // head_bytes), batch * heads)
    rows = max(16, BLOCK_BYTES // (group * tokens * v.element_size()))
    recompute = torch.is_grad_enabled()
    values = v.reshape(-1, tokens, dim)
    # Blocks go straight to their place: small results left between large scratch fragment the heap.
    out = torch.empty_like(values)
    for first in range(0, batch * heads, group):
        part = slice(first, first + group)
        keys = torch.cat([k.flatten(0, 1)[part] for k in history.keys], dim=-1)
        for start in range(0, tokens, rows):
            block = slice(start, start + rows)
            queries = tuple(q.flatten(0, 1)[part, block] for q in history.queries)
            arguments = (queries, keys, history.weights, values[part], drop)
            out[part, block] = checkpoint(_attend, *arguments) if recompute else _attend(*arguments)
    return out.view(batch, heads, tokens, dim)


def _attend(queries: tuple[Tensor, ...], keys: Tensor, weights: tuple[Alpha, ...], v: Tensor, drop: float) -> Tensor:
    attention = _weighted_products(queries, keys, weights).softmax(dim=-1)
    return torch.matmul(F.dropout(attention, drop) if drop else attention, v)


def _weighted_products(queries: tuple[Tensor, ...], keys: Tensor, weights: tuple[Alpha, ...]) -> Tensor:
    """sum_i w_i Q_i K_i^T as one product of concatenated heads: (..., Nq, Nk)."""
    scaled = [q * (_cast(w, q) if isinstance(w, Tensor) else w) for q, w in zip(queries, weights, strict=True)]
    return torch.matmul(torch.cat(scaled, dim=-1), keys.transpose(-2, -1))


def _cast(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of `like`; the test keeps a no-op cast out of exported graphs."""
    return x if x.dtype == like.dtype else x.to(like.dtype)
