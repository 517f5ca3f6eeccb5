"""The inference form of a model."""

from __future__ import annotations

import copy
from typing import Any, cast

from torch import nn

from leanvit.errors import ModelError


def fuse(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode for inference: BatchNorm folded, alpha fixed, fastest exact path.

    The output equals the model's to 1e-4; the state dict does not, so save the checkpoint before.
    Raises ModelError for a model that has no inference form (no `fuse_` method).
    """
    if not hasattr(model, "fuse_"):
        raise ModelError(f"{type(model).__name__} has no inference form, expected a model of leanvit. Use it as it is.")
    copied = copy.deepcopy(model).eval()
    cast(Any, copied).fuse_()
    return copied
