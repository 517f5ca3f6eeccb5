"""Sigmoid outputs: networks whose outputs are labels of their own, and networks with one logit between two labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.config.tasks import MULTILABEL_DEFAULTS
from leanvit.load.api import build_classifier
from leanvit.tasks.task import Targets, TrainingTask, not_trained, register, single_output


def _losses(network: nn.Module, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
    """Binary cross entropy, mean over the labels of an image."""
    labels = torch.stack([target["label"] for target in targets]).float()
    return {"loss": F.binary_cross_entropy_with_logits(network(x).float(), labels, reduction="none").mean(1)}


MULTILABEL = register(
    TrainingTask(
        name="multilabel", build=build_classifier, output_names=("logits",), outputs=single_output("logits"),
        losses=_losses, samples=None, defaults=MULTILABEL_DEFAULTS,
    )
)  # fmt: skip
BINARY = register(
    TrainingTask(
        name="binary", build=build_classifier, output_names=("logits",), outputs=single_output("logits"),
        losses=not_trained, samples=None,
    )
)  # fmt: skip
