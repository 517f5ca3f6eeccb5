"""Source: leanvit's own checkpoints and run folders, of every task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from leanvit.checkpoint import (
    CHECKPOINT_NAME,
    CheckpointInfo,
    find_checkpoint,
    info_from_metadata,
    load_weights,
    read_tensors,
)
from leanvit.config import LoadOptions
from leanvit.errors import CheckpointError, ConfigError
from leanvit.load.source import Source
from leanvit.load.state_dicts import fitted, on_meta
from leanvit.load.timm_names import takes_size
from leanvit.runtime.task_of import description_of

if TYPE_CHECKING:
    from torch import nn

Build = Callable[[CheckpointInfo], "nn.Module"]
"""From a description to its network with random weights (leanvit.load.api.build)."""

BUILDERS: dict[str, Build] = {}
"""How the network of each task is built; leanvit.tasks.register adds them, with their heads."""

PLAIN_TASKS = ("classify", "embed", "multilabel", "binary")
"""Tasks of networks whose only head is their own classifier, or that have none."""


def claims(spec: str) -> bool:
    """Whether a spec is a run folder, or a file with leanvit's metadata."""
    path = Path(spec)
    if (path / CHECKPOINT_NAME).is_file():
        return bool(description_of(path)) or not (path / "config.json").is_file()
    return path.is_file() and bool(description_of(path))


def open_checkpoint(spec: str, options: LoadOptions, build: Build) -> tuple[nn.Module, CheckpointInfo]:
    """The network of a checkpoint; with another --img-size its position embeddings are resampled.

    build: leanvit.load.api.build, whose table has this source as a row.
    """
    path = find_checkpoint(spec)
    tensors, metadata = read_tensors(path)
    if "leanvit" not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file without leanvit's metadata. Say what it is of: {path} --model NAME"
        )
    own = info_from_metadata(metadata["leanvit"], path)
    if options.model_name and options.model_name != own.architecture:
        raise ConfigError(f"--model is {options.model_name}, but {path} is a {own.architecture}. Leave --model out.")
    info, resized = _resized(own, options)
    network = build(info)
    load_weights(network, fitted(tensors, network, on_meta(lambda: build(own))) if resized else tensors, path)
    return network.eval(), info


def _resized(info: CheckpointInfo, options: LoadOptions) -> tuple[CheckpointInfo, bool]:
    size = options.input_size
    if size is None or size == info.preprocess.input_size:
        return info, False
    if info.task not in PLAIN_TASKS:
        raise ConfigError(
            f"--img-size is {size}, but a network for task {info.task} was trained at {info.preprocess.input_size}. "
            "Train it at the size: leanvit train --img-size"
        )
    preprocess = dataclasses.replace(info.preprocess, input_size=size)
    kwargs = {**info.kwargs, "img_size": size} if "img_size" in info.kwargs or _takes_size(info) else info.kwargs
    return dataclasses.replace(info, preprocess=preprocess, kwargs=kwargs), True


def _takes_size(info: CheckpointInfo) -> bool:
    return not info.source and takes_size(info.architecture)


def source(build: Build) -> Source:
    """The row of the table; `build` is that of the table."""
    return Source(
        name="leanvit",
        form="a safetensors file of leanvit or the folder of a run",
        claims=claims,
        open=lambda spec, options: open_checkpoint(spec, options, build),
    )
