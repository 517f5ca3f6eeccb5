"""Distillation: a student learns what a teacher says of an image beside what its label says.

    loss = (1 - alpha) H(student, label) + alpha D(student, teacher)

D is tau^2 KL(teacher / tau || student / tau) for soft labels (Hinton et al., arXiv 1503.02531) and the cross-entropy
with the teacher's top class for hard ones (DeiT, arXiv 2012.12877, eq. 3), summed over classes. A student with
a distillation token leaves the teacher's part to that token's classifier. DeiT's program divides the soft loss
by the number of classes as well; this does not, as Hinton's doesn't.

Hints (FitNets, arXiv 1412.6550) add the squared distance of the last feature maps, each position normalised over its
channels, after a learned 1 x 1 projection of the student's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.config import Preprocess, TrainConfig
from leanvit.data.loader import check_classes
from leanvit.errors import ConfigError
from leanvit.load.api import load_classifier
from leanvit.load.labels import are_numbered


@dataclass(frozen=True)
class Outputs:
    """What a network says of B images.

    logits, distilled: (B, classes); the second of the distillation token, where there is one.
    features: (B, C, h, w) last feature map, where hints were asked for.
    """

    logits: Tensor
    distilled: Tensor | None = None
    features: Tensor | None = None


class Student(nn.Module):
    """A network that returns all that a teacher compares: forward(x) -> Outputs as a tuple of tensors.

    Raises ConfigError where hints are asked for and the model returns no feature maps.
    """

    def __init__(self, model: nn.Module, size: tuple[int, int], teacher_channels: int | None = None) -> None:
        """size: (height, width) of the input. teacher_channels: of its last feature map, where hints are learned."""
        super().__init__()
        self.model = model
        self.project: nn.Module | None = None
        if teacher_channels is not None:
            self.project = nn.Conv2d(_channels(model, size), teacher_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x: (B, 3, H, W) normalised. A tuple, because DistributedDataParallel looks for tensors in it."""
        features: Tensor | None = None
        with _both_outputs(self.model, active=self.training):
            if self.project is None:
                logits = self.model(x)
            else:
                final, features = _last_map(self.model, x)
                logits = cast(Any, self.model).forward_head(final)
                features = self.project(features)
        first, second = logits if isinstance(logits, tuple) else (logits, None)
        return first, second, features


@contextlib.contextmanager
def _both_outputs(model: nn.Module, *, active: bool) -> Iterator[None]:
    """A model with a distillation token returns both of its outputs, and not their mean."""
    switch = getattr(model, "set_distilled_training", None)
    if switch is None or not active:
        yield
        return
    switch(True)
    try:
        yield
    finally:
        switch(False)


def _last_map(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the head takes, and the last feature map (B, C, h, w)."""
    final, maps = cast(Any, model).forward_intermediates(x, indices=1, norm=True, output_fmt="NCHW")
    return final, maps[-1]


@torch.no_grad()
def _channels(model: nn.Module, size: tuple[int, int]) -> int:
    """Channels of the last feature map, found by one run."""
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(
            f"hint_weight is set, but {type(model).__name__} has no forward_intermediates, expected a timm model "
            "that returns feature maps. Leave --hint-weight out."
        )
    training, like = model.training, next(model.parameters())
    channels = _last_map(model.eval(), like.new_zeros(1, 3, *size))[1].shape[1]
    model.train(training)
    return channels


@dataclass
class Teacher:
    """A network that is only asked.

    preprocess: what its images must look like. channels: of its last feature map, where that is asked for.
    """

    model: nn.Module
    preprocess: Preprocess
    channels: int | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor, preprocess: Preprocess) -> Outputs:
        """Outputs for x (B, 3, H, W), normalised and sized as `preprocess` says; both become the teacher's own."""
        x = _as_for(x, preprocess, self.preprocess)
        if self.channels is None:
            return Outputs(self.model(x))
        final, features = _last_map(self.model, x)
        return Outputs(cast(Any, self.model).forward_head(final), features=features)


def _as_for(x: Tensor, ours: Preprocess, theirs: Preprocess) -> Tensor:
    if (ours.mean, ours.std) != (theirs.mean, theirs.std):
        mean, std, other_mean, other_std = (
            torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (ours.mean, ours.std, theirs.mean, theirs.std)
        )
        x = (x * std + mean - other_mean) / other_std
    if tuple(x.shape[-2:]) != theirs.input_size:
        x = F.interpolate(x, theirs.input_size, mode="bicubic", antialias=True, align_corners=False)
    return x


def load_teacher(config: TrainConfig, labels: tuple[str, ...], device: torch.device) -> Teacher:
    """The teacher of `config` in eval mode. Raises CheckpointError, DataError where its classes are others."""
    model, info = load_classifier(str(config.teacher))
    if not are_numbered(info.labels) or len(labels) != len(info.labels):
        check_classes(labels, info.labels, f"--data for teacher {config.teacher}")
    size = info.preprocess.input_size
    channels = _channels(model, size) if config.hint_weight else None
    return Teacher(model.to(device).eval().requires_grad_(False), info.preprocess, channels)


def make_student(model: nn.Module, size: tuple[int, int], teacher: Teacher, config: TrainConfig) -> Student:
    """A student of `teacher`. Raises ConfigError where token distillation is asked of a model without the token."""
    if config.distillation == "token" and not hasattr(model, "set_distilled_training"):
        raise ConfigError(
            f"distillation is token, but {type(model).__name__} has no distillation token, expected a model like "
            "deit_micro. Use --distillation hard."
        )
    return Student(model, size, teacher.channels)


def teacher_loss(student: Outputs, teacher: Outputs, config: TrainConfig) -> Tensor:
    """D of the module docstring for each image: (B,)."""
    logits = (student.logits if student.distilled is None else student.distilled).float()
    if config.distillation == "soft":
        tau = config.distillation_tau
        target = F.log_softmax(teacher.logits.float() / tau, 1)
        return F.kl_div(F.log_softmax(logits / tau, 1), target, reduction="none", log_target=True).sum(1) * tau**2
    return F.cross_entropy(logits, teacher.logits.argmax(1), reduction="none")


def hint_loss(student: Outputs, teacher: Outputs) -> Tensor:
    """Squared distance of normalised feature maps for each image: (B,), on the coarser of the two grids."""
    ours, theirs = cast(Tensor, student.features).float(), cast(Tensor, teacher.features).float()
    grid = (min(ours.shape[-2], theirs.shape[-2]), min(ours.shape[-1], theirs.shape[-1]))
    ours, theirs = (F.adaptive_avg_pool2d(m, grid).movedim(1, -1) for m in (ours, theirs))
    size = ours.shape[-1:]
    return (F.layer_norm(ours, size) - F.layer_norm(theirs, size)).square().mean(dim=(1, 2, 3))
