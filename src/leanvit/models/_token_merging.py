"""Token merging: what two tokens say alike is said once, so that the layers behind have fewer of them to compute.

The patches of a regular pattern are destinations, the others sources. In a block, between attention and MLP, each
source is paired with the destination whose key is most like its own (cosine); of all pairs the r most alike are merged:

    s = s_a + s_b,   x = (s_a x_a + s_b x_b) / s                 s: how many patches a token stands for, first 1
    softmax(q k^T / sqrt(d) + log s) v                          proportional attention: a token counts s times

r is a constant of the block, so that all shapes but the batch are static and the network exports; class tokens and
registers are never merged. Where the network reads more than those (an average over the tokens, pooling by attention),
every patch has its token returned to it before. Weights and their names stay as they are.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461,
sections 3 and 4. There the even tokens of each block are sources and the odd ones destinations: where quantization
lets one other token be merged, those behind it change sides and meet others from there on. Here a token keeps its side,
as in "Token Merging for Fast Stable Diffusion" (Bolya, Hoffman, 2023, arXiv 2303.17604), so that only this one differs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from leanvit.config.load import require_keep_tokens
from leanvit.errors import ConfigError, ShapeError

MERGED_AFTER = 3
"""Merging comes after a third of the blocks at the latest, and there where nothing says otherwise: later it saves too
little. vit_micro and deit_micro diverge less on 3,000 test images with all merged there than with the same share merged
in every block, which saves as much: at 0.8 of the tokens 0.0018 and 0.0022 (0.0049 and 0.0047), at 0.6 0.0138 and
0.0142 (0.0187 and 0.0156), at 0.5 0.046 and 0.052 (0.048 and 0.044). In the first block they diverge four times as
much."""


@dataclass(frozen=True)
class Layout:
    """What merging does to the work of a network of `depth` equal blocks, with `prefix` class tokens and registers
    before `tokens` patches of `dim` values.

    attention, mlp: weights of the linears of a block, each of which is a multiply-add for a token.
    """

    depth: int
    tokens: int
    prefix: int
    dim: int
    attention: int
    mlp: int

    def candidates(self, keep_tokens: float) -> list[tuple[int, ...]]:
        """How many tokens each block merges, where one of the first merges all. Raises ConfigError as `schedule`."""
        count = sum(schedule(keep_tokens, self.tokens, self.depth))
        return [in_one_block(block, count, self.depth) for block in range(self.depth // MERGED_AFTER + 1)]

    def macs(self, counts: Sequence[int]) -> int:
        """Multiply-adds of all blocks for one image; counts: how many tokens each merges, after its attention."""
        before = [self.prefix + self.tokens - gone for gone in itertools.accumulate(counts, initial=0)]
        return sum(
            self.attention * own + 2 * self.dim * own**2 + self.mlp * after for own, after in itertools.pairwise(before)
        )

    def saved(self, counts: Sequence[int]) -> float:
        """Share of the multiply-adds of the blocks that merging saves."""
        return 1 - self.macs(counts) / self.macs([0] * self.depth)


def layout_of(model: nn.Module) -> Layout:
    """The layout of a plain vision transformer of timm. Raises ConfigError where a network can't merge tokens."""
    blocks = _mergeable_blocks(model)
    attention, mlp = (
        sum(linear.weight.numel() for linear in part.modules() if isinstance(linear, nn.Linear))
        for part in (blocks[0].attn, blocks[0].mlp)
    )
    tokens, prefix = math.prod(model.patch_embed.grid_size), int(model.num_prefix_tokens)  # type: ignore
    return Layout(len(blocks), tokens, prefix, int(model.embed_dim), attention, mlp)  # type: ignore[arg-type]


def merge_tokens(model: nn.Module, keep_tokens: float | Sequence[int]) -> nn.Module:
    """Let a plain vision transformer of timm merge its tokens, in place; returns it.

    keep_tokens: share of the patch tokens that are left, in (0, 1], the others being merged in one block, after a third
    of them; or how many tokens each block merges, a number for each. 1.0 leaves the network as it is.
    Raises ConfigError where the network is of another kind, and where that many tokens can't be merged.
    Source: arXiv 2210.09461.
    """
    blocks = _mergeable_blocks(model)
    grid = tuple(model.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
    counts = schedule(keep_tokens, math.prod(grid), len(blocks))
    if any(counts):
        prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
        pattern = destinations(grid, sum(counts))
        model.blocks = MergingBlocks(blocks, counts, pattern, prefix, restore=not _reads_prefix_alone(model))
    return model


def destinations(grid: tuple[int, ...], merged: int) -> Tensor:
    """Which patches (rows * columns,) bool tokens are merged into: as many as leave `merged` others.

    Half of them as on a chessboard, a third along diagonals, or a quarter, one corner of four.
    Raises ConfigError where more than the others are to be merged.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    chessboard, diagonals = (rows + columns) % 2 == 1, (rows + columns) % 3 == 0
    corners = (rows % 2 == 0) & (columns % 2 == 0)
    for pattern in (chessboard, diagonals, corners):
        if int((~pattern).sum()) >= merged and bool(pattern.any()):
            return pattern.flatten()
    most, tokens = int((~corners).sum()), math.prod(grid)
    raise ConfigError(
        f"{merged} of {tokens} tokens are to be merged, at most {most} can be: give a keep_tokens of at least "
        f"{math.ceil(100 * (tokens - most) / tokens) / 100}."
    )


def schedule(keep_tokens: float | Sequence[int], tokens: int, depth: int) -> tuple[int, ...]:
    """How many tokens each of `depth` blocks merges, of `tokens` patches; see merge_tokens for keep_tokens.

    Raises ConfigError where a number is missing, negative or out of range.
    """
    if isinstance(keep_tokens, int | float):
        require_keep_tokens(keep_tokens)
        return in_one_block(depth // MERGED_AFTER, tokens - round(tokens * keep_tokens), depth)
    counts = tuple(keep_tokens)
    if len(counts) != depth or min(counts) < 0:
        raise ConfigError(f"keep_tokens is {list(counts)}, expected {depth} numbers from 0 up: one for each block")
    return counts


def in_one_block(block: int, count: int, depth: int) -> tuple[int, ...]:
    """How many tokens each of `depth` blocks merges where one of them merges all."""
    return tuple(count if index == block else 0 for index in range(depth))


def _mergeable_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a network that can merge; raises ConfigError that says why one can't."""
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{type(model).__name__} can't merge tokens, expected a plain vision transformer of timm: ViT, DeiT, DINO. "
            "Leave keep_tokens out."
        )
    if isinstance(model.blocks, MergingBlocks):
        raise ConfigError("the network merges tokens already. Leave keep_tokens out, or load it without them merged.")
    blocks = list(model.blocks)
    for index, block in enumerate(blocks):
        # By exact type: a subclass computes something else.
        kinds = type(block).__name__, type(getattr(block, "attn", None)).__name__
        plain = type(block) is Block and type(block.attn) is Attention
        # timm has gates from 1.0.28 on.
        gated = plain and getattr(block.attn, "gate", None) is not None
        if not plain or gated or not isinstance(block.attn.norm, nn.Identity):
            raise ConfigError(
                f"block {index} is {kinds[0]} with {kinds[1]}, expected timm's Block with plain Attention: "
                "it can't merge tokens. Leave keep_tokens out."
            )
    return blocks


def _reads_prefix_alone(model: Any) -> bool:
    """Whether the classifier reads class tokens and nothing else."""
    return bool(model.num_prefix_tokens) and model.attn_pool is None and model.global_pool == "token"


class State(NamedTuple):
    """What goes on from block to block beside the tokens (B, N, dim).

    size: patches that each token stands for, (B, N, 1), None where all are 1. places: which of the tokens behind the
    class tokens stands for each patch, (B, patches) int64, None where nobody asks.
    """

    size: Tensor | None
    places: Tensor | None


class ProportionalAttention(nn.Module):
    """timm's Attention (its parts, under their names), to which a token counts as often as it stands for a patch."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scale = attn.num_heads, attn.head_dim, attn.scale
        self.fused_attn = attn.fused_attn
        self.qkv, self.q_norm, self.k_norm, self.attn_drop = attn.qkv, attn.q_norm, attn.k_norm, attn.attn_drop
        self.proj, self.proj_drop = attn.proj, attn.proj_drop

    def forward(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, dim) with their sizes to (B, N, dim), and the keys (B, N, head_dim), averaged over heads."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        bias = None if size is None else size.log().transpose(1, 2)[:, None]
        if self.fused_attn:
            drop = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        else:
            logits = q * self.scale @ k.transpose(-2, -1)
            x = self.attn_drop((logits if bias is None else logits + bias).softmax(-1)) @ v
        return self.proj_drop(self.proj(x.transpose(1, 2).reshape(batch, tokens, -1))), k.mean(1)


class MergingBlock(nn.Module):
    """timm's Block (its parts, under their names), which merges `count` tokens between attention and MLP.

    prefix: class tokens and registers, which come first. sources: tokens behind them that may be merged.
    """

    def __init__(self, block: Block, count: int, prefix: int, sources: int) -> None:
        super().__init__()
        self.count, self.prefix, self.sources = count, prefix, sources
        self.norm1, self.attn = block.norm1, ProportionalAttention(block.attn)
        self.ls1, self.drop_path1 = block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Tokens (B, N, dim) to (B, N - count, dim). Raises ShapeError without the state that MergingBlocks gives."""
        if state is None:
            raise ShapeError(
                "blocks that merge tokens run only one after the other: intermediate features are not to be had. "
                "Leave keep_tokens out."
            )
        y, keys = self.attn(self.norm1(x), state.size)
        x = x + self.drop_path1(self.ls1(y))
        if self.count:
            size = torch.ones_like(x[..., :1]) if state.size is None else state.size
            pairs = Pairs(keys[:, self.prefix :], self.sources, self.count)
            x, size = pairs.merge(x, size, self.prefix)
            state = State(size, None if state.places is None else pairs.moved(state.places))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), state


class Pairs:
    """Which tokens are merged: of the pairs of a source and a destination the `count` that are most alike.

    keys: (B, N, D) of all tokens but class tokens, `sources` sources first. After merging the sources that are left
    come first, then the destinations as they were.
    """

    def __init__(self, keys: Tensor, sources: int, count: int) -> None:
        keys = F.normalize(keys, dim=-1)
        self.sources, self.into, self.count = sources, keys.shape[1] - sources, count
        likeness, self.partner = (keys[:, :sources] @ keys[:, sources:].transpose(1, 2)).max(-1)
        self.order = likeness.topk(sources, dim=-1).indices

    def merge(self, x: Tensor, size: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, prefix + N, dim) and sizes (B, prefix + N, 1) with the pairs merged, `count` fewer."""
        sums = torch.cat([x * size, size], dim=-1)
        first, sources, into = torch.split(sums, [prefix, self.sources, self.into], dim=1)
        merged, left = self.order[:, : self.count], self.order[:, self.count :]
        into = into.scatter_add(1, _rows(self.partner.gather(1, merged), into), sources.gather(1, _rows(merged, into)))
        sums = torch.cat([first, sources.gather(1, _rows(left, into)), into], dim=1)
        size = sums[..., -1:]
        return sums[..., :-1] / size, size

    def moved(self, places: Tensor) -> Tensor:
        """Where each patch is after merging; places: (B, patches) int64, where it was before, among the N tokens."""
        rank, left = self.order.argsort(-1), self.sources - self.count
        source = torch.where(rank < self.count, left + self.partner, rank - self.count)
        into = torch.arange(left, left + self.into, device=places.device).expand(places.shape[0], -1)
        return torch.cat([source, into], dim=1).gather(1, places)


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """An index of tokens (B, n) for gather and scatter on x (B, N, C)."""
    return index[..., None].expand(-1, -1, x.shape[-1])


class MergingBlocks(nn.Sequential):
    """The blocks of a network one after the other; takes and returns tokens (B, prefix + N, dim).

    counts: tokens that each block merges. pattern: (N,) bool, the patches that are destinations. restore: return a
    token for every patch, in the patches' order, instead of the fewer ones that are left.
    """

    order: Tensor

    def __init__(
        self, blocks: Sequence[Block], counts: Sequence[int], pattern: Tensor, prefix: int, *, restore: bool
    ) -> None:
        sources = int((~pattern).sum())
        left = [sources - before for before in itertools.accumulate(counts, initial=0)]
        super().__init__(*(MergingBlock(block, count, prefix, number)
                           for block, count, number in zip(blocks, counts, left[:-1], strict=True)))  # fmt: skip
        self.prefix, self.restore = prefix, restore
        # Sources first; both in the patches' order.
        self.register_buffer("order", pattern.int().argsort(stable=True), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """All blocks. Raises ShapeError where the image has another number of patches than the network."""
        tokens = len(self.order)
        if x.shape[1] != self.prefix + tokens:
            raise ShapeError(
                f"{x.shape[1] - self.prefix} patches, expected {tokens}: what is merged is counted for the "
                "network's own image size. Build it with --img-size, or resize the images."
            )
        places = self.order.argsort().expand(x.shape[0], -1) if self.restore else None
        x = torch.cat([x[:, : self.prefix], x[:, self.prefix :].index_select(1, self.order)], dim=1)
        state = State(None, places)
        for block in self:
            x, state = block(x, state)
        if state.places is None:
            return x
        return torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, _rows(state.places, x))], dim=1)
