"""Running a model to look at it, and leaving it as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and ReViT's logits kept whole; what each was set to before comes back."""
    training = {module: module.training for module in model.modules()}
    linear = [module for module in model.modules() if hasattr(module, "set_attention_memory")]
    memory = [cast(Any, module).attention_memory for module in linear]
    try:
        model.eval()
        for module in linear:
            cast(Any, module).set_attention_memory("quadratic")
        yield
    finally:
        for module, was in training.items():
            module.training = was
        for module, was in zip(linear, memory, strict=True):
            cast(Any, module).set_attention_memory(was)
