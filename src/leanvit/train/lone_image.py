"""BatchNorm where a step holds one image and features are pooled: there is no variance of one value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextlib.contextmanager
def running_averages(model: nn.Module, images: int) -> Iterator[None]:
    """Let BatchNorm layers that would see a single value a channel normalise by their running averages.

    model: in training mode. images: of the forward pass inside; with more than one, nothing is changed. The last batch
    of an epoch is as long as the data leaves it, and PyTorch raises for such a layer (LeViT's heads).
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training] if images == 1 else []
    hooks = [norm.register_forward_pre_hook(_settle) for norm in norms]
    try:
        yield
    finally:
        for hook, norm in zip(hooks, norms, strict=True):
            hook.remove()
            norm.train()


def _settle(norm: nn.Module, inputs: tuple[Any, ...]) -> None:
    x = inputs[0]
    if x.numel() == x.shape[1]:
        norm.eval()
