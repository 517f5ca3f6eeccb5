"""The network around the cells of ViTAE and ViTAEv2: stages, pooling, a classifier, and timm's contract."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, Self

import torch
from timm.layers import calculate_drop_path_rates, global_pool_nlc, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from leanvit.errors import ConfigError, ShapeError
from leanvit.models._cells import Cell, Grid, ParallelConv, as_map, as_tokens
from leanvit.models._head import LinearHead

DropPathRule = Literal["linear", "official"]

UNDECAYED = ("w", "cls_token", "pos_embed", "relative_position_bias_table")
"""Last names of parameters without weight decay, beside biases and norms, which timm leaves out itself."""


def drop_path_rates(rate: float, depths: Sequence[int], rule: DropPathRule) -> list[list[float]]:
    """Drop-path rate of every normal cell, by stage.

    rule: "linear" grows from 0 to `rate` over all cells; "official" is that of the authors' program, where
    stage i starts again at the place that the depth of stage i - 1 alone gives.
    Raises ConfigError for another rule.
    """
    if rule not in ("linear", "official"):
        raise ConfigError(f"drop_path_rule is {rule!r}, expected 'linear' or 'official'")
    if rule == "linear":
        return [list(stage) for stage in calculate_drop_path_rates(rate, list(depths), stagewise=True)]
    flat = calculate_drop_path_rates(rate, sum(depths))
    return [flat[before : before + depth] for before, depth in pairwise((0, *depths))]


def check_lengths(**by_stage: Sequence[Any]) -> None:
    """Raise ConfigError unless every option that has one entry per stage has as many as the first."""
    (first, reference), *others = by_stage.items()
    for name, values in others:
        if len(values) != len(reference):
            raise ConfigError(f"{name} has {len(values)} entries, expected {len(reference)}, as {first} has")


class CellNet(LinearHead):
    """What ViTAE and ViTAEv2 share: a list of stages, pooling, a classifier, timm's contract.

    A subclass sets `stages` and `feature_info` and then calls `_finish`. `forward_intermediates` counts
    `stages`; a stage is any module that takes (tokens, grid) to (tokens, grid).
    """

    stages: nn.ModuleList
    feature_info: list[dict[str, Any]]
    num_prefix_tokens = 0

    def _finish(self, num_classes: int, num_features: int, in_chans: int, global_pool: str, drop: float) -> None:
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = num_features
        self.in_chans = in_chans
        self.grad_checkpointing = False
        self.global_pool = self._checked_pool(global_pool)
        self.fc_norm: nn.Module = nn.Identity()
        self.head_drop = nn.Dropout(drop)
        self.head = nn.Linear(num_features, num_classes) if num_classes > 0 else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Full names of the parameters that weight decay must leave alone."""
        return {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in UNDECAYED}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that group parameters by depth, for layer-wise learning rate decay."""
        fine = [(r"^stages\.(\d+)\.reduction", None), (r"^stages\.(\d+)\.blocks\.(\d+)", None)]
        return {"stem": r"^stages\.0\.reduction", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory: recompute every cell in the backward pass."""
        self.grad_checkpointing = enable
        for module in self.modules():
            if isinstance(module, Cell):
                module.grad_checkpointing = enable

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Accepted for timm's contract: no weight depends on the image size."""

    def fuse_(self) -> Self:
        """Inference form, in place: BatchNorm folded into convolutions, their weights channels-last.

        Returns the model in eval mode; its output is that of the definition to float rounding.
        """
        for module in self.modules():
            if isinstance(module, ParallelConv):
                module.fuse_()
        return self.eval().to(memory_format=torch.channels_last)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Image (B, C, H, W) to what the first stage takes. Raises ShapeError for another shape."""
        if x.dim() != 4 or x.shape[1] != self.in_chans or not (x.shape[2] and x.shape[3]):
            raise ShapeError(
                f"input has shape {tuple(x.shape)}, expected (B, {self.in_chans}, H, W): "
                "give a batch of images, or build the model with another in_chans"
            )
        return as_tokens(x.contiguous(memory_format=torch.channels_last)), (x.shape[2], x.shape[3])

    def _features(self, x: Tensor, grid: Grid) -> Tensor:
        """Tokens of the last stage in the form that `forward_features` returns."""
        return as_map(x, grid)

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W) to the last map (B, dim, h, w), channels-last in memory."""
        x, grid = self._embed(x)
        for stage in self.stages:
            x, grid = stage(x, grid)
        return self._features(x, grid)

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
        """Outputs of chosen stages, as maps (B, dim, h, w) or tokens (B, h w, dim); timm's signature.

        indices: stages to take (int: the last n; None: all). norm: without effect, as no norm is on tokens.
        return_prefix_tokens: return (map, class token) pairs. intermediates_only: leave the features out.
        Raises ConfigError where `output_fmt` is neither NCHW nor NLC.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt is {output_fmt!r}, expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.stages), indices)
        x, grid = self._embed(x)
        intermediates: list[Any] = []
        for index, stage in enumerate(self.stages[: last + 1] if stop_early else self.stages):
            x, grid = stage(x, grid)
            if index in take:
                prefix, tokens = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
                out = as_map(tokens, grid) if output_fmt == "NCHW" else tokens
                intermediates.append((out, prefix) if return_prefix_tokens and self.num_prefix_tokens else out)
        return intermediates if intermediates_only else (self._features(x, grid), intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] | tuple[int, ...] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages above the last one of `indices`; returns the indices taken."""
        take, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return list(take)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (B, num_classes), or to pooled features where `pre_logits`.

        Without pooling every place is classified: (B, num_classes, h, w) from a map, (B, N, num_classes)
        from tokens.
        """
        if self.global_pool:
            tokens = as_tokens(x) if x.dim() == 4 else x
            x = global_pool_nlc(tokens, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
            x = self.fc_norm(x)
        x = self.head_drop(x)
        if pre_logits or self.num_classes == 0:
            return x
        return self.head(x) if x.dim() < 4 else self.head(x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, H, W), normalised, to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
