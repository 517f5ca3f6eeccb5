"""Effective receptive field: which pixels the middle of the last map really depends on.

    E[y, x] = mean over images of |d s / d input[y, x]|,   s = sum over channels c of (+-1)_c F[c, middle]

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks", NeurIPS 2016,
arXiv 1701.04128, take one channel. With a random sign for each channel no part of a sum over channels is lost to a
norm, which keeps the plain sum constant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanvit.analysis.running import evaluating
from leanvit.errors import ModelError


def last_map(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The function from images to a timm model's last map (B, C, h, w), before the final norm.

    Raises ModelError where the model has no forward_intermediates.
    """
    if not hasattr(model, "forward_intermediates"):
        raise ModelError(
            f"{type(model).__name__} returns no intermediate maps, expected timm's forward_intermediates. Choose a "
            "model of timm or leanvit."
        )
    return lambda x: cast(Any, model).forward_intermediates(x, indices=1, intermediates_only=True)[-1]


def effective_field(
    model: nn.Module, x: Tensor, *, features: Callable[[Tensor], Tensor] | None = None, seed: int = 0
) -> Tensor:
    """Effective receptive field of each image: (B, H, W), mean over input channels of the absolute gradient.

    model: run in eval mode and left as it was. x: (B, 3, H, W) normalised. features: returns the map
    (B, C, h, w), by default `last_map(model)`; its middle is [h // 2, w // 2]. seed: of the signs.
    Raises ModelError where the map has no gradient.
    """
    features = features or last_map(model)
    with evaluating(model), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        output = features(x)
        middle = output[:, :, output.shape[2] // 2, output.shape[3] // 2]
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, middle.shape, generator=generator).to(middle) * 2 - 1
        if not middle.requires_grad:
            raise ModelError(f"{type(model).__name__}: its last map does not depend on the image. Leave the field out.")
        (gradient,) = torch.autograd.grad((middle * signs).sum(), x)
    return gradient.abs().mean(1)


def area_share(field: Tensor, share: float) -> float:
    """Share of the image, in (0, 1], that the fewest pixels holding `share` of a field (H, W) take.

    Raises ModelError where the field is zero everywhere.
    """
    values = field.double().flatten().sort(descending=True).values
    total = values.sum()
    if not total > 0:
        raise ModelError("the middle of the last map has no gradient, expected some. Leave the field out.")
    # Rounding must not ask for one pixel more where the share is reached exactly.
    reached = values.cumsum(0) >= share * total * (1 - 1e-9)
    return (int(reached.int().argmax()) + 1) / values.numel()
