"""ReViT: a vision transformer whose attention logits have a residual connection.

Deep layers of a ViT lose low-level features. ReViT keeps them by mixing each layer's attention logits
with those that the layer below passed on, before the softmax:

    S_l = Q_l K_l^T / sqrt(d)
    R_1 = S_1,   R_l = alpha S_l + (1 - alpha) R_(l-1)
    out_l = softmax(R_l) V_l

alpha is one learned scalar of the whole model. There is no class token by default: the mean over tokens
after the last LayerNorm is classified. Extensions of ours: a constant alpha, one alpha per layer, none
at all (the plain ViT, everything else equal), a class token, and any image size that the patch divides.

Diko, Avola, Cascio, Cinque, "ReViT: Enhancing Vision Transformers Feature Diversity with Attention
Residual Connections", Pattern Recognition 2024, arXiv 2402.11301.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    Mlp,
    PatchEmbed,
    calculate_drop_path_rates,
    global_pool_nlc,
    resample_abs_pos_embed,
    trunc_normal_,
    use_fused_attn,
)
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from leanvit.errors import ConfigError, ShapeError
from leanvit.models._attention import (
    Alpha,
    AlphaMode,
    AttentionMemory,
    Grid,
    History,
    HistoryModel,
    blockwise_attention,
    residual_attention_,
    residual_logits,
)
from leanvit.models._head import POOLS, LinearHead, residual_cfg
from leanvit.models._paper import PaperResult
from leanvit.models._pretrained import fashion_mnist_cfg

Carried = Tensor | History | None
LINEAR_FROM_BYTES = 512 << 20
"""Carried logits of one image above which attention_memory="auto" stops keeping them."""

PAPER: dict[str, PaperResult] = {
    "revit_base_patch16_224": PaperResult(params=86_566_121, macs=17.47, top1=82.4),
}


class ResidualAttention(nn.Module):
    """Multi-head self-attention that mixes its logits with those of the layer below.

    residual: False is plain attention, which then may run as one fused kernel.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        qkv_bias: bool = True,
        residual: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.residual = residual
        self.fused_attn = use_fused_attn() and not residual
        self.in_place = False
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, previous: Carried, alpha: Alpha, need_logits: bool = False) -> tuple[Tensor, Carried]:
        """x: (B, N, dim); previous: logits (B, heads, N, N), or None in the first layer, or a History.

        Returns (B, N, dim) and what to carry on, of the same kind as `previous`: plain attention
        carries nothing, unless `need_logits` asks for its logits.
        """
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        drop = self.attn_drop.p if self.training else 0.0
        carried: Carried = None
        if self.fused_attn and not need_logits:
            x = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, scale=self.scale)
            x = x.transpose(1, 2).flatten(2)
        elif isinstance(previous, History):
            carried = (previous if self.residual else History()).extended(q, k, alpha, self.scale)
            x = blockwise_attention(carried, v, drop).transpose(1, 2).flatten(2)
        elif self._may_overwrite(q, need_logits, drop) and isinstance(alpha, float):
            x, carried = residual_attention_(q, k, v, previous, alpha, self.scale)
        else:
            carried = residual_logits(q, k, previous if self.residual else None, alpha, self.scale)
            x = torch.matmul(self.attn_drop(carried.softmax(dim=-1)), v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x)), carried

    def _may_overwrite(self, q: Tensor, need_logits: bool, drop: float) -> bool:
        """Whether nobody will look at the logits of the layer below again: no caller, autograd or graph."""
        looked_at = need_logits or q.requires_grad or torch.compiler.is_compiling()
        return self.in_place and not looked_at and drop == 0.0


class ResidualBlock(nn.Module):
    """Pre-norm transformer block: residual attention, then an MLP."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        residual: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ResidualAttention(
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            residual=residual,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
        )
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, previous: Carried, alpha: Alpha, need_logits: bool = False) -> tuple[Tensor, Carried]:
        """Tokens and carried logits of the layer below in, those of this layer out."""
        y, carried = self.attn(self.norm1(x), previous, alpha, need_logits)
        x = x + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(self.norm2(x))), carried


class ReViT(HistoryModel, LinearHead):
    """ReViT image classifier.

    alpha: "learned" (one scalar, the paper's), "per_layer" (one per layer above the first), "fixed"
        (the constant `alpha_init`), or "none" (plain ViT, the baseline; None is the same, but
        `timm.create_model` drops keyword arguments that are None).
    alpha_init: weight of a layer's own logits at the start, in [0, 1].
    attention_memory: see `set_attention_memory`.
    class_token: classify a class token instead of the mean over tokens.
    global_pool: "avg", "avgmax", "max", "token" or ""; None chooses by `class_token`.
    Raises ConfigError where an option is unknown. Source: arXiv 2402.11301.
    """

    pool_hint = " (token: class_token=True)"

    def __init__(
        self,
        *,
        img_size: int | Grid = 224,
        patch_size: int | Grid = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        alpha: AlphaMode | None = "learned",
        alpha_init: float = 0.5,
        attention_memory: AttentionMemory = "auto",
        class_token: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ConfigError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token)
        self.pools = (*POOLS, "token") if class_token else POOLS
        self.num_heads = num_heads
        self._set_alpha(alpha, alpha_init, depth)
        self.set_attention_memory(attention_memory)
        self.grad_checkpointing = False
        default_pool = "token" if class_token else "avg"
        self.global_pool = self._checked_pool(default_pool if global_pool is None else global_pool)

        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim, strict_img_size=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        tokens = self.patch_embed.num_patches + self.num_prefix_tokens
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            ResidualBlock(
                embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                residual=self.alpha_mode != "none",
                attn_drop=attn_drop_rate,
                proj_drop=proj_drop_rate,
                drop_path=rate,
            )
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        reduction = max(self.patch_embed.patch_size)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm: nn.Module = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"pos_embed", "cls_token", "alpha"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|alpha",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute every block in the backward pass."""
        self.grad_checkpointing = enable

    @torch.no_grad()
    def fuse_(self) -> ReViT:
        """Make alpha a constant and let inference mix logits in place; for inference only. Returns self."""
        self._freeze_alpha()
        for module in self.modules():
            if isinstance(module, ResidualAttention):
                module.in_place = module.residual
        return self

    def set_input_size(self, img_size: int | Grid) -> None:
        """Make `img_size` the default: the position embedding is resampled once, not in every forward."""
        before = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size=img_size)
        pos = resample_abs_pos_embed(
            self.pos_embed.data,
            new_size=list(self.patch_embed.grid_size),
            old_size=list(before),
            num_prefix_tokens=self.num_prefix_tokens,
        )
        self.pos_embed = nn.Parameter(pos, requires_grad=self.pos_embed.requires_grad)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Image (B, C, H, W) to tokens (B, N, dim) with positions, and the grid they come from."""
        height, width = x.shape[-2:]
        ph, pw = self.patch_embed.patch_size
        if height % ph or width % pw or height < ph or width < pw:
            raise ShapeError(
                f"image is {height} x {width}, expected multiples of the patch {ph} x {pw}: resize or pad it"
            )
        grid = (height // ph, width // pw)
        pos = self.pos_embed
        if grid != tuple(self.patch_embed.grid_size):
            pos = resample_abs_pos_embed(
                pos,
                new_size=list(grid),
                old_size=list(self.patch_embed.grid_size),
                num_prefix_tokens=self.num_prefix_tokens,
            )
        x = self.patch_embed(x)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x + pos), grid

    def _start(self, grid: Grid) -> Carried:
        """What the first layer finds below it: an empty history where logits are not to be kept."""
        tokens = grid[0] * grid[1] + self.num_prefix_tokens
        large = self.num_heads * tokens * tokens * self.pos_embed.element_size() > LINEAR_FROM_BYTES
        return History(depth=len(self.blocks)) if self._is_linear(large) else None

    def _block(self, index: int, x: Tensor, carried: Carried, need_logits: bool = False) -> tuple[Tensor, Carried]:
        block, alpha = self.blocks[index], self._alpha(index)
        out: tuple[Tensor, Carried]
        if self.grad_checkpointing and self.training:
            out = checkpoint(block, x, carried, alpha, need_logits)
        else:
            out = block(x, carried, alpha, need_logits)
        return out

    def forward_features(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Image (B, C, H, W) to normalised tokens (B, N, dim), a class token first if there is one.

        return_attention: also return the carried logits of every layer, (B, heads, N, N) before softmax.
        Raises ShapeError where the patch does not divide the image.
        """
        logits: list[Tensor] | None = [] if return_attention else None
        x = self._encode(x, logits)
        return x if logits is None else (x, logits)

    def _encode(self, x: Tensor, logits: list[Tensor] | None) -> Tensor:
        x, grid = self._embed(x)
        carried = self._start(grid)
        for index in range(len(self.blocks)):
            x, carried = self._block(index, x, carried, logits is not None)
            if logits is not None and carried is not None:
                logits.append(carried.logits() if isinstance(carried, History) else carried)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Tokens after chosen blocks, as maps (B, dim, h, w) or tokens (B, h w, dim); timm's signature.

        indices: blocks to take (int: the last n; None: all). norm: apply the last LayerNorm to each.
        return_prefix_tokens: return (map, class token) pairs. intermediates_only: leave out the final tokens.
        Raises ConfigError where `output_fmt` is neither NCHW nor NLC.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.blocks), indices)
        x, (rows, columns) = self._embed(x)
        carried = self._start((rows, columns))
        taken: list[Tensor] = []
        for index in range(last + 1 if stop_early else len(self.blocks)):
            x, carried = self._block(index, x, carried)
            if index in take:
                taken.append(self.norm(x) if norm else x)
        prefixes = [y[:, : self.num_prefix_tokens] for y in taken]
        maps = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            maps = [y.transpose(1, 2).reshape(y.shape[0], -1, rows, columns) for y in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        intermediates: list[Any] = list(zip(maps, prefixes, strict=True)) if with_prefix else list(maps)
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the blocks above the last one of `indices`; returns the indices taken."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        self._keep_alphas(last + 1)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(take)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, dim) to logits (B, num_classes), or to pooled features where `pre_logits`."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W), normalised, to logits (B, num_classes)."""
        return self.forward_head(self._encode(x, None))


default_cfgs = generate_default_cfgs(
    {
        "revit_tiny_patch16_224.in1k": residual_cfg(),
        "revit_small_patch16_224.in1k": residual_cfg(),
        "revit_base_patch16_224.in1k": residual_cfg(),
        "revit_micro.fmnist": {**residual_cfg(32), **fashion_mnist_cfg("revit_micro")},
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "revit_tiny_patch16_224": {"embed_dim": 192, "depth": 12, "num_heads": 3},
    "revit_small_patch16_224": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "revit_base_patch16_224": {"embed_dim": 768, "depth": 12, "num_heads": 12},
    "revit_micro": {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3},
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> ReViT:
    out_indices = kwargs.pop("out_indices", 3)
    model: ReViT = build_model_with_cfg(
        ReViT,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**VARIANTS[name], **kwargs},
    )
    return model


@register_model
def revit_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> ReViT:
    """ReViT of DeiT-Ti's width: 192, depth 12, 3 heads (ours; the paper has none)."""
    return _create("revit_tiny_patch16_224", pretrained, **kwargs)


@register_model
def revit_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> ReViT:
    """ReViT of DeiT-S's width: 384, depth 12, 6 heads (ours; the paper has none)."""
    return _create("revit_small_patch16_224", pretrained, **kwargs)


@register_model
def revit_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> ReViT:
    """ReViT-B/16 of the paper: width 768, depth 12, 12 heads."""
    return _create("revit_base_patch16_224", pretrained, **kwargs)


@register_model
def revit_micro(pretrained: bool = False, **kwargs: Any) -> ReViT:
    """Small ReViT for 32 px images: patch 4, width 96, depth 6, 3 heads (ours)."""
    return _create("revit_micro", pretrained, **kwargs)
