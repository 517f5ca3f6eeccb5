"""ReMViTv2: the multiscale vision transformer MViTv2 with ReViT's attention residual.

Queries are pooled where a stage begins, keys and values everywhere, so that the attention logits change
shape from layer to layer. The logits that the layer below passed on are brought to the shape of this
layer's (`resize_logits`) and mixed with them, then the decomposed relative position is added:

    R_1 = S_1 + E_1,   R_l = alpha S_l + (1 - alpha) resize(R_(l-1)) + E_l,   S_l = Q_l K_l^T / sqrt(d)
    out_l = softmax(R_l) V_l + Q_l,   E_l[q, k] = Q_l[q] . (Th[q_h - k_h] + Tw[q_w - k_w])

alpha is one learned scalar of the whole model. The authors' program adds E_l in place to the tensor that
it carries on, so relative positions are carried too; ours does the same. The authors assume square grids;
ours may be H x W of any size, and equal theirs where theirs is defined.

Diko, Avola, Cascio, Cinque, "ReViT: Enhancing Vision Transformers Feature Diversity with Attention
Residual Connections", Pattern Recognition 2024, arXiv 2402.11301. MViTv2: Li et al., arXiv 2112.01526.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, Mlp, calculate_drop_path_rates, global_pool_nlc, trunc_normal_
from timm.layers.helpers import to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from leanvit.errors import ConfigError, ShapeError
from leanvit.models._attention import Alpha, AlphaMode, AttentionMemory, Grid, HistoryModel
from leanvit.models._head import LinearHead, residual_cfg
from leanvit.models._paper import PaperResult
from leanvit.models._pooling_attention import Below, PoolingAttention
from leanvit.models._pooling_history import PoolingHistory

LINEAR_FROM_BYTES = 8 << 20
"""Logits of one image in the first layer above which attention_memory="auto" stops keeping them."""

PAPER: dict[str, PaperResult] = {
    "remvitv2_tiny": PaperResult(params=24_173_321, macs=4.68, top1=82.7),
}


class PatchEmbed(nn.Module):
    """Overlapping patches by one strided convolution: (B, C, H, W) to (B, N, dim) and the grid."""

    def __init__(self, in_chans: int, dim: int, *, kernel: Grid, stride: Grid, padding: Grid) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel, stride, padding)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


class MultiscaleBlock(nn.Module):
    """Pooling attention, then an MLP; the width changes inside the attention."""

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        num_heads: int,
        grid: Grid,
        q_stride: int,
        kv_stride: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        residual: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = PoolingAttention(
            dim,
            dim_out,
            num_heads=num_heads,
            grid=grid,
            q_stride=q_stride,
            kv_stride=kv_stride,
            qkv_bias=qkv_bias,
            residual=residual,
        )
        self.proj = nn.Linear(dim, dim_out) if dim != dim_out else None
        self.pool_skip = nn.MaxPool2d(q_stride + 1, q_stride, (q_stride + 1) // 2) if q_stride > 1 else None
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim_out, eps=1e-6)
        self.mlp = Mlp(dim_out, int(dim_out * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor, grid: Grid, previous: Below, alpha: Alpha) -> tuple[Tensor, Grid, Below]:
        """Tokens, their grid and the carried logits of the layer below in, those of this layer out."""
        normed = self.norm1(x)
        y, new_grid, carried = self.attn(normed, grid, previous, alpha)
        skip = x if self.proj is None else self.proj(normed)
        if self.pool_skip is not None:
            maps = skip.reshape(-1, *grid, skip.shape[-1]).permute(0, 3, 1, 2)
            skip = self.pool_skip(maps).permute(0, 2, 3, 1).flatten(1, 2)
        x = skip + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(self.norm2(x))), new_grid, carried


class ReMViT(HistoryModel, LinearHead):
    """ReMViTv2 image classifier.

    depths: blocks per stage; width and heads double and queries are pooled by 2 where a stage but the first
        begins. kv_stride: pooling of keys and values in the first stage, halved in each, at least 1.
    patch_kernel, patch_stride, patch_padding: of the overlapping patches.
    alpha, alpha_init: as in ReViT: "learned", "fixed", "per_layer" or "none" (plain MViTv2).
    attention_memory: see `set_attention_memory`.
    img_size sets the lengths of the relative position tables; other sizes resample them.
    Raises ConfigError where an option is unknown. Source: arXiv 2402.11301.
    """

    def __init__(
        self,
        *,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_kernel: int = 7,
        patch_stride: int = 4,
        patch_padding: int = 3,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (1, 2, 5, 2),
        num_heads: int = 1,
        kv_stride: int = 4,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        alpha: AlphaMode | None = "learned",
        alpha_init: float = 0.5,
        attention_memory: AttentionMemory = "auto",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = self._checked_pool(global_pool)
        self.depths = tuple(depths)
        self.grad_checkpointing = False
        self._set_alpha(alpha, alpha_init, sum(depths))
        self.set_attention_memory(attention_memory)
        self.first_logits = (num_heads, kv_stride)
        self.patch_geometry = (patch_kernel, patch_stride, patch_padding)
        self.patch_embed = PatchEmbed(
            in_chans,
            embed_dim,
            kernel=(patch_kernel, patch_kernel),
            stride=(patch_stride, patch_stride),
            padding=(patch_padding, patch_padding),
        )
        grid = self._patch_grid(*to_2tuple(img_size))
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        blocks: list[MultiscaleBlock] = []
        self.feature_info = []
        dim, heads, reduction = embed_dim, num_heads, patch_stride
        for stage, depth in enumerate(depths):
            for position in range(depth):
                first = stage > 0 and position == 0
                dim_out, heads = (dim * 2, heads * 2) if first else (dim, heads)
                kv_stride = max(kv_stride // 2, 1) if first else kv_stride
                q_stride = 2 if first else 1
                blocks.append(
                    MultiscaleBlock(
                        dim,
                        dim_out,
                        num_heads=heads,
                        grid=grid,
                        q_stride=q_stride,
                        kv_stride=kv_stride,
                        mlp_ratio=mlp_ratio,
                        qkv_bias=qkv_bias,
                        residual=self.alpha_mode != "none",
                        drop_path=rates[len(blocks)],
                    )
                )
                dim, reduction = dim_out, reduction * q_stride
                grid = (-(-grid[0] // q_stride), -(-grid[1] // q_stride))
            module = f"blocks.{len(blocks) - 1}"
            self.feature_info.append({"module": module, "num_chs": dim, "reduction": reduction})
        self.blocks = nn.ModuleList(blocks)
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.norm: nn.Module = nn.LayerNorm(dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
        self._init_weights()

    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if "rel_pos" in name:
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _patch_grid(self, height: int, width: int) -> Grid:
        kernel, stride, padding = self.patch_geometry
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
        if rows < 1 or columns < 1:
            raise ShapeError(
                f"image is {height} x {width}, expected sides of at least {max(1, kernel - 2 * padding)}: resize it"
            )
        return rows, columns

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"alpha"} | {name for name, _ in self.named_parameters() if "rel_pos" in name}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        return {
            "stem": r"^patch_embed|alpha",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute every block in the backward pass."""
        self.grad_checkpointing = enable

    def set_input_size(self, img_size: int | Grid) -> None:
        """Make `img_size` the default: relative positions are resampled once, not in every forward."""
        grid = self._patch_grid(*to_2tuple(img_size))
        for module in self.modules():
            if isinstance(module, PoolingAttention):
                grid = module.set_grid(grid)

    def fuse_(self) -> ReMViT:
        """Make alpha a constant; for inference only. Returns self."""
        self._freeze_alpha()
        return self

    def _start(self, grid: Grid, like: Tensor) -> Below:
        """What the first layer finds below it: an empty history where logits are not to be kept."""
        heads, kv_stride = self.first_logits
        queries, keys = grid[0] * grid[1], -(-grid[0] // kv_stride) * -(-grid[1] // kv_stride)
        bytes_of_image = heads * queries * keys * like.element_size()
        return PoolingHistory() if self._is_linear(bytes_of_image > LINEAR_FROM_BYTES) else None

    def _block(self, index: int, x: Tensor, grid: Grid, carried: Below) -> tuple[Tensor, Grid, Below]:
        block, alpha = self.blocks[index], self._alpha(index)
        out: tuple[Tensor, Grid, Below]
        if self.grad_checkpointing and self.training:
            out = checkpoint(block, x, grid, carried, alpha)
        else:
            out = block(x, grid, carried, alpha)
        return out

    def forward_features(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Image (B, C, H, W) to normalised tokens (B, N, dim).

        return_attention: also return the carried logits of every layer, (B, heads, Nq, Nk), before softmax.
        Raises ShapeError where the image is smaller than a patch.
        """
        logits: list[Tensor] | None = [] if return_attention else None
        x = self._encode(x, logits)
        return x if logits is None else (x, logits)

    def _encode(self, x: Tensor, logits: list[Tensor] | None) -> Tensor:
        self._patch_grid(x.shape[-2], x.shape[-1])
        x, grid = self.patch_embed(x)
        carried = self._start(grid, x)
        for index in range(len(self.blocks)):
            x, grid, carried = self._block(index, x, grid, carried)
            if logits is not None and carried is not None:
                logits.append(carried.logits() if isinstance(carried, PoolingHistory) else carried.logits)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Tokens after chosen stages, as maps (B, dim, h, w) or tokens (B, h w, dim); timm's signature.

        indices: stages to take (int: the last n; None: all). norm: apply the last LayerNorm to the last.
        Raises ConfigError where `output_fmt` is neither NCHW nor NLC.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.depths), indices)
        ends = [sum(self.depths[: stage + 1]) - 1 for stage in range(len(self.depths))]
        wanted = {ends[stage] for stage in take}
        self._patch_grid(x.shape[-2], x.shape[-1])
        x, grid = self.patch_embed(x)
        carried = self._start(grid, x)
        taken: list[Tensor] = []
        for index in range(ends[last] + 1 if stop_early else len(self.blocks)):
            x, grid, carried = self._block(index, x, grid, carried)
            if index in wanted:
                y = self.norm(x) if norm and index == len(self.blocks) - 1 else x
                if output_fmt == "NCHW":
                    y = y.transpose(1, 2).reshape(y.shape[0], -1, *grid)
                taken.append(y)
        if intermediates_only:
            return taken
        complete = index == len(self.blocks) - 1
        return (self.norm(x) if complete else x), taken

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages above the last one of `indices`; returns the indices taken."""
        take, last = feature_take_indices(len(self.depths), indices)
        # The last norm has the width of the last stage and fits no other.
        prune_norm = prune_norm or last + 1 < len(self.depths)
        self.depths = self.depths[: last + 1]
        self.blocks = self.blocks[: sum(self.depths)]
        self._keep_alphas(len(self.blocks))
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return list(take)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, N, dim) to logits (B, num_classes), or to pooled features where `pre_logits`."""
        x = self.head_drop(global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=0))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W), normalised, to logits (B, num_classes)."""
        return self.forward_head(self._encode(x, None))


default_cfgs = generate_default_cfgs(
    {"remvitv2_tiny.in1k": residual_cfg(), "remvitv2_micro.untrained": {**residual_cfg(32), "crop_pct": 1.0}}
)

VARIANTS: dict[str, dict[str, Any]] = {
    "remvitv2_tiny": {"embed_dim": 96, "depths": (1, 2, 5, 2), "num_heads": 1},
    "remvitv2_micro": {
        "img_size": 32,
        "patch_kernel": 3,
        "patch_stride": 2,
        "patch_padding": 1,
        "embed_dim": 32,
        "depths": (1, 2, 2),
        "num_heads": 1,
    },
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> ReMViT:
    out_indices = kwargs.pop("out_indices", tuple(range(len(VARIANTS[name]["depths"]))))
    model: ReMViT = build_model_with_cfg(
        ReMViT,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**VARIANTS[name], **kwargs},
    )
    return model


@register_model
def remvitv2_tiny(pretrained: bool = False, **kwargs: Any) -> ReMViT:
    """ReMViTv2-T of the paper: width 96 to 768, depths 1 2 5 2."""
    return _create("remvitv2_tiny", pretrained, **kwargs)


@register_model
def remvitv2_micro(pretrained: bool = False, **kwargs: Any) -> ReMViT:
    """Small ReMViTv2 for 32 px images: patches of 2, width 32 to 128, depths 1 2 2 (ours)."""
    return _create("remvitv2_micro", pretrained, **kwargs)
