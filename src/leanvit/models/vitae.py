"""ViTAE: a vision transformer with the locality and the scale of convolutions built in.

Three stages of cells (see `_cells`) lead from the image to 16 x 16 pixels per token. The reduction cells of
the first two attend to all their tokens in linear time, by positive random features with one head
(Performer): for fixed orthogonal w, m rows,

    phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)
    attention(q, k, v)_t = phi(q_t) sum_s phi(k_s) v_s / (phi(q_t) sum_s phi(k_s) + 1e-8)

the third reduces by convolution alone, and normal cells of full attention follow. The larger members (Base
and up) are plain instead: 16 x 16 patches, a class token, a position embedding and normal cells with a
shallower convolution branch. Any H x W goes in; plain members need multiples of their patch.

Xu, Zhang, Zhang, Tao, "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias",
NeurIPS 2021, arXiv 2106.03348.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed, resample_abs_pos_embed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from leanvit.errors import ConfigError, ShapeError
from leanvit.models._cellnet import CellNet, DropPathRule, check_lengths, drop_path_rates
from leanvit.models._cells import NORMAL_EPS, Attention, Grid, NormalCell, ReductionCell, Stage, as_map
from leanvit.models._paper import PaperResult
from leanvit.models._pretrained import fashion_mnist_cfg

ReductionType = Literal["performer", "performer_less"]
EPSILON = 1e-8

PAPER: dict[str, PaperResult] = {
    "vitae_tiny": PaperResult(params=4_886_888, macs=1.757, top1=75.3),
    "vitae_6m": PaperResult(params=6_614_120, macs=2.152, top1=77.9),
    "vitae_13m": PaperResult(params=10_834_728, macs=3.036, top1=None),
    "vitae_small": PaperResult(params=24_032_136, macs=6.180, top1=82.0),
    "vitae_base": PaperResult(params=89_341_672, macs=18.08, top1=83.8),
    "vitae_large": PaperResult(params=311_724_008, macs=62.94, top1=None),
    "vitae_huge": PaperResult(params=644_528_360, macs=129.6, top1=None),
}


class Performer(nn.Module):
    """Attention in linear time by positive random features, one head, v as skip; computed in float32.

    stable: take the largest exponent out of the features first (ours). Equal to the paper's form as long
    as that one's denominators are well above 1e-8, which ends near |k|^2 = 40; finite and exact beyond.
    """

    def __init__(self, dim: int, out_dim: int, *, stable: bool = False, drop: float = 0.0) -> None:
        super().__init__()
        self.stable = stable
        self.kqv = nn.Linear(dim, out_dim * 3)
        self.proj = nn.Linear(out_dim, out_dim)
        self.proj_drop = nn.Dropout(drop)
        features = out_dim // 2
        w = nn.init.orthogonal_(torch.empty(features, out_dim)) * math.sqrt(features)
        self.w = nn.Parameter(w, requires_grad=False)

    def exponents(self, x: Tensor) -> Tensor:
        """w x - |x|^2 / 2 of (..., N, dim): (..., N, m)."""
        return F.linear(x, as_float(self.w)) - 0.5 * x.square().sum(dim=-1, keepdim=True)

    def attend(self, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        """The equation of the module docstring; float32 (B, N, dim) each."""
        keys, queries = self.exponents(torch.stack((k, q))).unbind(0)
        if self.stable:
            # What is taken out of a feature of the keys goes into the queries; what is then taken out of
            # a query cancels between numerator and denominator, which is at least 1.
            largest = keys.amax(dim=1, keepdim=True).detach()
            keys, queries = keys - largest, queries + largest
            queries = queries - queries.amax(dim=-1, keepdim=True).detach()
            scale, epsilon = 1.0, 0.0
        else:
            scale, epsilon = self.w.shape[0] ** -0.5, EPSILON
        keys, queries = keys.exp() * scale, queries.exp() * scale
        mixed = torch.matmul(queries, torch.matmul(keys.transpose(1, 2), v))
        return mixed / (torch.matmul(queries, keys.sum(dim=1).unsqueeze(-1)) + epsilon)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens (B, N, dim) to (B, N, out_dim); `grid` plays no part."""
        kqv = self.kqv(x)
        k, q, v = kqv.chunk(3, dim=-1)
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                out = self.attend(as_float(k), as_float(q), as_float(v))
        else:
            out = self.attend(as_float(k), as_float(q), as_float(v))
        out = out if out.dtype == kqv.dtype else out.to(kqv.dtype)
        return v + self.proj_drop(self.proj(out))


def as_float(x: Tensor) -> Tensor:
    """x in float32; the test keeps a no-op cast out of exported graphs. float64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


class PlainEmbedding(nn.Module):
    """Patches of one size as tokens, a class token before them, a learned position embedding."""

    def __init__(self, img_size: int | tuple[int, int], patch_size: int, in_chans: int, dim: int, drop: float) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, dim, strict_img_size=False)
        self.cls_token = nn.Parameter(trunc_normal_(torch.zeros(1, 1, dim), std=0.02))
        tokens = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(trunc_normal_(torch.zeros(1, tokens, dim), std=0.02))
        self.pos_drop = nn.Dropout(drop)

    def positions(self, grid: Grid) -> Tensor:
        """The position embedding for a grid, (1, 1 + H W, dim); resampled where it has another size."""
        own = self.patch_embed.grid_size
        if grid == tuple(own):
            return self.pos_embed
        resampled: Tensor = resample_abs_pos_embed(self.pos_embed, new_size=list(grid), old_size=list(own))
        return resampled

    def forward(self, image: Tensor) -> tuple[Tensor, Grid]:
        """Image (B, C, H, W) to tokens (B, 1 + N, dim), class token first, and the grid of the others.

        Raises ShapeError where the patch does not divide the image.
        """
        size, (height, width) = self.patch_embed.patch_size[0], image.shape[2:]
        if height % size or width % size:
            raise ShapeError(
                f"image is {height} x {width}, expected multiples of the patch {size} x {size}: resize or pad it"
            )
        grid = (height // size, width // size)
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + self.positions(grid)), grid

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resample the position embedding once, not in every forward."""
        size = self.patch_embed.patch_size[0]
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        pos = self.positions((height // size, width // size)).detach().clone()
        self.patch_embed.set_input_size(img_size=img_size)
        self.pos_embed = nn.Parameter(pos, requires_grad=self.pos_embed.requires_grad)


class ViTAE(CellNet):
    """ViTAE image classifier.

    patch_size: None builds the pyramid of reduction cells; a number the plain network, with a class token, a
        shallow PCM and `fc_norm` after the pooling. Options by stage then have one entry, `stages` holds its
        normal cells, and `embed_dims`, `reductions` and what else is of reduction cells plays no part.
    embed_dims: width of each dilation's convolution; token_dims: width of the tokens, by stage.
    reductions: "performer" or "performer_less" (convolution alone), by stage.
    performer_stable: see `Performer`. reduction_drop_rate: dropout of the performers, 0.1 as in the
        authors' program; reduction_drop_path_rate: of the reduction cells, which the others leave alone.
    drop_path_rule: "linear" over all normal cells (timm's) or "official" (see `drop_path_rates`).
    img_size: size of the position embedding of the plain network; it is resampled to others.
    Raises ConfigError where an option is unknown or has the wrong length. Source: arXiv 2106.03348.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int | None = None,
        embed_dims: Sequence[int] = (64, 64, 128),
        token_dims: Sequence[int] = (64, 64, 256),
        depths: Sequence[int] = (0, 0, 7),
        num_heads: Sequence[int] = (1, 1, 4),
        groups: Sequence[int] = (1, 1, 64),
        reduction_groups: Sequence[int] = (1, 1, 1),
        reductions: Sequence[ReductionType] = ("performer", "performer", "performer_less"),
        ratios: Sequence[int] = (4, 2, 2),
        kernel_sizes: Sequence[int] = (7, 3, 3),
        dilations: Sequence[Sequence[int]] = ((1, 2, 3, 4), (1, 2, 3), (1, 2)),
        mlp_ratio: float = 2.0,
        performer_stable: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_path_rule: DropPathRule = "linear",
        reduction_drop_rate: float = 0.1,
        reduction_drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_lengths(depths=depths, token_dims=token_dims, num_heads=num_heads, groups=groups)
        plain = patch_size is not None

        def normal_cells(index: int, rates: Sequence[float]) -> list[NormalCell]:
            dim, heads = token_dims[index], num_heads[index]
            return [
                NormalCell(
                    dim,
                    attention=Attention(dim, dim, num_heads=heads, attn_drop=attn_drop_rate, proj_drop=proj_drop_rate),
                    mlp_ratio=mlp_ratio,
                    groups=groups[index],
                    pcm_final_act=not plain,
                    shallow=plain,
                    prefix=int(plain),
                    proj_drop=proj_drop_rate,
                    drop_path=rate,
                )
                for rate in rates
            ]

        def reduction_cell(index: int) -> ReductionCell:
            kind, dim = reductions[index], token_dims[index]
            if kind not in ("performer", "performer_less"):
                raise ConfigError(f"reduction is {kind!r}, expected 'performer' or 'performer_less'")
            performer = None
            if kind == "performer":
                width = embed_dims[index] * len(dilations[index])
                performer = Performer(width, dim, stable=performer_stable, drop=reduction_drop_rate)
            return ReductionCell(
                token_dims[index - 1] if index else in_chans,
                embed_dims[index],
                dim,
                attention=performer,
                ratio=ratios[index],
                kernel_size=kernel_sizes[index],
                dilations=dilations[index],
                groups=reduction_groups[index],
                pcm_norms=(False, True, False),
                pcm_final_act=True,
                mlp_drop=(0.0, reduction_drop_rate),
                drop_path=reduction_drop_path_rate,
            )

        rates = drop_path_rates(drop_path_rate, depths, drop_path_rule)
        self.embedding: PlainEmbedding | None = None
        if patch_size is not None:
            if len(depths) != 1:
                raise ConfigError(f"depths is {tuple(depths)}, expected one entry where patch_size is given")
            self.embedding = PlainEmbedding(img_size, patch_size, in_chans, token_dims[0], pos_drop_rate)
            self.stages = nn.ModuleList(normal_cells(0, rates[0]))
            scales = [(token_dims[0], patch_size)] * depths[0]
            self.num_prefix_tokens = 1
            self.pools = (*self.pools, "token")
        else:
            check_lengths(
                depths=depths,
                embed_dims=embed_dims,
                reduction_groups=reduction_groups,
                reductions=reductions,
                ratios=ratios,
                kernel_sizes=kernel_sizes,
                dilations=dilations,
            )
            self.stages = nn.ModuleList(
                Stage(reduction_cell(i), normal_cells(i, stage_rates)) for i, stage_rates in enumerate(rates)
            )
            scales = list(zip(token_dims, itertools.accumulate(ratios, operator.mul), strict=True))
        self.feature_info = [
            {"module": f"stages.{i}", "num_chs": width, "reduction": stride} for i, (width, stride) in enumerate(scales)
        ]
        self._finish(num_classes, token_dims[-1], in_chans, global_pool, drop_rate)
        self.fc_norm = nn.LayerNorm(token_dims[-1], eps=NORMAL_EPS) if plain else nn.Identity()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make `img_size` the default; only the position embedding of the plain network depends on it."""
        if self.embedding is not None:
            self.embedding.set_input_size(img_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        if self.embedding is None:
            return super().group_matcher(coarse)
        return {"stem": r"^embedding", "blocks": [(r"^stages\.(\d+)", None), (r"^fc_norm", (99999,))]}

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        image, grid = super()._embed(x)
        return (image, grid) if self.embedding is None else self.embedding(as_map(image, grid))

    def _features(self, x: Tensor, grid: Grid) -> Tensor:
        return super()._features(x, grid) if self.embedding is None else x


def _cfg(size: int = 224, *, dilations: int = 4, plain: bool = False) -> dict[str, Any]:
    stem = "stages.0.reduction"
    pyramid_convs = (*(f"{stem}.prm.convs.{i}" for i in range(dilations)), f"{stem}.pcm.convs.0")
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875 if plain else 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": False,
        "first_conv": "embedding.patch_embed.proj" if plain else pyramid_convs,
        "classifier": "head",
        "paper_ids": "arXiv:2106.03348",
    }


default_cfgs = generate_default_cfgs(
    {
        "vitae_tiny.in1k": _cfg(),
        "vitae_6m.in1k": _cfg(),
        "vitae_13m.in1k": _cfg(),
        "vitae_small.in1k": _cfg(),
        "vitae_base.mae_in1k": _cfg(plain=True),
        "vitae_large.mae_in1k": _cfg(plain=True),
        "vitae_huge.mae_in1k": _cfg(plain=True),
        "vitae_micro.fmnist": {**_cfg(32, dilations=3), **fashion_mnist_cfg("vitae_micro")},
    }
)


def _plain(dim: int, depth: int, heads: int) -> dict[str, Any]:
    """Options of a plain member: four channels per group where the PCM reads."""
    return {
        "patch_size": 16,
        "token_dims": (dim,),
        "depths": (depth,),
        "num_heads": (heads,),
        "groups": (dim // 4,),
        "mlp_ratio": 4.0,
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "vitae_tiny": {},
    "vitae_6m": {"depths": (0, 0, 10)},
    "vitae_13m": {
        "embed_dims": (64, 64, 160),
        "token_dims": (64, 64, 320),
        "depths": (0, 0, 11),
        "num_heads": (1, 1, 5),
    },
    "vitae_small": {
        "embed_dims": (64, 64, 192),
        "token_dims": (96, 192, 384),
        "depths": (0, 0, 14),
        "num_heads": (1, 1, 6),
        "groups": (1, 1, 96),
        "mlp_ratio": 3.0,
    },
    "vitae_base": _plain(768, 12, 12),
    "vitae_large": _plain(1024, 24, 16),
    "vitae_huge": _plain(1280, 32, 16),
    "vitae_micro": {
        "img_size": 32,
        "embed_dims": (16, 16, 48),
        "token_dims": (32, 48, 96),
        "depths": (0, 0, 3),
        "num_heads": (1, 1, 3),
        "groups": (1, 1, 24),
        "ratios": (2, 2, 2),
        "kernel_sizes": (5, 3, 3),
        "dilations": ((1, 2, 3), (1, 2, 3), (1, 2)),
    },
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> ViTAE:
    out_indices = kwargs.pop("out_indices", 3)
    model: ViTAE = build_model_with_cfg(
        ViTAE,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**VARIANTS[name], **kwargs},
    )
    return model


@register_model
def vitae_tiny(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """ViTAE-T of the paper: width 256, depth 7."""
    return _create("vitae_tiny", pretrained, **kwargs)


@register_model
def vitae_6m(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """ViTAE-6M of the paper: width 256, depth 10."""
    return _create("vitae_6m", pretrained, **kwargs)


@register_model
def vitae_13m(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """ViTAE-13M of the paper: width 320, depth 11."""
    return _create("vitae_13m", pretrained, **kwargs)


@register_model
def vitae_small(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """ViTAE-S of the paper: width 384, depth 14."""
    return _create("vitae_small", pretrained, **kwargs)


@register_model
def vitae_base(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """ViTAE-B, plain: 16 x 16 patches, width 768, depth 12."""
    return _create("vitae_base", pretrained, **kwargs)


@register_model
def vitae_large(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """ViTAE-L, plain: 16 x 16 patches, width 1024, depth 24."""
    return _create("vitae_large", pretrained, **kwargs)


@register_model
def vitae_huge(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """ViTAE-H, plain: 16 x 16 patches, width 1280, depth 32."""
    return _create("vitae_huge", pretrained, **kwargs)


@register_model
def vitae_micro(pretrained: bool = False, **kwargs: Any) -> ViTAE:
    """Small ViTAE for 32 px images: strides 2 to 8, widths 32 to 96 (ours)."""
    return _create("vitae_micro", pretrained, **kwargs)
