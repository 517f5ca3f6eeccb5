"""Token merging: what two tokens say alike is said once, so that the layers behind have fewer of them to compute.

In a block, between attention and MLP, the patch tokens are split in turns into two sets A and B. Each token of A is
paired with the token of B whose key is most like its own (cosine); of all pairs the r most alike are merged:

    s = s_a + s_b,   x = (s_a x_a + s_b x_b) / s                 s: how many patches a token stands for, first 1
    softmax(q k^T / sqrt(d) + log s) v                          proportional attention: a token counts s times

r is a constant of the layer, so that all shapes but the batch are static and the network exports; class tokens and
registers are never merged. Where the network reads more than those (an average over the tokens, pooling by attention),
every patch has its token returned to it before. Weights and their names stay as they are.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman, "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461,
sections 3 and 4.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from leanvit.errors import ConfigError, ShapeError


def merge_tokens(model: nn.Module, keep_tokens: float | Sequence[int]) -> nn.Module:
    """Let a plain vision transformer of timm merge its tokens, in place; returns it.

    keep_tokens: share of the patch tokens that the last block still has, in (0, 1], each block before it merging the
    same share of what it has; or how many tokens each block merges, a number for each. 1.0 leaves the network as it is.
    Raises ConfigError where the network is of another kind, and where that many tokens can't be merged.
    Source: arXiv 2210.09461.
    """
    blocks = _mergeable_blocks(model)
    tokens = int(model.patch_embed.num_patches)  # type: ignore[union-attr, arg-type]
    counts = schedule(keep_tokens, tokens, len(blocks))
    prefix = int(model.num_prefix_tokens)  # type: ignore[arg-type]
    model.blocks = MergingBlocks(blocks, counts, tokens, prefix, restore=not _reads_prefix_alone(model))
    return model


def schedule(keep_tokens: float | Sequence[int], tokens: int, depth: int) -> tuple[int, ...]:
    """How many tokens each of `depth` blocks merges, of `tokens` patches; see merge_tokens for keep_tokens.

    Raises ConfigError where a block has fewer than twice as many left.
    """
    if isinstance(keep_tokens, int | float):
        if not 0 < keep_tokens <= 1:
            raise ConfigError(f"keep_tokens is {keep_tokens}, expected a share of the tokens in (0, 1]")
        steps = max(1, depth - 1)
        ends = [round(tokens * keep_tokens ** (index / steps)) for index in range(steps + 1)]
        counts = tuple(start - end for start, end in itertools.pairwise(ends)) + (0,) * (depth - steps)
    else:
        counts = tuple(keep_tokens)
        if len(counts) != depth or min(counts) < 0:
            raise ConfigError(f"keep_tokens is {list(counts)}, expected {depth} numbers from 0 up: one for each block")
    left = tokens
    for index, count in enumerate(counts):
        if 2 * count > left:
            raise ConfigError(
                f"block {index} is to merge {count} of {left} tokens, at most half of them can be. "
                "Give a larger keep_tokens, or fewer for this block."
            )
        left -= count
    return counts


def _mergeable_blocks(model: nn.Module) -> list[Block]:
    """The blocks of a network that can merge; raises ConfigError that says why one can't."""
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{type(model).__name__} can't merge tokens, expected a plain vision transformer of timm: ViT, DeiT, DINO. "
            "Leave keep_tokens out."
        )
    blocks = list(model.blocks)
    for index, block in enumerate(blocks):
        # By exact type: a subclass computes something else.
        kinds = type(block).__name__, type(getattr(block, "attn", None)).__name__
        plain = type(block) is Block and type(block.attn) is Attention
        if not plain or block.attn.gate is not None or not isinstance(block.attn.norm, nn.Identity):
            raise ConfigError(
                f"block {index} is {kinds[0]} with {kinds[1]}, expected timm's Block with plain Attention: "
                "it can't merge tokens. Leave keep_tokens out."
            )
    return blocks


def _reads_prefix_alone(model: Any) -> bool:
    """Whether the classifier reads class tokens and nothing else."""
    return bool(model.num_prefix_tokens) and model.attn_pool is None and model.global_pool == "token"


class MergingBlock(nn.Module):
    """timm's Block, which merges `count` tokens between attention and MLP; its parts keep their names and weights."""

    def __init__(self, block: Block, count: int, prefix: int) -> None:
        super().__init__()
        self.count, self.prefix = count, prefix
        self.norm1, self.attn, self.ls1, self.drop_path1 = block.norm1, block.attn, block.ls1, block.drop_path1
        self.norm2, self.mlp, self.ls2, self.drop_path2 = block.norm2, block.mlp, block.ls2, block.drop_path2

    def forward(self, x: Tensor) -> Tensor:
        """Refuses: a block alone does not know how many patches its tokens stand for."""
        raise ShapeError(
            "blocks that merge tokens run only one after the other: intermediate features are not to be had. "
            "Leave keep_tokens out."
        )

    def attend(self, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
        """Proportional attention on normalised tokens (B, N, dim); returns (B, N, dim) and the keys (B, N, head_dim).

        size: (B, N, 1) patches that each token stands for, None where all are 1. The keys are the mean over heads.
        """
        attn = self.attn
        batch, tokens, _ = x.shape
        qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = attn.q_norm(q), attn.k_norm(k)
        bias = None if size is None else size.log().transpose(1, 2)[:, None]
        drop = attn.attn_drop.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        y = attn.proj_drop(attn.proj(y.transpose(1, 2).reshape(batch, tokens, -1)))
        return y, k.mean(1)

    def run(self, x: Tensor, size: Tensor | None, places: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """One block: tokens (B, N, dim), their sizes (B, N, 1) and where each patch is in them (B, patches).

        Returns the same with `count` tokens fewer. places: None where nobody asks.
        """
        y, keys = self.attend(self.norm1(x), size)
        x = x + self.drop_path1(self.ls1(y))
        if self.count:
            size = torch.ones_like(x[..., :1]) if size is None else size
            pairs = Pairs(keys[:, self.prefix :], self.count)
            x, size = pairs.merge(x, size, self.prefix)
            places = None if places is None else pairs.moved(places)
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))), size, places


class Pairs:
    """Which tokens are merged: of the pairs of even and odd places the `count` that are most alike.

    keys: (B, N, D) of the tokens that may be merged. After merging the even tokens that are left come first, the one
    that is most like another before all, then the odd ones in their order.
    """

    def __init__(self, keys: Tensor, count: int) -> None:
        keys = F.normalize(keys, dim=-1)
        even, odd = keys[:, 0::2], keys[:, 1::2]
        self.count, self.odd = count, odd.shape[1]
        likeness, self.partner = (even @ odd.transpose(1, 2)).max(-1)
        self.order = likeness.topk(even.shape[1], dim=-1).indices

    def merge(self, x: Tensor, size: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, prefix + N, dim) and sizes (B, prefix + N, 1) with the pairs merged, `count` fewer."""
        sums = torch.cat([x * size, size], dim=-1)
        even, odd = sums[:, prefix::2], sums[:, prefix + 1 :: 2]
        merged, left = self.order[:, : self.count], self.order[:, self.count :]
        joined = odd.scatter_add(1, _rows(self.partner.gather(1, merged), odd), even.gather(1, _rows(merged, even)))
        sums = torch.cat([sums[:, :prefix], even.gather(1, _rows(left, even)), joined], dim=1)
        size = sums[..., -1:]
        return sums[..., :-1] / size, size

    def moved(self, places: Tensor) -> Tensor:
        """Where each patch is after merging; places: (B, patches) int64, where it was before, among the N tokens."""
        batch, evens = self.order.shape
        left = evens - self.count
        rank = self.order.argsort(-1)
        even = torch.where(rank < self.count, left + self.partner, rank - self.count)
        odd = torch.arange(left, left + self.odd, device=places.device).expand(batch, -1)
        # The table has the even tokens first.
        return torch.cat([even, odd], dim=1).gather(1, places // 2 + places % 2 * evens)


def _rows(index: Tensor, x: Tensor) -> Tensor:
    """An index of tokens (B, n) for gather and scatter on x (B, N, C)."""
    return index[..., None].expand(-1, -1, x.shape[-1])


class MergingBlocks(nn.Sequential):
    """The blocks of a network one after the other; takes and returns tokens (B, prefix + N, dim).

    counts: tokens that each block merges. tokens: N. restore: return a token for every patch, in the patches' order,
    instead of the fewer ones that are left.
    """

    def __init__(
        self, blocks: Sequence[Block], counts: Sequence[int], tokens: int, prefix: int, *, restore: bool
    ) -> None:
        super().__init__(*(MergingBlock(block, count, prefix) for block, count in zip(blocks, counts, strict=True)))
        self.tokens, self.prefix, self.restore = tokens, prefix, restore

    def forward(self, x: Tensor) -> Tensor:
        """All blocks. Raises ShapeError where the image has another number of patches than the network."""
        if x.shape[1] != self.prefix + self.tokens:
            raise ShapeError(
                f"{x.shape[1] - self.prefix} patches, expected {self.tokens}: what is merged is counted for the "
                "network's own image size. Build it with --img-size, or resize the images."
            )
        size, places = None, None
        if self.restore:
            places = torch.arange(self.tokens, device=x.device).expand(x.shape[0], -1)
        for block in cast("list[MergingBlock]", list(self)):
            x, size, places = block.run(x, size, places)
        if places is None:
            return x
        patches = x[:, self.prefix :].gather(1, _rows(places, x))
        return torch.cat([x[:, : self.prefix], patches], dim=1)
