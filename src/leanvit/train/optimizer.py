"""Optimizer, learning rate, frozen layers and class weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leanvit.config import TrainConfig
from leanvit.errors import ConfigError, did_you_mean


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Linear warm-up, then a cosine to `min_lr`: a pure function of the step."""
    warmup = max(1, round(config.warmup_epochs * steps_per_epoch))
    total = max(warmup + 1, config.epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    share = (step - warmup) / (total - warmup)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its rate: `rate`, scaled where layers differ."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)


def make_optimizer(model: nn.Module, config: TrainConfig, *extra: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer `config.opt`; norms, biases and what the model's `no_weight_decay` names are not decayed.

    extra: modules beside the model that learn at the full rate, such as projections of feature hints.
    Raises ConfigError for an optimizer that timm doesn't know.
    """
    return optimizer_of(parameter_groups(model, config), config, *extra)


def optimizer_of(groups: list[dict[str, Any]], config: TrainConfig, *extra: nn.Module) -> torch.optim.Optimizer:
    """timm's optimizer `config.opt` for groups of parameters that name their own decay.

    Raises ConfigError for an optimizer that timm doesn't know.
    """
    added = [p for module in extra for p in module.parameters()]
    if added:
        groups = [*groups, {"params": added, "weight_decay": 0.0}]
    from timm.optim import create_optimizer_v2, list_optimizers

    if config.opt not in list_optimizers():
        raise ConfigError(f"opt is '{config.opt}'.{did_you_mean(config.opt, list_optimizers())} timm has no such one.")
    optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, config.opt, config.lr, 0.0, config.momentum)
    return optimizer


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """A timm model's parameters with and without decay, by layer where `layer_decay` is given."""
    return cast(list[dict[str, Any]], _groups(model, config))


def _groups(model: nn.Module, config: TrainConfig) -> Any:
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    exempt = cast(Any, model).no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    if config.layer_decay is None:
        return param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=exempt)
    return param_groups_layer_decay(
        model, config.weight_decay, no_weight_decay_list=exempt, layer_decay=config.layer_decay
    )


def parameter_names(optimizer: torch.optim.Optimizer, learner: nn.Module) -> list[str]:
    """Names of the optimizer's parameters in the order of its state."""
    names = {id(parameter): name for name, parameter in learner.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def freeze(model: nn.Module, learning: Collection[str], of_head: Callable[[str], bool], *, frozen: bool) -> None:
    """Train the head only, or everything. A frozen backbone keeps its BatchNorm averages and drops nothing.

    learning: names of the parameters that learn where nothing is frozen. of_head: whether a module or parameter of that
    name is of the head. Call it after every model.train().
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning and (of_head(name) or not frozen))
    if frozen:
        for name, module in model.named_modules():
            module.training = of_head(name)


def balanced_weights(labels: NDArray[np.int64], classes: int) -> Tensor:
    """(classes,) float32: images / (classes x images of the class), so that the mean over images is 1."""
    counts = np.bincount(labels, minlength=classes)
    return torch.from_numpy(len(labels) / (classes * np.maximum(counts, 1))).float()
