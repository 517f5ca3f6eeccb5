"""Running a model to look at it, and leaving it as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; what each was in before comes back."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextlib.contextmanager
def whole_logits(model: nn.Module) -> Iterator[None]:
    """Logits of ReViT and ReMViTv2 kept whole, where they would be computed in blocks; the setting comes back."""
    holders = [cast(Any, module) for module in model.modules() if hasattr(module, "set_attention_memory")]
    before = [holder.attention_memory for holder in holders]
    try:
        for holder in holders:
            holder.set_attention_memory("quadratic")
        yield
    finally:
        for holder, was in zip(holders, before, strict=True):
            holder.set_attention_memory(was)
