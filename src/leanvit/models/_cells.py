"""Cells that ViTAE and ViTAEv2 are built of; `_cellnet` has the network around them.

A *reduction cell* shrinks a map and turns it into tokens; a *normal cell* keeps their number. Both run a
convolution branch (PCM) beside attention, so that locality need not be learned; a reduction cell sees its
input through several dilations at once (PRM), so that scale need not be learned either:

    reduction:  t = PRM(x)    y = attention(LN(t)) + PCM(x)    out = y + MLP(LN(y))
    normal:     y = x + attention(LN(x)) + PCM(x)              out = y + MLP(LN(y))

Everything passes tokens (B, N, dim) and their grid (H, W). Row-major tokens *are* a channels-last map, so
`as_map` and `as_tokens` are free and the convolutions read and write tokens in place of copies.

Xu et al., "ViTAE", NeurIPS 2021, arXiv 2106.03348; Zhang et al., "ViTAEv2", IJCV 2023, arXiv 2202.10108.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, use_fused_attn
from timm.models import checkpoint
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from leanvit.errors import ConfigError

Grid = tuple[int, int]

CACHE_TOKENS = 4096
"""Tokens worked on at a time in inference on CPU: about what keeps the widest features in the cache."""

CACHE_BYTES = 8 << 20
"""Widest features worked on at a time there: larger scratch misses the cache and is mapped anew in every call."""

MIN_ROWS = 8
"""Input rows of a band of convolutions at least: each band computes the rows at its edges again."""

MANY_TOKENS = 512
"""Tokens from which full attention pays for a copy of queries, keys and values that brings heads together."""

REDUCTION_EPS = 1e-5
NORMAL_EPS = 1e-6
PCM_STRIDES = {2: (2, 1, 1), 4: (2, 2, 1)}
"""Strides of the three convolutions in a reduction cell, by its ratio."""


def as_map(tokens: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, H W, C) as a map (B, C, H, W) in channels-last layout; a view."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, *grid)


def as_tokens(image: Tensor) -> Tensor:
    """A map (B, C, H, W) as row-major tokens (B, H W, C); a view where the map is channels-last."""
    return image.flatten(2).transpose(1, 2)


def is_eager_inference() -> bool:
    """Whether nothing is recorded or traced, so that work may be cut in pieces and done in place."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def in_pieces(function: Callable[[Tensor], Tensor], x: Tensor, limit: int) -> Tensor:
    """function(x) where each row along the first dimension stands alone, `limit` rows at a time.

    Inference on CPU only: there a piece that fits the cache is faster, and memory does not grow with x.
    """
    # Asked first: an exported graph must not depend on how many rows there are.
    if not is_eager_inference() or x.device.type != "cpu" or x.shape[0] <= limit:
        return function(x)
    return torch.cat([function(x[start : start + limit]) for start in range(0, x.shape[0], max(1, limit))])


class PyramidReduction(nn.Module):
    """PRM: the same strided convolution with several dilations side by side, GELU, concatenated.

    Every dilation returns a map of ceil(H / ratio) x ceil(W / ratio) where `ratio` divides H and W.
    """

    def __init__(
        self, in_chans: int, embed_dim: int, *, kernel_size: int, ratio: int, dilations: Sequence[int]
    ) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(
                in_chans,
                embed_dim,
                kernel_size,
                stride=ratio,
                padding=math.ceil(((kernel_size - 1) * dilation + 1 - ratio) / 2),
                dilation=dilation,
            )
            for dilation in dilations
        )

    def forward(self, image: Tensor) -> tuple[Tensor, Grid]:
        """Map (B, C, H, W) to tokens (B, N, embed_dim * dilations), dilation-major, and their grid."""
        out = torch.cat([F.gelu(conv(image)) for conv in self.convs], dim=1)
        return as_tokens(out), (out.shape[2], out.shape[3])


class ParallelConv(nn.Module):
    """PCM: 3x3 convolutions beside attention, SiLU between them.

    dims: channels before and after each convolution. norms: which convolutions a BatchNorm follows.
    final_act: SiLU after the last convolution too.
    """

    def __init__(
        self,
        dims: Sequence[int],
        *,
        groups: int,
        norms: Sequence[bool],
        strides: Sequence[int] | None = None,
        final_act: bool = False,
    ) -> None:
        super().__init__()
        steps = list(pairwise(dims))
        strides = strides or [1] * len(steps)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, groups=groups)
            for (before, after), stride in zip(steps, strides, strict=True)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(after) if norm else nn.Identity() for (_, after), norm in zip(steps, norms, strict=True)
        )
        self.final_act = final_act

    def forward(self, image: Tensor) -> Tensor:
        """Map (B, C, H, W) to tokens (B, N, dims[-1])."""
        # Asked first: an exported graph must not depend on the size.
        if not self.training and is_eager_inference() and image.device.type == "cpu":
            rows = self._rows_in_cache(image)
            if rows < image.shape[2]:
                return self._in_bands(image, rows)
        last = len(self.convs) - 1
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            image = norm(conv(image))
            if index < last or self.final_act:
                image = F.silu(image, inplace=is_eager_inference())
        return as_tokens(image)

    def _rows_in_cache(self, image: Tensor) -> int:
        """Input rows whose widest features stay in the cache."""
        width = max(_conv(conv).out_channels for conv in self.convs)
        row_bytes = image.shape[0] * width * image.shape[3] * image.element_size()
        return max(MIN_ROWS, CACHE_BYTES // row_bytes)

    def _in_bands(self, image: Tensor, rows: int) -> Tensor:
        """Map to tokens, about `rows` input rows at a time; exact, as each band reads its neighbours' edges."""
        heights = [image.shape[2]]
        for conv in self.convs:
            heights.append((heights[-1] - 1) // _conv(conv).stride[0] + 1)
        step = max(1, rows * heights[-1] // heights[0])
        bands = [
            self._band(image, start, min(start + step, heights[-1]), heights) for start in range(0, heights[-1], step)
        ]
        return torch.cat([as_tokens(band) for band in bands], dim=1)

    def _band(self, image: Tensor, start: int, stop: int, heights: Sequence[int]) -> Tensor:
        """Output rows `start` to `stop` alone; heights: rows of the input and of every convolution's output."""
        padding = []
        for conv, height in zip(reversed(self.convs), reversed(heights[:-1]), strict=True):
            stride = _conv(conv).stride[0]
            low, high = start * stride - 1, (stop - 1) * stride + 2
            start, stop = max(low, 0), min(high, height)
            padding.append((start - low, high - stop))
        image = image[:, :, start:stop]
        last = len(self.convs) - 1
        for index, (module, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            conv, (top, bottom) = _conv(module), padding[last - index]
            image = F.pad(image, (0, 0, top, bottom)) if top or bottom else image
            image = norm(F.conv2d(image, conv.weight, conv.bias, conv.stride, (0, 1), groups=conv.groups))
            if index < last or self.final_act:
                image = F.silu(image, inplace=True)
        return image

    def fuse_(self) -> None:
        """Fold every BatchNorm, as it is in eval mode, into the convolution before it."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                self.convs[index] = fuse_conv_bn_eval(conv.eval(), norm.eval())
                self.norms[index] = nn.Identity()


def _conv(module: nn.Module) -> nn.Conv2d:
    """The convolution that an element of a ModuleList is, for the type checker."""
    return cast(nn.Conv2d, module)


class Attention(nn.Module):
    """Multi-head self-attention that may change the width.

    dim: width in; out_dim: width out, that of q, k and v too.
    value_skip: add v to the result, as residual where the width changes.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        value_skip: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if out_dim % num_heads:
            raise ConfigError(f"token width {out_dim} is not a multiple of num_heads {num_heads}")
        self.num_heads = num_heads
        self.head_dim = out_dim // num_heads
        self.scale = self.head_dim**-0.5
        self.value_skip = value_skip
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, out_dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(out_dim, out_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """softmax(q k^T scale + bias) v: (B, heads, N, head_dim) each, to (B, N, heads head_dim)."""
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop, scale=self.scale)
        else:
            logits = torch.matmul(q * self.scale, k.transpose(-2, -1))
            logits = logits if bias is None else logits + bias
            out = torch.matmul(self.attn_drop(logits.softmax(dim=-1)), v)
        return out.transpose(1, 2).flatten(2)

    def logit_bias(self, batch: int) -> Tensor | None:
        """What is added to the logits, (batch, heads, N, N), or None."""
        return None

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, dim) to (B, N, out_dim); `grid` plays no part in full attention."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        # The fused kernel reads its keys again for every block of queries.
        q, k, v = (qkv.contiguous() if tokens >= MANY_TOKENS else qkv).unbind(0)
        out = self.proj_drop(self.proj(self.attend(q, k, v, self.logit_bias(batch))))
        return v.transpose(1, 2).flatten(2) + out if self.value_skip else out


class Cell(nn.Module):
    """A part of the network that gradient checkpointing computes again in the backward pass."""

    grad_checkpointing = False
    norm2: nn.Module
    mlp: nn.Module
    mlp_width: int

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens (B, N, dim) and their grid to those after the cell."""
        if self.grad_checkpointing and self.training:
            out: tuple[Tensor, Grid] = checkpoint(self.compute, x, grid)
            return out
        return self.compute(x, grid)

    def compute(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """What the cell does."""
        raise NotImplementedError

    def add_mlp(self, y: Tensor, drop_path: nn.Module) -> Tensor:
        """y + MLP(LN(y)) of tokens (B, N, dim); y is the caller's own and may be overwritten."""
        if self.training or y.device.type != "cpu" or not is_eager_inference():
            return y + drop_path(self.mlp(self.norm2(y)))
        limit = min(CACHE_TOKENS, max(1, CACHE_BYTES // (self.mlp_width * y.element_size())))
        for images in torch.split(y, max(1, limit // y.shape[1])):
            for part in torch.split(images, limit, dim=1):
                part += self.mlp(self.norm2(part))
        return y


class ReductionCell(Cell):
    """PRM, then attention beside a PCM and an MLP: from one scale to the next.

    attention: module that takes tokens (B, N, embed_dim * dilations) and their grid to (B, N, token_dim);
        None leaves the PRM alone ("performer_less").
    pcm_norms: which convolutions of the PCM a BatchNorm follows. mlp_drop: after the GELU, at the end.
    Raises ConfigError where `ratio` is neither 2 nor 4.
    """

    def __init__(
        self,
        in_chans: int,
        embed_dim: int,
        token_dim: int,
        *,
        attention: nn.Module | None,
        ratio: int,
        kernel_size: int,
        dilations: Sequence[int],
        groups: int = 1,
        pcm_norms: tuple[bool, bool, bool] = (True, True, False),
        pcm_final_act: bool = False,
        mlp_drop: tuple[float, float] = (0.0, 0.0),
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if ratio not in PCM_STRIDES:
            raise ConfigError(f"downsampling ratio is {ratio}, expected one of {sorted(PCM_STRIDES)}")
        width = embed_dim * len(dilations)
        if attention is None and width != token_dim:
            raise ConfigError(
                f"token width is {token_dim}, expected {width} (embed_dims x dilations): "
                "a reduction cell without attention does not change it"
            )
        self.ratio = ratio
        self.prm = PyramidReduction(in_chans, embed_dim, kernel_size=kernel_size, ratio=ratio, dilations=dilations)
        self.attn = attention
        if attention is not None:
            self.norm1 = nn.LayerNorm(width, eps=REDUCTION_EPS)
            self.pcm = ParallelConv(
                (in_chans, embed_dim, embed_dim, token_dim),
                groups=groups,
                norms=pcm_norms,
                strides=PCM_STRIDES[ratio],
                final_act=pcm_final_act,
            )
            self.norm2 = nn.LayerNorm(token_dim, eps=REDUCTION_EPS)
            self.mlp = Mlp(token_dim, token_dim, drop=mlp_drop)
            self.mlp_width = token_dim
            self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def compute(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens (B, H W, in_chans) to (B, ceil(H / ratio) ceil(W / ratio), token_dim), and their grid.

        A map that `ratio` does not divide is padded with zeros below and to the right.
        """
        image = as_map(x, grid)
        down, right = -grid[0] % self.ratio, -grid[1] % self.ratio
        if down or right:
            image = F.pad(image, (0, right, 0, down))
        x, grid = self.prm(image)
        if self.attn is None:
            return x, grid
        x = self.attn(self.norm1(x), grid) + self.drop_path(self.pcm(image))
        return self.add_mlp(x, self.drop_path), grid


class NormalCell(Cell):
    """Attention beside a PCM, then an MLP; the number of tokens stays.

    attention: module that takes tokens (B, N, dim) and their grid to (B, N, dim).
    shallow: a PCM of two convolutions, without a last SiLU. prefix: class tokens, which the PCM leaves out.
    """

    def __init__(
        self,
        dim: int,
        *,
        attention: nn.Module,
        mlp_ratio: float,
        groups: int,
        pcm_final_act: bool = False,
        shallow: bool = False,
        prefix: int = 0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.prefix = prefix
        self.norm1 = nn.LayerNorm(dim, eps=NORMAL_EPS)
        self.attn = attention
        self.pcm = ParallelConv(
            (dim, hidden, dim) if shallow else (dim, hidden, dim, dim),
            groups=groups,
            norms=(True, False) if shallow else (True, True, False),
            final_act=pcm_final_act and not shallow,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=NORMAL_EPS)
        self.mlp = Mlp(dim, hidden, drop=proj_drop)
        self.mlp_width = hidden
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def compute(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens (B, prefix + H W, dim) to tokens of the same shape; the PCM reads them un-normalised."""
        local = self.drop_path1(self.pcm(as_map(x[:, self.prefix :], grid)))
        local = F.pad(local, (0, 0, self.prefix, 0)) if self.prefix else local
        y = x + local
        del local
        y = y + self.drop_path1(self.attn(self.norm1(x), grid))
        return self.add_mlp(y, self.drop_path2), grid


class Stage(nn.Module):
    """A reduction cell and the normal cells after it."""

    def __init__(self, reduction: ReductionCell, blocks: Sequence[Cell]) -> None:
        super().__init__()
        self.reduction = reduction
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """Tokens and grid of the stage before to those of this one."""
        ratio = self.reduction.ratio
        rows, columns = -(-grid[0] // ratio), -(-grid[1] // ratio)

        def run(images: Tensor) -> Tensor:
            out, out_grid = self.reduction(images, grid)
            for cell in self.blocks:
                out, out_grid = cell(out, out_grid)
            return out

        # In training mode BatchNorm looks at the whole batch.
        x = run(x) if self.training else in_pieces(run, x, max(1, CACHE_TOKENS // (rows * columns)))
        return x, (rows, columns)
