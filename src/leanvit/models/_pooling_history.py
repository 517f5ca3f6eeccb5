"""ReMViTv2's carried logits as the queries and keys that they are made of: exact, and no Nq x Nk tensor exists.

All that happens to carried logits between layers is linear in them and leaves the axes of queries and keys apart:
a mean over heads, pooling or repeating along the grid of queries, and along that of keys. So it may be done to the
queries and the keys of every layer below instead. Relative positions depend on a query and one axis of the keys, and
are carried as two tensors, for rows and for columns:

    R_l[q, k] = sum_i w_i Q_i[q] . K_i[k] + V[q, k_row] + H[q, k_column]

Memory grows as N (rows + columns of keys) instead of N^2 / 16; the price is that products of all layers below are made
again in each. Diko et al., arXiv 2402.11301; the form is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.models import checkpoint
from torch import Tensor

from leanvit.models._attention import BLOCK_BYTES, Alpha, Grid, cast_like, weighted_products


def resize_maps(x: Tensor, size: Grid) -> Tensor:
    """Maps (B, C, H, W) to `size`: averaged over whole cells where it is smaller, repeated where it is larger.

    A last incomplete cell averages what it has.
    """
    rows, columns = (max(1, -(-old // new)) for old, new in zip(x.shape[-2:], size, strict=True))
    if (rows, columns) != (1, 1):
        x = F.avg_pool2d(x, (rows, columns), ceil_mode=True)
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="nearest")


def resize_tokens(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Tokens (B, heads, N, C) on `grid` to another grid, as `resize_maps` does."""
    if grid == size:
        return x
    batch, heads, _, channels = x.shape
    # Channels-last maps: no copy is made.
    maps = x.reshape(batch * heads, *grid, channels).permute(0, 3, 1, 2)
    return resize_maps(maps, size).permute(0, 2, 3, 1).reshape(batch, heads, -1, channels)


class Term(NamedTuple):
    """One layer's share of the logits: weight * q k^T; q (B, heads or 1, Nq, D), k (B, heads or 1, Nk, D)."""

    q: Tensor
    k: Tensor
    weight: Alpha


class Positions(NamedTuple):
    """Relative positions, for the rows and for the columns of the keys: (B, heads or 1, Nq, rows), and columns."""

    vertical: Tensor
    horizontal: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Positions:
        """Both, changed."""
        return Positions(change(self.vertical), change(self.horizontal))


def add_positions(logits: Tensor, positions: Positions, k_grid: Grid) -> Tensor:
    """logits (B, heads, Nq, Nk) + E, in place where no graph is made of it."""
    pairs = logits.view(*logits.shape[:-1], *k_grid)
    vertical, horizontal = positions.vertical.unsqueeze(-1), positions.horizontal.unsqueeze(-2)
    if torch.compiler.is_compiling():
        return (pairs + vertical + horizontal).flatten(-2)
    pairs += vertical
    pairs += horizontal
    return logits


class PoolingHistory(NamedTuple):
    """Everything that carried logits (B, heads, Nq, Nk) are made of; without terms, what the first layer finds."""

    heads: int = 1
    q_grid: Grid = (0, 0)
    k_grid: Grid = (0, 0)
    terms: tuple[Term, ...] = ()
    positions: Positions | None = None

    def resized(self, heads: int, q_grid: Grid, k_grid: Grid) -> PoolingHistory:
        """The history whose logits are these, brought to the shape of another layer as `resize_logits` does."""
        terms, positions = self.terms, self.positions
        if positions is None:
            return PoolingHistory(heads, q_grid, k_grid)
        if heads != self.heads:
            terms = tuple(_mean_over_heads(term) for term in terms)
            positions = positions.each(lambda x: x.mean(dim=1, keepdim=True))
        terms = tuple(
            Term(
                resize_tokens(term.q, self.q_grid, q_grid),
                resize_tokens(term.k, self.k_grid, k_grid),
                term.weight,
            )
            for term in terms
        )
        positions = positions.each(lambda x: resize_tokens(x, self.q_grid, q_grid))
        positions = Positions(
            _resize_last(positions.vertical, k_grid[0]), _resize_last(positions.horizontal, k_grid[1])
        )  # fmt: skip
        return PoolingHistory(heads, q_grid, k_grid, terms, positions)

    def extended(self, q: Tensor, k: Tensor, alpha: Alpha, scale: float, own: Positions) -> PoolingHistory:
        """The history of the same shape with one more layer, q and k not yet scaled; the first layer counts fully."""
        # Copies, because views would keep the packed q, k, v alive.
        q, k = q.contiguous(), k.contiguous()
        if self.positions is None:
            return self._replace(terms=(Term(q, k, scale),), positions=own)
        below = tuple(term._replace(weight=term.weight * (1.0 - alpha)) for term in self.terms)
        kept = cast_like(1.0 - alpha, q) if isinstance(alpha, Tensor) else 1.0 - alpha
        positions = Positions(*(new + old * kept for new, old in zip(own, self.positions, strict=True)))
        return self._replace(terms=(*below, Term(q, k, alpha * scale)), positions=positions)

    def logits(self) -> Tensor:
        """All carried logits, (B, heads, Nq, Nk): for inspection, as this is what a history avoids."""
        return _block_logits(self, self._keys(), slice(None))

    def attend(self, v: Tensor) -> Tensor:
        """softmax(R) V, exact, over blocks of queries; v: (B, heads, Nk, head_dim). Returns (B, heads, Nq, head_dim).

        In training each block is computed again in the backward pass.
        """
        batch, heads, keys, dim = v.shape
        queries = self.q_grid[0] * self.q_grid[1]
        rows = max(16, BLOCK_BYTES // (batch * heads * keys * v.element_size()))
        own_keys, recompute = self._keys(), torch.is_grad_enabled()
        # Blocks go straight to their place: small results left between large scratch fragment the heap.
        out = v.new_empty(batch, heads, queries, dim)
        for start in range(0, queries, rows):
            block = slice(start, start + rows)
            arguments = (self, own_keys, block, v)
            out[:, :, block] = checkpoint(_attend, *arguments) if recompute else _attend(*arguments)
        return out

    def _keys(self) -> dict[int, Tensor]:
        """Keys of the terms with as many heads one beside the other: one product for all of them."""
        # Plain numbers: under torch.jit.trace sizes are tensors, of which equal ones are two in a set.
        counts = sorted({int(term.k.shape[1]) for term in self.terms})
        return {n: torch.cat([t.k for t in self.terms if t.k.shape[1] == n], dim=-1) for n in counts}


def _mean_over_heads(term: Term) -> Term:
    """One head whose product is the mean of those of all."""
    heads = term.q.shape[1]
    if heads == 1:
        return term
    q, k = (x.transpose(1, 2).flatten(2).unsqueeze(1) for x in (term.q, term.k))
    return Term(q, k, term.weight / heads)


def _resize_last(x: Tensor, size: int) -> Tensor:
    """The last axis of (B, heads, Nq, n) to `size`."""
    if x.shape[-1] == size:
        return x
    flat = x.reshape(-1, 1, x.shape[-1], 1)
    return resize_maps(flat, (size, 1)).reshape(*x.shape[:-1], size)


def _block_logits(history: PoolingHistory, keys: dict[int, Tensor], block: slice) -> Tensor:
    """Carried logits of some queries: (B, heads, n, Nk)."""
    if history.positions is None:
        raise ValueError("a history without layers has no logits")
    total, *others = (_product(history.terms, key, block) for key in keys.values())
    for product in others:
        total = total + product
    return add_positions(total, history.positions.each(lambda x: x[:, :, block]), history.k_grid)


def _product(terms: tuple[Term, ...], keys: Tensor, block: slice) -> Tensor:
    """Sum of the products of all terms with as many heads as `keys` have."""
    fitting = [term for term in terms if term.q.shape[1] == keys.shape[1]]
    queries = tuple(term.q[:, :, block] for term in fitting)
    return weighted_products(queries, keys, tuple(term.weight for term in fitting))


def _attend(history: PoolingHistory, keys: dict[int, Tensor], block: slice, v: Tensor) -> Tensor:
    return torch.matmul(_block_logits(history, keys, block).softmax(dim=-1), v)
