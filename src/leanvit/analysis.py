"""Insight into a model: where its attention goes, layer by layer."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from leanvit.errors import ModelError


@torch.inference_mode()
def received_attention(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Attention that each patch receives, per layer: mean over heads and queries of softmax(logits).

    model: one whose forward_features takes return_attention=True and gives square token grids (ReViT).
    x: (B, 3, H, W) normalised. Returns one (B, rows, columns) tensor a layer; each map sums to 1, or to less
    where a class token receives the rest. Raises ModelError where the model can't return attention.
    """
    try:
        _, logits = cast(Any, model).forward_features(x, return_attention=True)
    except (AttributeError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} does not return attention, expected forward_features(x, return_attention=True) "
            "as in revit_*. Choose such a model."
        ) from error
    patch = cast(Any, model).patch_embed.patch_size
    rows, columns = x.shape[-2] // patch[0], x.shape[-1] // patch[1]
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    maps = []
    for layer in logits:
        received = layer.float().softmax(-1).mean(dim=(1, 2))[:, prefix:]
        maps.append(received.reshape(len(x), rows, columns))
    return maps
