"""Attention of ReMViTv2: pooled queries, keys and values, and logits carried between layers of unlike shape.

A layer mixes its own logits with those of the layer below, brought to its shape (`resize_logits`), and adds the
decomposed relative position of MViTv2; the equations are in `remvit`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit.models._attention import Alpha, Grid, residual_logits
from leanvit.models._pooling_history import PoolingHistory, Positions, add_positions, resize_maps, resize_tokens


class Carried(NamedTuple):
    """Softmax input (B, heads, Nq, Nk) that a layer passes on, and the grids of its queries and keys."""

    logits: Tensor
    q_grid: Grid
    k_grid: Grid


Below = Carried | PoolingHistory | None
"""What a layer finds below it; None in the first."""


def resize_logits(carried: Carried, heads: int, q_grid: Grid, k_grid: Grid) -> Tensor:
    """Carried logits as (B, heads or 1, Nq, Nk) of another layer.

    Another number of heads: their mean, one head for all. Smaller grids: average pooling by the whole
    number of old cells per new one (a last incomplete cell averages what it has). Larger grids: nearest.
    """
    x = carried.logits
    if x.shape[1] != heads:
        x = x.mean(dim=1, keepdim=True)
    batch, kept = x.shape[:2]
    x = resize_tokens(x, carried.q_grid, q_grid)
    if carried.k_grid != k_grid:
        maps = x.reshape(batch * kept, -1, *carried.k_grid)
        x = resize_maps(maps, k_grid).reshape(batch, kept, x.shape[2], -1)
    return x


def relative_index(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Row of a relative position table for every (query, key) pair along one axis: (queries, keys), int64.

    Where the two differ in number, positions are spread over the larger grid (MViTv2).
    """
    q_step, k_step = max(keys / queries, 1.0), max(queries / keys, 1.0)
    q = torch.arange(queries, device=device)[:, None] * q_step
    k = torch.arange(keys, device=device)[None, :] * k_step
    return (q - k + (keys - 1) * k_step).long()


class PoolingAttention(nn.Module):
    """Attention over pooled queries, keys and values, with residual logits and residual pooling."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        num_heads: int,
        grid: Grid,
        q_stride: int,
        kv_stride: int,
        qkv_bias: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim_out // num_heads
        self.scale = self.head_dim**-0.5
        self.residual = residual
        self.qkv = nn.Linear(dim, dim_out * 3, bias=qkv_bias)
        self.pool_q, self.norm_q = self._pooling(q_stride)
        self.pool_k, self.norm_k = self._pooling(kv_stride)
        self.pool_v, self.norm_v = self._pooling(kv_stride)
        self.proj = nn.Linear(dim_out, dim_out)
        self.rel_pos_h = nn.Parameter(torch.zeros(1, self.head_dim))
        self.rel_pos_w = nn.Parameter(torch.zeros(1, self.head_dim))
        self.index_h: Tensor
        self.index_w: Tensor
        self.set_grid(grid)

    def _pooling(self, stride: int) -> tuple[nn.Conv2d, nn.LayerNorm]:
        dim = self.head_dim
        conv = nn.Conv2d(dim, dim, 3, stride, 1, groups=dim, bias=False)
        return conv, nn.LayerNorm(dim, eps=1e-6)

    def _pool(self, x: Tensor, grid: Grid, conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Grid]:
        """(B, heads, N, head_dim) on `grid` to the pooled tokens and their grid; channels-last throughout."""
        maps = x.reshape(-1, *grid, self.head_dim).permute(0, 3, 1, 2)
        maps = conv(maps).permute(0, 2, 3, 1)
        pooled = (maps.shape[1], maps.shape[2])
        return norm(maps).reshape(-1, self.num_heads, pooled[0] * pooled[1], self.head_dim), pooled

    def forward(self, x: Tensor, grid: Grid, previous: Below, alpha: Alpha) -> tuple[Tensor, Grid, Below]:
        """x: (B, N, dim) on `grid`; previous: logits of the layer below, a history of them, or None in the first layer.

        Returns (B, Nq, dim_out), its grid, and what the next layer is given.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        q, q_grid = self._pool(q, grid, self.pool_q, self.norm_q)
        k, k_grid = self._pool(k, grid, self.pool_k, self.norm_k)
        v, _ = self._pool(v, grid, self.pool_v, self.norm_v)
        positions = self._positions(q, q_grid, k_grid)
        carried: Below
        if isinstance(previous, PoolingHistory):
            below = previous if self.residual else PoolingHistory()
            carried = below.resized(self.num_heads, q_grid, k_grid).extended(q, k, alpha, self.scale, positions)
            x = carried.attend(v) + q
        else:
            known = previous if self.residual else None
            resized = None if known is None else resize_logits(known, self.num_heads, q_grid, k_grid)
            logits = residual_logits(q, k, resized, alpha, self.scale)
            carried = Carried(add_positions(logits, positions, k_grid), q_grid, k_grid)
            x = torch.matmul(carried.logits.softmax(dim=-1), v) + q
        return self.proj(x.transpose(1, 2).flatten(2)), q_grid, carried

    def _positions(self, q: Tensor, q_grid: Grid, k_grid: Grid) -> Positions:
        """Relative position of every row and column of keys as seen by each (unscaled) query."""
        by_row = q.reshape(-1, self.num_heads, *q_grid, self.head_dim)
        rows = self._table(self.rel_pos_h, self.index_h, q_grid[0], k_grid[0])
        columns = self._table(self.rel_pos_w, self.index_w, q_grid[1], k_grid[1])
        vertical = torch.matmul(by_row, rows.transpose(-2, -1))
        horizontal = torch.matmul(by_row.transpose(2, 3), columns.transpose(-2, -1)).transpose(2, 3)
        return Positions(vertical.flatten(2, 3), horizontal.flatten(2, 3))

    def _table(self, table: Tensor, index: Tensor, queries: int, keys: int) -> Tensor:
        """Relative positions along one axis: (queries, keys, head_dim)."""
        if index.shape == (queries, keys):
            return table[index]
        length = 2 * max(queries, keys) - 1
        table = table if table.shape[0] == length else _stretch(table, length)
        return table[relative_index(queries, keys, table.device)]

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> Grid:
        """Make `grid` of tokens the default one and resample the tables to it; returns the grid of queries."""
        q_stride, kv_stride = self.pool_q.stride[0], self.pool_k.stride[0]
        for axis, side in zip("hw", grid, strict=True):
            queries, keys = -(-side // q_stride), -(-side // kv_stride)
            table: nn.Parameter = getattr(self, f"rel_pos_{axis}")
            stretched = _stretch(table, 2 * max(queries, keys) - 1)
            setattr(self, f"rel_pos_{axis}", nn.Parameter(stretched, requires_grad=table.requires_grad))
            index = relative_index(queries, keys, table.device)
            self.register_buffer(f"index_{axis}", index, persistent=False)
        return -(-grid[0] // q_stride), -(-grid[1] // q_stride)


def _stretch(table: Tensor, length: int) -> Tensor:
    """A relative position table (rows, head_dim) resampled to `length` rows."""
    return F.interpolate(table.float().t()[None], size=length, mode="linear")[0].t().to(table.dtype)
