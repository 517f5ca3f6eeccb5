"""What five architectures share after their last block: a choice of pooling, and one linear layer."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from leanvit.errors import ConfigError

POOLS = ("", "avg", "avgmax", "max")


class LinearHead(nn.Module):
    """A network whose pooled tokens go through one linear layer, `head`."""

    head: nn.Module
    num_features: int
    pools: tuple[str, ...] = POOLS
    pool_hint = ""

    def _checked_pool(self, pool: str) -> str:
        if pool not in self.pools:
            raise ConfigError(f"global_pool is {pool!r}, expected one of {list(self.pools)}{self.pool_hint}")
        return pool

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a fresh one of `num_classes` (0: none)."""
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = (
            nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            if num_classes > 0
            else nn.Identity()
        )


def residual_cfg(size: int = 224) -> dict[str, Any]:
    """pretrained_cfg of an architecture of the paper for images of `size` pixels a side."""
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fixed_input_size": False,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2402.11301",
    }
