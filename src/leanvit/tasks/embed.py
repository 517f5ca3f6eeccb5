"""Embeddings: a network without a classifier, whose pooled features are what is wanted. It is taken as it is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from leanvit.annotations import Outputs
from leanvit.errors import ShapeError
from leanvit.load.api import build_classifier
from leanvit.tasks.task import TrainingTask, not_trained, register


@torch.inference_mode()
def _outputs(network: nn.Module, x: Tensor) -> Outputs:
    found = network(x)
    if found.dim() != 2:
        raise ShapeError(
            f"the network returns {tuple(found.shape)} for {len(x)} images, expected a vector an image, (images, D). "
            "Build it with pooling: timm's global_pool='avg' or 'token'."
        )
    return {"embeddings": found.float().cpu().numpy()}


EMBED = register(
    TrainingTask(
        name="embed",
        build=build_classifier,
        output_names=("embeddings",),
        outputs=_outputs,
        losses=not_trained,
        samples=None,
    )
)
