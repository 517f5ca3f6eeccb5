"""ReSwin: the Swin transformer with ReViT's attention residual.

Attention runs in windows of M x M tokens, shifted by half a window in every second block. The logits of
all windows are carried from block to block:

    S_l = Q_l K_l^T / sqrt(d) + bias_l
    R_1 = S_1,   R_l = alpha S_l + (1 - alpha) match(R_(l-1)),   out_l = softmax(R_l + mask_l) V_l

alpha is the constant 0.5 in the authors' program. `match` is theirs by default (`residual="index"`): the
logits of all windows and heads, in order, resampled to the next block's number (nearest), so that a shifted
window meets the unshifted one of the same index. `residual="aligned"` is ours: logits of the same pair of
tokens meet; a pair that shared no window below has its own logits alone, and so has a new stage.

All layers but attention see tokens one by one. Tokens therefore stay in window order for a whole stage, and
one gather takes them from one block's windows to the next's.

Diko, Avola, Cascio, Cinque, "ReViT: Enhancing Vision Transformers Feature Diversity with Attention
Residual Connections", Pattern Recognition 2024, arXiv 2402.11301. Swin: Liu et al., arXiv 2103.14030.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, calculate_drop_path_rates, global_pool_nlc, trunc_normal_
from timm.layers.helpers import to_2tuple
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from leanvit.errors import ConfigError
from leanvit.models._attention import (
    Alpha,
    AlphaMode,
    Grid,
    ResidualModel,
    Windows,
    make_windows,
    match_by_index,
    match_by_pair,
)
from leanvit.models._head import LinearHead, residual_cfg
from leanvit.models._paper import PaperResult
from leanvit.models._pretrained import fashion_mnist_cfg
from leanvit.models._window_attention import WindowAttention

Residual = Literal["index", "aligned"]
PAPER: dict[str, PaperResult] = {
    "reswin_tiny_patch4_window7_224": PaperResult(params=28_288_354, macs=4.49, top1=81.5),
}


class WindowBlock(nn.Module):
    """Pre-norm transformer block on tokens in window order."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        window: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        residual: bool = True,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, num_heads=num_heads, window=window, qkv_bias=qkv_bias, residual=residual)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(
        self, x: Tensor, mask: Tensor | None, previous: Tensor | None, known: Tensor | None, alpha: Alpha
    ) -> tuple[Tensor, Tensor]:
        """Tokens and logits to mix with in, tokens and logits to carry on out."""
        y, logits = self.attn(self.norm1(x), mask, previous, known, alpha)
        x = x + self.drop_path1(y)
        return x + self.drop_path2(self.mlp(self.norm2(x))), logits


class PatchMerging(nn.Module):
    """Four neighbouring tokens become one of twice the width: (B, H, W, C) to (B, H / 2, W / 2, 2 C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, rows, columns, dim = x.shape
        if rows % 2 or columns % 2:
            x = F.pad(x, (0, 0, 0, columns % 2, 0, rows % 2))
        x = x.reshape(batch, (rows + 1) // 2, 2, (columns + 1) // 2, 2, dim).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(x.flatten(3)))


class PatchEmbed(nn.Module):
    """Patches by one strided convolution, normalised: (B, C, H, W) to (B, H / p, W / p, dim)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        down, right = (-side % self.patch_size for side in x.shape[-2:])
        if down or right:
            x = F.pad(x, (0, right, 0, down))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Stage(nn.Module):
    """Blocks of one resolution, alternately plain and shifted, then patch merging."""

    def __init__(
        self, blocks: list[WindowBlock], *, window: int, residual: Residual, downsample: PatchMerging | None
    ) -> None:
        super().__init__()
        self.window = window
        self.aligned = residual == "aligned"
        self.num_heads = blocks[0].attn.num_heads
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.grad_checkpointing = False
        self.grid: Grid = (0, 0)

    def set_grid(self, grid: Grid) -> None:
        """Make `grid` the default one: its windows are computed once, not in every forward."""
        self.grid = grid
        kinds = make_windows(grid, self.window, self.aligned, next(self.parameters()).device)
        for name, windows in zip(("plain", "shifted"), kinds, strict=True):
            for field, tensor in windows._asdict().items():
                self.register_buffer(f"{name}_{field}", tensor, persistent=False)

    def _windows(self, grid: Grid, device: torch.device) -> tuple[Windows, Windows]:
        if grid != self.grid:
            return make_windows(grid, self.window, self.aligned, device)
        plain, shifted = (
            Windows(*(getattr(self, f"{name}_{field}") for field in Windows._fields)) for name in ("plain", "shifted")
        )
        return plain, shifted

    def _match(self, carried: Tensor, here: Windows, index: int) -> Tensor | None:
        if not self.aligned:
            area = self.window * self.window
            return match_by_index(carried, here.order.shape[0] // area, self.num_heads, area)
        return None if index == 0 or here.source is None else match_by_pair(carried, here.source)

    def forward(
        self, x: Tensor, carried: Tensor | None, alphas: list[Alpha], logits: list[Tensor] | None
    ) -> tuple[Tensor, Tensor | None]:
        """x: (B, H, W, C); carried: logits of the block below, (B, windows, heads, M^2, M^2), or None.

        Returns (B, H, W, C), not yet merged, and the logits of the last block; `logits` collects all.
        """
        _, rows, columns, dim = x.shape
        kinds = self._windows((rows, columns), x.device)
        down, right = -rows % self.window, -columns % self.window
        if down or right:
            x = F.pad(x, (0, 0, 0, right, 0, down))
        x = x.flatten(1, 2)
        for index, block in enumerate(self.blocks):
            here = kinds[index % 2]
            step = here.order if index == 0 else here.step
            x = x if step is None else x[:, step]
            previous = None
            if carried is not None:
                previous = self._match(carried, here, index)
            arguments = (x, here.mask, previous, here.known, alphas[index])
            recompute = self.grad_checkpointing and self.training
            x, carried = checkpoint(block, *arguments) if recompute else block(*arguments)
            if logits is not None and carried is not None:
                logits.append(carried.flatten(0, 1))
        x = x[:, here.inverse].reshape(-1, rows + down, columns + right, dim)
        return (x[:, :rows, :columns] if down or right else x), carried


class ReSwin(ResidualModel, LinearHead):
    """ReSwin image classifier.

    window_size: tokens along a side of a window; a stage whose grid at `img_size` is smaller takes its size.
    residual: "index" (the authors') or "aligned" (ours), see the module.
    alpha, alpha_init: as in ReViT: "fixed" (the authors'), "learned", "per_layer" or "none" (plain Swin).
    Images of any size: padded to whole patches and windows, padding is no key.
    Raises ConfigError where an option is unknown. Source: arXiv 2402.11301.
    """

    def __init__(
        self,
        *,
        img_size: int | Grid = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        residual: Residual = "index",
        alpha: AlphaMode | None = "fixed",
        alpha_init: float = 0.5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if residual not in get_args(Residual):
            raise ConfigError(f"residual is {residual!r}, expected one of {get_args(Residual)}")
        if len(depths) != len(num_heads):
            raise ConfigError(f"depths {depths} and num_heads {num_heads} are of unequal length")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = self._checked_pool(global_pool)
        self.depths = tuple(depths)
        self._set_alpha(alpha, alpha_init, sum(depths))
        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size)
        rates = calculate_drop_path_rates(drop_path_rate, sum(depths))
        grid = self._patch_grid(img_size)
        layers: list[Stage] = []
        for stage, (depth, heads) in enumerate(zip(depths, num_heads, strict=True)):
            dim, window = embed_dim * 2**stage, min(window_size, *grid)
            first = sum(depths[:stage])
            blocks = [
                WindowBlock(
                    dim,
                    num_heads=heads,
                    window=window,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    residual=self.alpha_mode != "none",
                    drop_path=rates[first + index],
                )
                for index in range(depth)
            ]
            merging = PatchMerging(dim) if stage < len(depths) - 1 else None
            layers.append(Stage(blocks, window=window, residual=residual, downsample=merging))
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))
        self.layers = nn.ModuleList(layers)
        self.feature_info = [
            {"module": f"layers.{stage}", "num_chs": embed_dim * 2**stage, "reduction": patch_size * 2**stage}
            for stage in range(len(depths))
        ]
        self.num_features = self.head_hidden_size = self.embed_dim = dim
        self.norm: nn.Module = nn.LayerNorm(dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
        self.set_input_size(img_size)
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, WindowAttention):
                trunc_normal_(module.relative_position_bias_table, std=0.02)
            elif isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _patch_grid(self, img_size: int | Grid) -> Grid:
        rows, columns = (-(-side // self.patch_embed.patch_size) for side in to_2tuple(img_size))
        return rows, columns

    def set_input_size(self, img_size: int | Grid) -> None:
        """Make `img_size` the default: windows and masks are computed once, not in every forward."""
        grid = self._patch_grid(img_size)
        for stage in self._stages():
            stage.set_grid(grid)
            grid = (-(-grid[0] // 2), -(-grid[1] // 2))

    def _stages(self) -> list[Stage]:
        return [stage for stage in self.layers if isinstance(stage, Stage)]

    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay must leave alone."""
        return {"alpha"} | {n for n, _ in self.named_parameters() if "relative_position_bias_table" in n}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        blocks = r"^layers\.(\d+)" if coarse else r"^layers\.(\d+)\.blocks\.(\d+)"
        merging = (r"^layers\.(\d+)\.downsample", (0,))
        return {
            "stem": r"^patch_embed|alpha",
            "blocks": [(blocks, None), *([] if coarse else [merging]), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute every block in the backward pass."""
        for stage in self._stages():
            stage.grad_checkpointing = enable

    def fuse_(self) -> ReSwin:
        """Make alpha a constant; for inference only. Returns self."""
        self._freeze_alpha()
        return self

    def _run(
        self, x: Tensor, stages: int, logits: list[Tensor] | None = None, taken: dict[int, Tensor] | None = None
    ) -> Tensor:
        """Image to (B, H, W, C) after the first `stages`; `taken` collects what its keys ask for."""
        x = self.patch_embed(x)
        carried: Tensor | None = None
        layers, first = self._stages(), 0
        for index, stage in enumerate(layers[:stages]):
            alphas = [self._alpha(first + i) for i in range(len(stage.blocks))]
            first += len(alphas)
            x, carried = stage(x, carried, alphas, logits)
            if taken is not None and index in taken:
                taken[index] = x
            if stage.downsample is not None and index + 1 < min(stages, len(layers)):
                x = stage.downsample(x)
        return x

    def forward_features(self, x: Tensor, return_attention: bool = False) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Image (B, C, H, W) to normalised tokens (B, N, dim).

        return_attention: also return the carried logits of every block, (B windows, heads, M^2, M^2), with
        relative position bias, before mask and softmax.
        """
        logits: list[Tensor] | None = [] if return_attention else None
        x = self.norm(self._run(x, len(self.layers), logits).flatten(1, 2))
        return x if logits is None else (x, logits)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps after chosen stages, (B, dim, h, w) or (B, h, w, dim); timm's signature.

        indices: stages to take (int: the last n; None: all). norm: apply the last LayerNorm to the last.
        Raises ConfigError where `output_fmt` is neither NCHW nor NHWC.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ConfigError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NHWC'")
        take, last = feature_take_indices(len(self.layers), indices)
        stages = last + 1 if stop_early else len(self.layers)
        taken = dict.fromkeys(take, x)
        x = self._run(x, stages, None, taken)
        complete = stages == len(self.depths)
        final = self.norm(x) if complete else x
        maps = [final if norm and i == len(self.depths) - 1 else taken[i] for i in take]
        if output_fmt == "NCHW":
            maps = [y.permute(0, 3, 1, 2).contiguous() for y in maps]
        return maps if intermediates_only else (final.flatten(1, 2), maps)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages above the last one of `indices`; returns the indices taken."""
        take, last = feature_take_indices(len(self.layers), indices)
        # The last norm has the width of the last stage and fits no other.
        prune_norm = prune_norm or last + 1 < len(self.layers)
        self.layers = self.layers[: last + 1]
        self.depths = self.depths[: last + 1]
        self._stages()[-1].downsample = None
        self._keep_alphas(sum(self.depths))
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
        return self.forward_head(self.norm(self._run(x, len(self.layers)).flatten(1, 2)))


default_cfgs = generate_default_cfgs(
    {
        "reswin_tiny_patch4_window7_224.in1k": residual_cfg(),
        "reswin_micro.fmnist": {**residual_cfg(32), **fashion_mnist_cfg("reswin_micro")},
    }
)

VARIANTS: dict[str, dict[str, Any]] = {
    "reswin_tiny_patch4_window7_224": {
        "embed_dim": 96,
        "depths": (2, 2, 6, 2),
        "num_heads": (3, 6, 12, 24),
        "window_size": 7,
    },
    "reswin_micro": {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": (2, 2, 2),
        "num_heads": (1, 2, 4),
        "window_size": 4,
    },
}


def _create(name: str, pretrained: bool, **kwargs: Any) -> ReSwin:
    out_indices = kwargs.pop("out_indices", tuple(range(len(VARIANTS[name]["depths"]))))
    model: ReSwin = build_model_with_cfg(
        ReSwin,
        name,
        pretrained,
        feature_cfg={"out_indices": out_indices, "feature_cls": "getter"},
        **{**VARIANTS[name], **kwargs},
    )
    return model


@register_model
def reswin_tiny_patch4_window7_224(pretrained: bool = False, **kwargs: Any) -> ReSwin:
    """ReSwin-T of the paper: width 96 to 768, depths 2 2 6 2, windows of 7."""
    return _create("reswin_tiny_patch4_window7_224", pretrained, **kwargs)


@register_model
def reswin_micro(pretrained: bool = False, **kwargs: Any) -> ReSwin:
    """Small ReSwin for 32 px images: patches of 2, width 32 to 128, depths 2 2 2, windows of 4 (ours)."""
    return _create("reswin_micro", pretrained, **kwargs)
