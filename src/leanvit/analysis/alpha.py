"""Residual weight of attention: how much of its own logits each layer uses, and how much of those below.

    R_l = alpha_l S_l + (1 - alpha_l) R_(l-1)

Diko et al., "ReViT", 2024, arXiv 2402.11301, Eq. 4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from leanvit.errors import ModelError
from leanvit.models._attention import ResidualModel


def learned_alpha(model: nn.Module) -> dict[str, Any]:
    """alpha of every layer above the first, and how much the first layer's logits still count in each.

    Returns {"mode": "learned" | "per_layer" | "fixed", "alpha": [float], "first": [float]}: values of layers 2, 3,
    ...; `first` is the product of (1 - alpha) so far. Raises ModelError where attention has no residual.
    """
    holder = next((module for module in model.modules() if isinstance(module, ResidualModel)), None)
    if holder is None or holder.alpha_mode == "none":
        raise ModelError(
            f"{type(model).__name__} has no residual attention, expected a model with alpha. Choose revit_*, "
            "remvitv2_* or reswin_*, built with another alpha than 'none'."
        )
    alphas = (holder._alpha(index) for index in range(1, len(holder.constant_alphas)))
    values = [float(alpha.detach()) if isinstance(alpha, Tensor) else alpha for alpha in alphas]
    first, share = [], 1.0
    for value in values:
        share *= 1.0 - value
        first.append(share)
    return {"mode": holder.alpha_mode, "alpha": values, "first": first}
