"""Attention whose logits are carried from layer to layer, shared by ReViT, ReMViTv2 and ReSwin.

    S_l = Q_l K_l^T / sqrt(d)          R_1 = S_1        R_l = alpha S_l + (1 - alpha) R_(l-1)

Three exact ways to compute it: `residual_logits` for training and export, `residual_attention_` in place
for inference, and `History` with `blockwise_attention`, which never holds an N x N tensor because
R_l = sum_i w_i Q_i K_i^T needs only the queries and keys of the layers below. Last, the windows of ReSwin
and two ways to match their logits.

Diko et al., "ReViT", Pattern Recognition 2024, arXiv 2402.11301.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor, nn

from leanvit.errors import ConfigError

Alpha = float | Tensor
"""Weight of a layer's own logits in [0, 1]: a constant, or a learned tensor of shape (1,)."""

Grid = tuple[int, int]

AlphaMode = Literal["learned", "fixed", "per_layer", "none"]
"""One learned scalar, a constant, one learned per layer above the first, or no residual at all."""

AttentionMemory = Literal["auto", "quadratic", "linear"]
"""What is carried from layer to layer, see `HistoryModel.set_attention_memory`."""

MASKED = -1000.0
"""Added to hidden logits: low enough for a weight of exactly 0. The authors' -100 leads to denormal numbers, which
are several times slower to multiply."""

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
        own = torch.matmul(q * cast_like(alpha * scale, q), k.transpose(-2, -1))
        return torch.addcmul(own, previous, cast_like(1.0 - alpha, own))
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
    depth: layers that will come. In inference they share one allocation, because many blocks that stay, between
    scratch that goes, leave holes in the heap (110 MiB of 350 at 4,096 tokens).
    """

    queries: tuple[Tensor, ...] = ()
    keys: tuple[Tensor, ...] = ()
    weights: tuple[Alpha, ...] = ()
    depth: int = 0
    room: Tensor | None = None

    def extended(self, q: Tensor, k: Tensor, alpha: Alpha, scale: float) -> History:
        """The history with one more layer, q and k not yet scaled; the first layer counts fully."""
        own = alpha * scale if self.weights else scale
        below = tuple(weight * (1.0 - alpha) for weight in self.weights)
        room = self._room(q)
        if room is None:
            # Copies, because views would keep the packed q, k, v alive and with it a third more memory.
            q, k = q.contiguous(), k.contiguous()
        else:
            q, k = (space.copy_(t) for space, t in zip(room[len(self.weights)], (q, k), strict=True))
        return History((*self.queries, q), (*self.keys, k), (*below, own), self.depth, room)

    def _room(self, q: Tensor) -> Tensor | None:
        """Space for queries and keys of all layers, (depth, 2, B, heads, N, head_dim), in inference only."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or len(self.weights) >= self.depth:
            return None
        return self.room if self.room is not None else q.new_empty(self.depth, 2, *q.shape)

    def logits(self) -> Tensor:
        """All carried logits, (B, heads, N, N): for inspection, as this is what a history avoids."""
        return weighted_products(self.queries, torch.cat(self.keys, dim=-1), self.weights)


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
    attention = weighted_products(queries, keys, weights).softmax(dim=-1)
    return torch.matmul(F.dropout(attention, drop) if drop else attention, v)


def weighted_products(queries: tuple[Tensor, ...], keys: Tensor, weights: tuple[Alpha, ...]) -> Tensor:
    """sum_i w_i Q_i K_i^T as one product of concatenated heads: (..., Nq, Nk)."""
    scaled = [q * (cast_like(w, q) if isinstance(w, Tensor) else w) for q, w in zip(queries, weights, strict=True)]
    return torch.matmul(torch.cat(scaled, dim=-1), keys.transpose(-2, -1))


def cast_like(x: Tensor, like: Tensor) -> Tensor:
    """x in the dtype of `like`; the test keeps a no-op cast out of exported graphs."""
    return x if x.dtype == like.dtype else x.to(like.dtype)


class ResidualModel(nn.Module):
    """Holds the alpha of a model: learned in `self.alpha`, or constant in `constant_alphas`."""

    def _set_alpha(self, mode: AlphaMode | None, init: float, depth: int) -> None:
        """Raises ConfigError where the mode is unknown or `init` is outside [0, 1]."""
        mode = "none" if mode is None else mode
        if mode not in get_args(AlphaMode):
            raise ConfigError(f"alpha is {mode!r}, expected one of {get_args(AlphaMode)}")
        if not 0.0 <= init <= 1.0:
            raise ConfigError(f"alpha_init is {init}, expected a number in [0, 1]")
        self.alpha_mode: AlphaMode = mode
        self.constant_alphas = [init] * depth
        if mode in ("learned", "per_layer"):
            size = 1 if mode == "learned" else depth - 1
            self.alpha = nn.Parameter(torch.full((size,), init))

    def _alpha(self, index: int) -> Alpha:
        """Weight of the own logits of layer `index`; the first layer has no use for it."""
        if self.alpha_mode == "learned":
            return self.alpha
        if self.alpha_mode == "per_layer" and index > 0:
            return self.alpha[index - 1 : index]
        return self.constant_alphas[index]

    def _freeze_alpha(self) -> None:
        """Make a learned alpha the constant that it now is."""
        if self.alpha_mode in ("learned", "per_layer"):
            values = self.alpha.tolist()
            depth = len(self.constant_alphas)
            self.constant_alphas = values * depth if self.alpha_mode == "learned" else [1.0, *values]
            del self.alpha
            self.alpha_mode = "fixed"

    def _keep_alphas(self, depth: int) -> None:
        """Forget the alphas of layers above the first `depth`."""
        self.constant_alphas = self.constant_alphas[:depth]
        if self.alpha_mode == "per_layer":
            self.alpha = nn.Parameter(self.alpha.data[: depth - 1].clone())


class HistoryModel(ResidualModel):
    """One that can carry queries and keys instead of logits."""

    def set_attention_memory(self, mode: AttentionMemory) -> None:
        """Choose what is carried from layer to layer; the logits of the classes are the same.

        "quadratic": the logits, (B, heads, Nq, Nk). "linear": all queries and keys, from which each layer computes
        its logits again in blocks: memory O(N), at several times the time of attention. "auto": "linear" where no
        gradient is recorded and the logits of one image would be large (LINEAR_FROM_BYTES of the model's file).
        Compiled and exported graphs are always quadratic.
        Raises ConfigError where `mode` is another.
        """
        if mode not in get_args(AttentionMemory):
            raise ConfigError(f"attention_memory is {mode!r}, expected 'auto', 'quadratic' or 'linear'")
        self.attention_memory: AttentionMemory = mode

    def _is_linear(self, large: bool) -> bool:
        """Whether queries and keys are carried instead of logits, `large` or not."""
        automatic = self.attention_memory == "auto" and large and not torch.is_grad_enabled()
        written = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        return (self.attention_memory == "linear" or automatic) and not written


@contextmanager
def whole_logits(model: nn.Module) -> Iterator[None]:
    """Logits of ReViT and ReMViTv2 kept whole, where they would be computed in blocks; the setting comes back."""
    holders = [module for module in model.modules() if isinstance(module, HistoryModel)]
    before = [holder.attention_memory for holder in holders]
    try:
        for holder in holders:
            holder.set_attention_memory("quadratic")
        yield
    finally:
        for holder, was in zip(holders, before, strict=True):
            holder.set_attention_memory(was)


class Windows(NamedTuple):
    """Where the tokens of one kind of block stand, plain or shifted, on a grid padded to whole windows.

    order: raster index of every token in window order; inverse: window index of every token in raster order.
    step: index in the window order of the other kind, or None where both are the same. Each (tokens,).
    mask: (windows, 1, M^2, M^2) added to logits, or None where every token may see its whole window.
    source, known: for aligned residuals, where every pair stands in the logits of the other kind, flat, and
    whether it does; (windows, 1, M^2, M^2), or None.
    """

    order: Tensor
    inverse: Tensor
    step: Tensor | None
    mask: Tensor | None
    source: Tensor | None
    known: Tensor | None


def make_windows(grid: Grid, window: int, aligned: bool, device: torch.device) -> tuple[Windows, Windows]:
    """Plain and shifted windows of M x M tokens over `grid`, padded at the right and the bottom.

    A shift is cyclic; what it brings together is masked, and so is padding. An axis of one window has none.
    """
    shift = [window // 2 if side > window else 0 for side in grid]
    plain, plain_mask = _cut(grid, window, [0, 0], device)
    order, mask = _cut(grid, window, shift, device)
    inverse, plain_inverse = torch.argsort(order), torch.argsort(plain)
    here, there = plain_inverse[order], inverse[plain]
    pairs = [_pairs(step, window * window) if aligned else (None, None) for step in (there, here)]
    return (
        Windows(plain, plain_inverse, there if any(shift) else None, plain_mask, *pairs[0]),
        Windows(order, inverse, here if any(shift) else None, mask, *pairs[1]),
    )


def _cut(grid: Grid, window: int, shift: list[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Raster indices in window order, and the mask."""
    rows, columns = (-(-side // window) * window for side in grid)
    along_y, along_x = torch.arange(rows, device=device), torch.arange(columns, device=device)
    y, x = (along_y + shift[0]) % rows, (along_x + shift[1]) % columns
    order = _partition(y[:, None] * columns + x, window).flatten()
    if not any(shift) and (rows, columns) == grid:
        return order, None
    wrapped = (along_y >= rows - shift[0])[:, None] * 2 + (along_x >= columns - shift[1]).long()
    region = _partition(wrapped, window)
    padding = _partition((y >= grid[0])[:, None] | (x >= grid[1]), window)
    hidden = (region[:, :, None] != region[:, None, :]) | padding[:, None, :]
    return order, torch.zeros(hidden.shape, device=device).masked_fill(hidden, MASKED)[:, None]


def _pairs(step: Tensor, area: int) -> tuple[Tensor, Tensor]:
    """Flat index of every pair in (windows, M^2, M^2) of the other kind, and whether it shares a window there."""
    window, place = (step // area).reshape(-1, area), (step % area).reshape(-1, area)
    source = (window[:, :, None] * area + place[:, :, None]) * area + place[:, None, :]
    return source[:, None], (window[:, :, None] == window[:, None, :])[:, None]


def _partition(maps: Tensor, window: int) -> Tensor:
    """(rows, columns) to (windows, M^2)."""
    rows, columns = maps.shape
    cut = maps.reshape(rows // window, window, columns // window, window)
    return cut.transpose(1, 2).reshape(-1, window * window)


def match_by_index(previous: Tensor, windows: int, heads: int, area: int) -> Tensor:
    """Carried logits (B, windows', heads', M'^2, M'^2) as (B, windows, heads, M^2, M^2), the authors' way."""
    batch, count, below, old_area, _ = previous.shape
    if (count, below, old_area) == (windows, heads, area):
        return previous
    x = previous.reshape(batch, count * below, old_area, old_area)
    step, rest = divmod(count * below, windows * heads)
    if rest == 0 and old_area == area:
        x = x[:, ::step]
    else:
        x = F.interpolate(x[:, None], size=(windows * heads, area, area), mode="nearest")[:, 0]
    return x.reshape(batch, windows, heads, area, area)


def match_by_pair(previous: Tensor, source: Tensor) -> Tensor:
    """Carried logits (B, windows, heads, M^2, M^2) with every pair of tokens where `source` says, ours."""
    flat = previous.transpose(1, 2).flatten(2)
    return flat[:, :, source[:, 0]].transpose(1, 2)
