"""ViTAEv2: four scales of convolution beside attention, with windows where the map is large.

A vision transformer has to learn locality and scale from data. ViTAEv2 builds them in (see `_cells`): each of
four stages starts with a reduction cell, which looks at its input through convolutions of several dilations,
and goes on with normal cells, which run a convolution branch beside attention:

    reduction:  t = PRM(x)    y = attention(LN(t)) + PCM(x)    out = y + MLP(LN(y))
    normal:     y = x + attention(LN(x)) + PCM(x)              out = y + MLP(LN(y))

In the first two stages attention stays inside 7x7 windows, without shift, so that time and memory grow
linearly with the pixels; the last two attend globally. The mean over the last tokens is classified. Any
H x W goes in: a map that a stage's ratio does not divide is padded with zeros below and to the right.

Zhang, Xu, Zhang, Tao, "ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition
and Beyond", IJCV 2023, arXiv 2202.10108.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from leanvit.errors import ConfigError
from leanvit.models._cellnet import CellNet, DropPathRule, check_lengths, drop_path_rates
from leanvit.models._cells import CACHE_TOKENS, Attention, Grid, NormalCell, ReductionCell, Stage, in_pieces
from leanvit.models._paper import PaperResult
from leanvit.models._pretrained import fashion_mnist_cfg

AttentionType = Literal["window", "full"]

PAPER: dict[str, PaperResult] = {
    "vitaev2_small": PaperResult(params=19_355_688, macs=5.753, top1=82.6),
    "vitaev2_48m": PaperResult(params=48_674_632, macs=13.34, top1=83.8),
    "vitaev2_base": PaperResult(params=89_693_352, macs=24.37, top1=84.6),
}


class WindowAttention(Attention):
    """Attention inside non-overlapping square windows, no shift.

    Where the window does not divide the map, zeros are added around it *after* the norm, split evenly with
    the odd row below and the odd column to the right; they take part in the softmax, as in the paper.
    relative_position: add a learned bias by relative position to the logits.
    """

    def __init__(
        self, dim: int, out_dim: int, *, window_size: int = 7, relative_position: bool = False, **options: Any
    ) -> None:
        super().__init__(dim, out_dim, **options)
        self.window_size = window_size
        self.relative_position_index: Tensor
        self.relative_position_bias_table: nn.Parameter | None = None
        if relative_position:
            table = torch.zeros((2 * window_size - 1) ** 2, self.num_heads)
            self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))
            self.register_buffer("relative_position_index", _relative_index(window_size), persistent=False)

    def logit_bias(self, batch: int) -> Tensor | None:
        """Relative position bias, (batch, heads, w w, w w): the same for every window."""
        if self.relative_position_bias_table is None:
            return None
        tokens = self.window_size**2
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        return bias.view(tokens, tokens, -1).permute(2, 0, 1).expand(batch, -1, -1, -1)

    def _attend_windows(self, x: Tensor) -> Tensor:
        """Windows (windows, w w, dim) to (windows, w w, out_dim)."""
        return super().forward(x, (self.window_size, self.window_size))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, H W, dim) to (B, H W, out_dim)."""
        size, (height, width) = self.window_size, grid
        down, right = -height % size, -width % size
        top, left = down // 2, right // 2
        x = x.reshape(x.shape[0], height, width, -1)
        if down or right:
            x = F.pad(x, (0, 0, left, right - left, top, down - top))
        rows, columns = (height + down) // size, (width + right) // size
        x = x.reshape(-1, rows, size, columns, size, x.shape[-1]).transpose(2, 3).reshape(-1, size**2, x.shape[-1])
        x = in_pieces(self._attend_windows, x, CACHE_TOKENS // size**2)
        x = x.reshape(-1, rows, columns, size, size, x.shape[-1]).transpose(2, 3)
        if not (down or right):
            return x.flatten(1, 4)
        return x.flatten(3, 4).flatten(1, 2)[:, top : top + height, left : left + width].flatten(1, 2)


def _relative_index(window: int) -> Tensor:
    """(w w, w w): row of the bias table for each pair of places in a window."""
    ys, xs = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    ys, xs = ys.flatten(), xs.flatten()
    down = ys[:, None] - ys[None, :] + window - 1
    return down * (2 * window - 1) + xs[:, None] - xs[None, :] + window - 1


class ViTAEv2(CellNet):
    """ViTAEv2 image classifier and four-scale backbone.

    embed_dims: width of each dilation's convolution; token_dims: width of the tokens, by stage.
    attention: "window" or "full", by stage. num_heads, groups: of the normal cells; reduction_heads,
        reduction_groups: of the reduction cells. relative_position: learned bias in the windows (paper: off).
    reduction_window_size, reduction_drop_rate, reduction_drop_path_rate: of the reduction cells, which the
        model-wide rates leave alone, as in the authors' program.
    drop_path_rule: "linear" over all normal cells (timm's) or "official" (see `drop_path_rates`).
    img_size: accepted for timm's contract; any H x W goes in.
    Raises ConfigError where an option is unknown or has the wrong length. Source: arXiv 2202.10108.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 64, 128, 256),
        token_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        groups: Sequence[int] = (1, 32, 64, 128),
        reduction_heads: Sequence[int] = (1, 1, 2, 4),
        reduction_groups: Sequence[int] = (1, 16, 32, 64),
        attention: Sequence[AttentionType] = ("window", "window", "full", "full"),
        ratios: Sequence[int] = (4, 2, 2, 2),
        kernel_sizes: Sequence[int] = (7, 3, 3, 3),
        dilations: Sequence[Sequence[int]] = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2)),
        mlp_ratio: float = 4.0,
        window_size: int = 7,
        reduction_window_size: int = 7,
        relative_position: bool = False,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_rule: DropPathRule = "linear",
        reduction_drop_rate: float = 0.0,
        reduction_drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_lengths(
            depths=depths,
            embed_dims=embed_dims,
            token_dims=token_dims,
            num_heads=num_heads,
            groups=groups,
            reduction_heads=reduction_heads,
            reduction_groups=reduction_groups,
            attention=attention,
            ratios=ratios,
            kernel_sizes=kernel_sizes,
            dilations=dilations,
        )

        def attend(index: int, dim: int, *, normal: bool) -> Attention:
            options: dict[str, Any] = {
                "num_heads": num_heads[index] if normal else reduction_heads[index],
                "attn_drop": attn_drop_rate if normal else reduction_drop_rate,
                "proj_drop": proj_drop_rate if normal else reduction_drop_rate,
            }
            if attention[index] == "window":
                window = window_size if normal else reduction_window_size
                options |= {"window_size": window, "relative_position": relative_position}
                return WindowAttention(dim, token_dims[index], **options)
            if attention[index] != "full":
                raise ConfigError(f"attention is {attention[index]!r}, expected 'window' or 'full'")
            return Attention(dim, token_dims[index], qkv_bias=normal, value_skip=not normal, **options)

        rates = drop_path_rates(drop_path_rate, depths, drop_path_rule)
        stages = []
        self.feature_info = []
        stride, width = 1, in_chans
        for index, (embed_dim, dim) in enumerate(zip(embed_dims, token_dims, strict=True)):
            reduction = ReductionCell(
                width,
                embed_dim,
                dim,
                attention=attend(index, embed_dim * len(dilations[index]), normal=False),
                ratio=ratios[index],
                kernel_size=kernel_sizes[index],
                dilations=dilations[index],
                groups=reduction_groups[index],
                mlp_drop=(reduction_drop_rate, reduction_drop_rate),
                drop_path=reduction_drop_path_rate,
            )
            blocks = [
                NormalCell(
                    dim,
                    attention=attend(index, dim, normal=True),
                    mlp_ratio=mlp_ratio,
                    groups=groups[index],
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                )
                for rate in rates[index]
            ]
            stages.append(Stage(reduction, blocks))
            stride, width = stride * ratios[index], dim
            self.feature_info.append({"module": f"stages.{index}", "num_chs": dim, "reduction": stride})
        self.stages = nn.ModuleList(stages)
        self._finish(num_classes, token_dims[-1], in_chans, global_pool, drop_rate)


def _cfg(size: int = 224, dilations: int = 4) -> dict[str, Any]:
    stem = "stages.0.reduction"
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": False,
        "first_conv": (*(f"{stem}.prm.convs.{i}" for i in range(dilations)), f"{stem}.pcm.convs.0"),
        "classifier": "head",
        "paper_ids": "arXiv:2202.10108",
    }


default_cfgs = generate_default_cfgs(
    {
        "vitaev2_small.in1k": _cfg(),
        "vitaev2_48m.in1k": _cfg(),
        "vitaev2_base.in1k": _cfg(),
        "vitaev2_micro.fmnist": {**_cfg(32, dilations=3), **fashion_mnist_cfg("vitaev2_micro")},
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "vitaev2_small": {},
    "vitaev2_48m": {
        "embed_dims": (64, 64, 192, 384),
        "token_dims": (96, 192, 384, 768),
        "depths": (2, 2, 11, 2),
    },
    "vitaev2_base": {
        "embed_dims": (96, 96, 256, 512),
        "token_dims": (128, 256, 512, 1024),
        "depths": (2, 2, 12, 2),
        "num_heads": (1, 4, 8, 16),
        "reduction_heads": (1, 1, 4, 8),
    },
    "vitaev2_micro": {
        "img_size": 32,
        "embed_dims": (8, 16, 32, 48),
        "token_dims": (24, 48, 64, 96),
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 2, 3),
        "groups": (1, 8, 16, 32),
        "reduction_heads": (1, 1, 2, 3),
        "reduction_groups": (1, 8, 16, 16),
        "ratios": (2, 2, 2, 2),
        "kernel_sizes": (5, 3, 3, 3),
        "dilations": ((1, 2, 3), (1, 2, 3), (1, 2), (1, 2)),
        "mlp_ratio": 2.0,
        "window_size": 4,
        "reduction_window_size": 4,
    },
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> ViTAEv2:
    out_indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    model: ViTAEv2 = build_model_with_cfg(
        ViTAEv2,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**VARIANTS[name], **kwargs},
    )
    return model


@register_model
def vitaev2_small(pretrained: bool = False, **kwargs: Any) -> ViTAEv2:
    """ViTAEv2-S of the paper: widths 64 to 512, depths 2 2 8 2."""
    return _create("vitaev2_small", pretrained, **kwargs)


@register_model
def vitaev2_48m(pretrained: bool = False, **kwargs: Any) -> ViTAEv2:
    """ViTAEv2-48M of the paper: widths 96 to 768, depths 2 2 11 2."""
    return _create("vitaev2_48m", pretrained, **kwargs)


@register_model
def vitaev2_base(pretrained: bool = False, **kwargs: Any) -> ViTAEv2:
    """ViTAEv2-B of the paper: widths 128 to 1024, depths 2 2 12 2."""
    return _create("vitaev2_base", pretrained, **kwargs)


@register_model
def vitaev2_micro(pretrained: bool = False, **kwargs: Any) -> ViTAEv2:
    """Small ViTAEv2 for 32 px images: strides 2 to 16, widths 24 to 96, windows of 4 (ours)."""
    return _create("vitaev2_micro", pretrained, **kwargs)
