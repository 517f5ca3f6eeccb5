"""MobileViT-S as the authors of ExMobileViT built it: what `exmobilevit` takes its maps from.

Inverted residuals (MV2) alternate with blocks that run a small transformer over the map: the pixels at one
position of all 2x2 patches form a sequence. Mehta, Rastegari: MobileViT, arXiv 2110.02178.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, ConvNormAct, DropPath, Mlp, trunc_normal_
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from leanvit.errors import ConfigError


class InvertedResidual(nn.Module):
    """MV2: widen with a 1x1 convolution, filter each channel, narrow; identity where the shape allows it."""

    def __init__(self, in_width: int, width: int, stride: int, expansion: int = 4) -> None:
        super().__init__()
        hidden = in_width * expansion
        self.expand = ConvNormAct(in_width, hidden, 1, act_layer=nn.SiLU)
        self.depthwise = ConvNormAct(hidden, hidden, 3, stride=stride, groups=hidden, act_layer=nn.SiLU)
        self.project = ConvNormAct(hidden, width, 1, apply_act=False)
        self.residual = stride == 1 and in_width == width

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class TransformerLayer(nn.Module):
    """Pre-norm transformer layer; its heads' dimension is free, and together they are narrower than the tokens."""

    def __init__(self, dim: int, mlp_ratio: float, num_heads: int, head_dim: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads=num_heads, attn_head_dim=head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=nn.SiLU)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class MobileViTBlock(nn.Module):
    """Convolutions for what is near; for what is far, a transformer over each position of the 2x2 patches.

    A map with an odd side is resized to the next even size for the transformer and back, as in timm.
    """

    def __init__(self, width: int, dim: int, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.conv_kxk = ConvNormAct(width, width, 3, act_layer=nn.SiLU)
        self.conv_1x1 = ConvNormAct(width, dim, 1, act_layer=nn.SiLU)
        self.transformer = nn.Sequential(*layers)
        self.conv_proj = ConvNormAct(dim, width, 1, act_layer=nn.SiLU)
        self.conv_fusion = ConvNormAct(2 * width, width, 3, act_layer=nn.SiLU)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv_1x1(self.conv_kxk(x))
        height, width = y.shape[2:]
        even = (height + height % 2, width + width % 2)
        if even != (height, width):
            y = F.interpolate(y, size=even, mode="bilinear", align_corners=False)
        y = fold(self.transformer(unfold(y)), even)
        if even != (height, width):
            y = F.interpolate(y, size=(height, width), mode="bilinear", align_corners=False)
        return self.conv_fusion(torch.cat([self.conv_proj(y), x], dim=1))


def unfold(x: Tensor) -> Tensor:
    """Map (B, C, H, W) with even sides to sequences (4B, HW/4, C), one for each position in the 2x2 patch."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return x.permute(0, 3, 5, 2, 4, 1).flatten(3, 4).flatten(0, 2)


def fold(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Sequences (4B, HW/4, C) back to a map (B, C, H, W) of `size` (H, W): the inverse of `unfold`."""
    x = x.reshape(-1, 2, 2, size[0] // 2, size[1] // 2, x.shape[-1])
    return x.permute(0, 5, 3, 1, 4, 2).flatten(4, 5).flatten(2, 3)


class MobileViT(nn.Module):
    """MobileViT-S as the authors of ExMobileViT built it: stem and five stages, without a head.

    Differs from timm's `mobilevit_s`: heads of dimension 8, no qkv bias, no LayerNorm after the transformer,
    BatchNorm and SiLU after the 1x1 convolution into it, [transformed, input] as the order of fusion.

    widths: of the stem and the five stages. dims, depths, mlp_ratios: of the transformers in the last three.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        widths: Sequence[int] = (16, 32, 64, 96, 128, 160),
        dims: Sequence[int] = (144, 192, 240),
        depths: Sequence[int] = (2, 4, 3),
        mlp_ratios: Sequence[float] = (2.0, 4.0, 4.0),
        num_heads: int = 4,
        head_dim: int = 8,
        stem_stride: int = 2,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.grad_checkpointing = False
        last_layer = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last_layer for i in range(sum(depths))])

        self.stem = ConvNormAct(in_chans, widths[0], 3, stride=stem_stride, act_layer=nn.SiLU)
        stages = [
            nn.Sequential(InvertedResidual(widths[0], widths[1], stride=1)),
            nn.Sequential(
                InvertedResidual(widths[1], widths[2], stride=2),
                InvertedResidual(widths[2], widths[2], stride=1),
                InvertedResidual(widths[2], widths[2], stride=1),
            ),
        ]
        for i, (dim, depth, ratio) in enumerate(zip(dims, depths, mlp_ratios, strict=True), start=2):
            layers = [TransformerLayer(dim, ratio, num_heads, head_dim, next(rates)) for _ in range(depth)]
            block = MobileViTBlock(widths[i + 1], dim, layers)
            stages.append(nn.Sequential(InvertedResidual(widths[i], widths[i + 1], stride=2), block))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": width, "reduction": stem_stride * 2**i, "module": f"stages.{i}"}
            for i, width in enumerate(widths[1:])
        ]
        self.apply(init_weights)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks of each stage in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups for layer-wise decay: the stem, then the stages (coarse) or the blocks in them."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the stages chosen by `indices`, in timm's signature; `norm` has nothing to act on."""
        if output_fmt != "NCHW":
            raise ConfigError(f"output_fmt is '{output_fmt}'; MobileViT returns its maps as 'NCHW' only.")
        take, last = feature_take_indices(len(self.feature_info), indices)
        maps = []
        x = self.stem(x)
        for i, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
            if i in take:
                maps.append(x)
        return maps if intermediates_only else (x, maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`; returns the absolute indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.stages = self.stages[: last + 1]
        return list(take)


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
