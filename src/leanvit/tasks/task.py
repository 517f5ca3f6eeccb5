"""What a task is where torch is: one value of TrainingTask. Its half without torch is leanvit.runtime.task.

A task from outside the package is one file that makes a TrainingTask and calls `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanvit.annotations import Outputs, SceneSet
from leanvit.annotations.checks import OnProblem
from leanvit.annotations.load import SceneSplit, load_scenes
from leanvit.annotations.load import Task as Annotations
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import TrainConfig
from leanvit.data.scene_samples import SampleKind
from leanvit.errors import ConfigError, did_you_mean
from leanvit.load.own import BUILDERS

Targets = list[dict[str, Tensor]]

PartOutputs = tuple[Tensor, ...]
"""What a part of a network returns for a batch, in its order."""

Measure = Callable[[PartOutputs, PartOutputs], float]
"""How far a part's outputs (the second) are from the float ones: 0 where they are equal, more the further."""


def no_more_outputs(network: nn.Module, x: Tensor) -> Outputs:
    """A bundle returns nothing beside the task's own outputs."""
    return {}


def not_trained(network: nn.Module, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
    """`TrainingTask.losses` of a task whose networks are taken as they are. Raises ConfigError."""
    raise ConfigError(
        "networks without a classifier are taken as they are, expected a task that is trained. Train a classifier "
        "(--task classify)."
    )


def no_backbone(network: nn.Module) -> nn.Module | None:
    """All of the network learns at one rate, and nothing of it starts from a classifier."""
    return None


def given_head(config: TrainConfig) -> dict[str, Any]:
    """The head's options are those of the configuration's `head`."""
    return dict(config.head)


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What training, quantization, export and measuring have to know of a task.

    name: the key of both halves, and the value of --task. build: (info) -> network with random weights, on the CPU.
    output_names: what a bundle returns, in order. outputs: (network in eval mode, x (B, 3, H, W) float normalised)
        -> arrays by these names, as a bundle returns them.
    more_outputs: what a bundle returns beside them, because it has no threshold in it: detectors' objectness.
    losses: (network in train mode, x, targets of B images, seeds of B images) -> named losses (B,) float32, one number
        an image; all that is random in them is drawn from the image's seed.
    samples: what one sample is and how it is read; None: labelled images. annotations: those of
        which of the four tasks of load_scenes the pictures must have.
    crop_mode: how a picture becomes the network's input. features: the part of a network that is a Features, or None.
    head: (config) -> what CheckpointInfo.head keeps. keypoints: whether checkpoints keep the set's keypoint scheme.
    defaults: options of TrainConfig whose default is the task's own. options: those with a list of tasks in
        TrainConfig that this task takes as well.
    """

    name: str
    build: Callable[[CheckpointInfo], nn.Module]
    output_names: tuple[str, ...]
    outputs: Callable[[nn.Module, Tensor], Outputs]
    more_outputs: Callable[[nn.Module, Tensor], Outputs] = no_more_outputs
    losses: Callable[[nn.Module, Tensor, Targets, list[int]], dict[str, Tensor]]
    samples: SampleKind | None
    annotations: Annotations = "detect"
    crop_mode: Literal["squash", "letterbox"] = "letterbox"
    features: Callable[[nn.Module], Any] = no_backbone
    head: Callable[[TrainConfig], dict[str, Any]] = given_head
    keypoints: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()

    def load(self, data: str, split: SceneSplit, on_problem: OnProblem = "skip") -> SceneSet:
        """The annotated pictures of one split. Raises DataError, ConfigError for a task of labelled images."""
        if self.samples is None:
            raise ConfigError(f"task '{self.name}' has labelled images, expected a task of annotated pictures.")
        return load_scenes(data, split, task=self.annotations, on_problem=on_problem)


TASKS: dict[str, TrainingTask] = {}
"""Every task by its name, in the order in which they were registered."""


def register(task: TrainingTask) -> TrainingTask:
    """Add a task to the table. Raises ConfigError where the name is another task's."""
    known = TASKS.setdefault(task.name, task)
    if known is not task:
        raise ConfigError(f"task '{task.name}' is registered already, expected a new name. Call it something else.")
    BUILDERS[task.name] = task.build
    return task


def task_named(name: str) -> TrainingTask:
    """The task of that name. Raises ConfigError where none is registered under it."""
    if name not in TASKS:
        raise ConfigError(f"task is '{name}'.{did_you_mean(name, TASKS)} Expected one of: {', '.join(TASKS)}.")
    return TASKS[name]


def single_output(name: str) -> Callable[[nn.Module, Tensor], Outputs]:
    """`TrainingTask.outputs` of a network whose forward returns one tensor."""

    @torch.inference_mode()
    def outputs(network: nn.Module, x: Tensor) -> Outputs:
        return {name: network(x).float().cpu().numpy()}

    return outputs
