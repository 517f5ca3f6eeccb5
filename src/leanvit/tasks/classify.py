"""Classification: a timm model and its own head; labels are classes of whole images."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.config.tasks import IMAGES_DEFAULTS
from leanvit.load.api import build_classifier
from leanvit.tasks.task import Targets, TrainingTask, register, single_output


def _losses(network: nn.Module, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
    labels = torch.stack([target["label"] for target in targets])
    return {"loss": F.cross_entropy(network(x).float(), labels, reduction="none")}


CLASSIFY = register(
    TrainingTask(
        name="classify",
        build=build_classifier,
        output_names=("logits",),
        outputs=single_output("logits"),
        losses=_losses,
        samples=None,
        defaults=IMAGES_DEFAULTS,
    )
)
