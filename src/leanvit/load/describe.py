"""What the options say of labels and preprocessing, held against the network itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import LoadOptions
from leanvit.errors import ConfigError
from leanvit.load.labels import read_labels
from leanvit.timm_input import input_config

if TYPE_CHECKING:
    from torch import nn


def adjusted(network: nn.Module, info: CheckpointInfo, options: LoadOptions, spec: str) -> CheckpointInfo:
    """The description with the labels and the preprocessing that the options ask for.

    Raises ConfigError that names both sides, where they contradict the network.
    """
    if options.multi_label and info.task != "classify":
        raise ConfigError(
            f"--multi-label is of classifiers of at least two outputs, but {spec} is for task {info.task}. "
            "Leave it out."
        )
    if options.multi_label:
        info = dataclasses.replace(info, task="multilabel")
    if options.labels:
        info = with_labels(info, options.labels, spec)
    preprocess = info.preprocess
    changed: dict[str, Any] = {
        name: for_network(getattr(options, name), preprocess.channels, name, spec)
        for name in ("mean", "std")
        if getattr(options, name) is not None
    }
    changed |= {
        name: getattr(options, name) for name in ("interpolation", "crop_pct") if getattr(options, name) is not None
    }
    if options.input_size is not None:
        require_size(network, options.input_size, spec)
        changed["input_size"] = options.input_size
    return dataclasses.replace(info, preprocess=dataclasses.replace(preprocess, **changed)) if changed else info


def with_labels(info: CheckpointInfo, path: str, spec: str) -> CheckpointInfo:
    """The description with the class names of a file. Raises ConfigError where they are not as many as its own."""
    labels = read_labels(path)
    if len(labels) != len(info.labels):
        raise ConfigError(
            f"--labels {path} holds {len(labels)} names, but {spec} has {len(info.labels)} outputs, expected one name "
            "an output."
        )
    return dataclasses.replace(info, labels=labels)


def of_quantized(info: CheckpointInfo, options: LoadOptions | None, spec: str) -> CheckpointInfo:
    """What is known of a quantized network, with the labels of the options. Raises ConfigError for all others."""
    given = options.given() if options else {}
    others = [name for name in given if name != "labels"]
    if others:
        raise ConfigError(
            f"{', '.join(others)}: of float networks, but {spec} is quantized. Quantize again with it, or leave it out."
        )
    return with_labels(info, str(given["labels"]), spec) if given else info


def for_network(values: tuple[float, ...], channels: int, name: str, spec: str) -> tuple[float, ...]:
    """A number for each channel; one for all where one is given. Raises ConfigError for another number of them."""
    if len(values) == 1:
        return values * channels
    if len(values) != channels:
        raise ConfigError(
            f"--{name} has {len(values)} numbers, but {spec} takes {channels} channels, expected one number a channel."
        )
    return values


def require_size(network: nn.Module, size: tuple[int, int], spec: str) -> None:
    """Raise ConfigError where a network is built for one size, and not for this one."""
    built = size_of(network)
    if built is not None and built != size:
        raise ConfigError(
            f"--img-size is {size[0]} x {size[1]}, but {spec} is built for {built[0]} x {built[1]} and can't be "
            "resized. Leave --img-size out."
        )


def size_of(network: nn.Module) -> tuple[int, int] | None:
    """(height, width) that a timm network is built for; None where it takes any, or is none of timm's."""
    if not hasattr(network, "pretrained_cfg"):
        return None
    config = input_config(network)
    return tuple(config["input_size"][-2:]) if config["fixed_input_size"] else None
