"""What each scale contributes to an ExShortcut's classifier: accuracy with its channels set to zero.

Yang, Kwon, Kim, "ExMobileViT", arXiv 2309.01310, describes the shortcut; the ablation is ours. Nothing is trained
again, so it tells what this classifier relies on, not what a network without that scale could learn.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanvit.analysis.running import evaluating
from leanvit.errors import DataError, ModelError
from leanvit.models.exmobilevit import ExShortcut, ExShortcutNet


def shortcut_ablation(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Top-1 of an ExShortcut model as it is, without each scale, without all early scales, and with none but each.

    batches: (images (B, 3, H, W) normalised, labels (B,)), both on the model's device.
    Returns JSON values: images, and rows of {"without": [strides of the scales that are zero], "channels",
    "correct", "top1" in percent}, the first as it is. Raises ModelError where the model has no ExShortcut over
    several scales, DataError without images.
    """
    net = require_scales(model)
    strides, channels = _scales(net)
    cases = _cases(strides)
    masks = [torch.cat([torch.full((n,), float(s not in case)) for s, n in zip(strides, channels, strict=True)])
             for case in cases]  # fmt: skip
    correct, count = [0] * len(cases), 0
    with torch.inference_mode(), evaluating(model):
        for images, labels in batches:
            features = net.forward_head(net.forward_features(images), pre_logits=True)
            for index, mask in enumerate(masks):
                correct[index] += int((net.fc(features * mask.to(features)).argmax(1) == labels).sum())
            count += len(labels)
    if not count:
        raise DataError("no images to measure the shortcut on, expected at least one. Check --data.")
    width = dict(zip(strides, channels, strict=True))
    rows = [
        {"without": list(case), "channels": sum(width[s] for s in case), "correct": hits, "top1": 100.0 * hits / count}
        for case, hits in zip(cases, correct, strict=True)
    ]
    return {"images": count, "strides": strides, "rows": rows}


def require_scales(model: nn.Module) -> ExShortcutNet:
    """The model as a network with an ExShortcut over several scales; raises ModelError where it is none."""
    if not isinstance(model, ExShortcutNet) or not isinstance(model.shortcut, ExShortcut) or len(model.taps) < 2:
        raise ModelError(
            f"{type(model).__name__} has no ExShortcut over several scales, expected one to leave scales out of. "
            "Choose exmobilevit_*, or add one to a model with leanvit.models.add_exshortcut."
        )
    return model


def _scales(net: ExShortcutNet) -> tuple[list[int], list[int]]:
    """Of each scale that the classifier sees its stride and its channels."""
    strides = [int(net.feature_info[tap]["reduction"]) for tap in net.taps]
    channels = [int(conv.conv.out_channels) for conv in cast(Any, net.shortcut).convs]
    return strides, channels


def _cases(strides: list[int]) -> list[tuple[int, ...]]:
    """Scales to set to zero, by stride: none, each, all early ones."""
    early = tuple(strides[:-1])
    return [(), *((stride,) for stride in strides), *([early] if len(early) > 1 else [])]
