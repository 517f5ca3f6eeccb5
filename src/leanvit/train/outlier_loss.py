"""A loss that keeps activations without outliers, for a network that is to be quantized afterwards.

TWEO (arXiv 2511.23225) adds the mean over blocks of the scaled fourth power of what they return:

    loss = weight / L  sum_l  E[(|x_l| / 3)^4]

Values within about 3 cost next to nothing, one of a hundred costs as much as a million of them. Here x_l is what each
LayerNorm reads: in a pre-norm transformer the residual stream before and between the halves of its blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from leanvit.errors import ConfigError

SCALE, POWER = 3.0, 4
"""tau and p of TWEO."""


class OutlierLoss:
    """The loss of what a network's LayerNorms have read in its last forward pass in training mode."""

    def __init__(self, model: nn.Module) -> None:
        """Watch the norms of `model`; raises ConfigError where it has none."""
        self.found: list[Tensor] = []
        self.complete = True
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
        if not norms:
            raise ConfigError(
                f"outlier_weight is set, but {type(model).__name__} has no LayerNorm, expected a transformer. "
                "Leave --outlier-weight out."
            )
        for norm in norms:
            norm.register_forward_pre_hook(self._see)

    def begin(self) -> None:
        """A forward pass begins: forget what was read before."""
        self.found, self.complete = [], False

    def _see(self, norm: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not norm.training:
            return
        with torch.autocast(arguments[0].device.type, enabled=False):
            powers = (arguments[0].float() / SCALE).pow(POWER)
        # Where activations are computed again in the backward pass, all of it has to be; it is known already.
        if not self.complete:
            self.found.append(powers)

    def losses(self, images: int) -> Tensor:
        """The loss of each image of the pass: (images,), float32. Images come first in what norms read, windows of one
        together."""
        self.complete = True
        shares = [powers.reshape(images, -1).mean(1) for powers in self.found]
        self.found = []
        return torch.stack(shares).mean(0)
