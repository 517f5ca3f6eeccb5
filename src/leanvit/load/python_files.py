"""Source: python:FILE.py:FUNCTION, a network that a user's own code builds and loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanvit.checkpoint import CheckpointInfo, for_channels, preprocess_for
from leanvit.config import IMAGENET_MEAN, IMAGENET_STD, LoadOptions, Preprocess, from_dict, to_dict
from leanvit.errors import CheckpointError, ConfigError, did_you_mean
from leanvit.load.labels import labels_for, task_for
from leanvit.load.modules import as_network, unwrapped
from leanvit.load.source import Source

KIND = "python"
_PREFIX = "python:"
TOLD = ("labels", "task", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""What a function may say beside the network."""


def open_spec(spec: str, options: LoadOptions) -> tuple[nn.Module, CheckpointInfo]:
    """What FUNCTION() of FILE.py returns: a network, or a network and a dictionary with some of TOLD.

    The file is run: it is the user's own. Raises CheckpointError where it, its function or its answer is not as
    expected, ConfigError where the input size is not known, ShapeError where the network can't run at it.
    """
    file, _, function = spec.removeprefix(_PREFIX).rpartition(":")
    if not file or not function:
        raise CheckpointError(f"{spec}: expected python:FILE.py:FUNCTION, where FUNCTION() returns a network.")
    if options.model_name:
        raise ConfigError(f"--model is {options.model_name}, but {spec} builds its network itself. Leave --model out.")
    network, told = _called(Path(file), function)
    preprocess = _preprocess(network, told, options, spec)
    example = torch.zeros(1, preprocess.channels, *preprocess.input_size)
    inner, network = unwrapped(network), as_network(network, example).eval()
    with torch.no_grad():
        outputs = network(example)
    embeds = told.get("task") == "embed"
    count = 0 if embeds else int(outputs.shape[-1])
    info = CheckpointInfo(
        architecture=type(inner).__name__,
        labels=() if embeds else labels_for(count, told.get("labels"), spec),
        preprocess=preprocess,
        source={"kind": KIND, "file": str(Path(file).resolve()), "function": function},
        task=task_for(count),
    )
    return network, info


def _called(file: Path, function: str) -> tuple[nn.Module, dict[str, Any]]:
    """What the function of a file returns. Raises CheckpointError."""
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file, expected the Python file whose {function}() returns the network.")
    loading = importlib.util.spec_from_file_location(f"leanvit_user_{file.stem}", file)
    if loading is None or loading.loader is None:
        raise CheckpointError(f"{file}: no Python file, expected one that ends in .py.")
    module = importlib.util.module_from_spec(loading)
    try:
        loading.loader.exec_module(module)
        if not hasattr(module, function):
            names = [name for name in vars(module) if callable(getattr(module, name)) and not name.startswith("_")]
            raise CheckpointError(
                f"{file} has no {function}.{did_you_mean(function, names)} It has {', '.join(names)}."
            )
        answer = getattr(module, function)()
    except CheckpointError:
        raise
    except Exception as error:  # whatever the user's own code raises
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{file}: {function}() raised {type(error).__name__}: {reason}. Correct it there."
        ) from error
    network, told = answer if isinstance(answer, tuple) and len(answer) == 2 else (answer, {})
    if not isinstance(network, nn.Module) or not isinstance(told, Mapping):
        raise CheckpointError(
            f"{file}: {function}() returned {type(answer).__name__}, expected a torch.nn.Module, or one and a dict."
        )
    unknown = [str(key) for key in told if key not in TOLD]
    if unknown:
        raise CheckpointError(f"{file}: {function}() says {unknown[0]}.{did_you_mean(unknown[0], TOLD)} Known: {TOLD}")
    return network, dict(told)


def _preprocess(network: nn.Module, told: Mapping[str, Any], options: LoadOptions, spec: str) -> Preprocess:
    """What the function says, above what timm says of the network; ImageNet's mean and deviation where neither does."""
    inner = unwrapped(network)
    values = {key: list(value) if isinstance(value, tuple) else value for key, value in told.items()}
    given = {key: value for key, value in values.items() if key not in ("labels", "task")}
    if options.input_size:
        given["input_size"] = list(options.input_size)
    if hasattr(inner, "pretrained_cfg"):
        known = to_dict(preprocess_for(inner))
    else:
        channels = len(given["mean"]) if "mean" in given else first_channels(inner)
        known = {"mean": list(for_channels(IMAGENET_MEAN, channels)), "std": list(for_channels(IMAGENET_STD, channels))}
    if "input_size" not in known | given:
        raise ConfigError(
            f"{spec} does not say its input size. Give --img-size, or return (network, {{'input_size': (224, 224)}})."
        )
    return from_dict(Preprocess, known | given, spec)


def first_channels(network: nn.Module) -> int:
    """Channels of the first convolution; 3 where there is none."""
    first = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    return int(first.in_channels) if first is not None else 3


def build(info: CheckpointInfo) -> nn.Module:
    """The network of a description, built by the same function. Raises CheckpointError where its file is gone."""
    file = Path(info.source["file"])
    if not file.is_file():
        raise CheckpointError(
            f"{file}: gone, but the network was built by its {info.source['function']}(). Bring the file back there."
        )
    network, _ = _called(file, info.source["function"])
    return as_network(network, torch.zeros(1, info.preprocess.channels, *info.preprocess.input_size)).eval()


SOURCE = Source(
    name=KIND,
    form="python:FILE.py:FUNCTION",
    claims=lambda spec: spec.startswith(_PREFIX),
    open=open_spec,
    build=build,
)
