"""A task from outside the package, in one file: how many objects of each class are in a picture.

    import counting; from leanvit.cli import main; main()     the command line knows --task tally then

Both rows stand at the end. Head: mean over the deepest map, a linear layer, softplus. Loss: smooth L1 of the counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.annotations import Outputs, SceneSet
from leanvit.checkpoint import CheckpointInfo
from leanvit.data.scene_kinds import BOXES
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.inputs import Inputs, Options, letterboxed
from leanvit.runtime.inputs import Place as Placed
from leanvit.runtime.task import Task
from leanvit.runtime.task import register as register_row
from leanvit.tasks import TrainingTask, register
from leanvit.tasks.features import BackboneConfig, Features
from leanvit.tasks.task import Targets, single_output

Counts = dict[str, float]


class Counter(nn.Module):
    """Normalised images (B, 3, H, W) -> counts (B, classes) >= 0."""

    def __init__(self, backbone: BackboneConfig, classes: int) -> None:
        super().__init__()
        self.features = Features(backbone)
        self.counts = nn.Linear(self.features.widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return F.softplus(self.counts(self.features(x)[-1].mean((2, 3))))


def build(info: CheckpointInfo) -> nn.Module:
    return Counter(BackboneConfig(info.architecture, info.preprocess.input_size, kwargs=info.kwargs), len(info.labels))


def losses(network: nn.Module, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
    """Smooth L1 of each image: (B,)."""
    found = network(x).float()
    # Labels of boxes count from 1: torchvision keeps 0 for what is no object.
    truth = torch.stack([torch.bincount(target["labels"] - 1, minlength=found.shape[1]) for target in targets])
    return {"loss_count": F.smooth_l1_loss(found, truth.to(found.dtype), reduction="none").mean(1)}


def decode(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> Counts:
    return {label: float(count) for label, count in zip(manifest.labels, outputs["counts"][0], strict=True)}


def line(found: Counts, manifest: Manifest) -> dict[str, Any]:
    return {"counts": {label: round(count, 3) for label, count in found.items()}}


def text(found: Counts, manifest: Manifest) -> str:
    return ", ".join(f"{count:.1f} {label}" for label, count in found.items())


def measure(data: SceneSet, batches: Iterable[tuple[Outputs, Sequence[Placed]]]) -> dict[str, Any]:
    """`mae`: mean over pictures and classes of how far a count is off."""
    apart = []
    for outputs, places in batches:
        for counts, place in zip(outputs["counts"], places, strict=True):
            labels = [one.label for one in data.scenes[place.index].instances if not one.crowd]
            apart.append(np.abs(counts - np.bincount(labels, minlength=len(counts))).mean())
    return {"mae": float(np.mean(apart)), "pictures": len(apart)}


TALLY_ROW = register_row(
    Task(
        name="tally", metric="mae", points=1.0, higher_is_better=False, outputs=("counts",), continuous="counts",
        data="scenes", inputs=letterboxed, decode=decode, line=line, text=text, measure=measure,
    )
)  # fmt: skip
TALLY = register(
    TrainingTask(
        name="tally", build=build, output_names=("counts",), outputs=single_output("counts"), losses=losses,
        samples=BOXES, features=lambda network: cast(Any, network).features,
    )
)  # fmt: skip
