"""Source: a file of weights, as timm's trainer, Lightning, torch.save and safetensors write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo, build, load_weights, preprocess_for, read_tensors, require_finite
from leanvit.config import Interpolation, LoadOptions, Preprocess
from leanvit.errors import CheckpointError, did_you_mean
from leanvit.load.describe import for_network
from leanvit.load.labels import labels_for, task_for
from leanvit.load.pickles import read_pickle
from leanvit.load.source import Source, config_with
from leanvit.load.state_dicts import fitted, in_float32, on_meta, without_prefixes
from leanvit.load.timm_names import takes_size
from leanvit.progress import note
from leanvit.timm_input import first_convolutions

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt")


@dataclass(frozen=True)
class Weights:
    """What a file holds. tensors: float32, by the names that the file has. said: plain values beside them."""

    path: Path
    tensors: dict[str, Tensor]
    said: Mapping[str, Any] = field(default_factory=dict)

    def value(self, kind: type | tuple[type, ...], *names: str) -> Any:
        """The first value of a kind under one of some names, of the file itself, its arguments or its configuration."""
        arguments = [self.said.get(key) for key in ("args", "hyper_parameters", "hparams", "config", "pretrained_cfg")]
        places = [self.said, *(one for one in arguments if isinstance(one, Mapping))]
        found = (place.get(name) for place in places for name in names)
        return next((value for value in found if isinstance(value, kind) and value not in ("", [], {})), None)


def read_weights(path: str | Path, *, ema: bool = True) -> Weights:
    """Tensors and facts of a file, safetensors or pickle, and of a config.json of timm beside it.

    Raises CheckpointError where the file is missing, damaged, not finite, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint ({' '.join(SUFFIXES)}).")
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path)
        said: dict[str, Any] = dict(metadata)
    else:
        tensors, answer = read_pickle(path, ema=ema)
        said = answer["said"]
        if ema and answer["key"].endswith("ema"):
            note(f"{path}: the averaged weights ({answer['key']}) are taken. For the others: --no-ema")
        require_finite(tensors, path)
    return Weights(path, in_float32(tensors), config_with(path.parent, "architecture") | said)


def open_file(spec: str, options: LoadOptions) -> tuple[nn.Module, CheckpointInfo]:
    """The network of a file of weights; its classes, channels and size are those of the file.

    Raises CheckpointError where the architecture is not known or the weights don't fit it, ConfigError.
    """
    weights = read_weights(spec, ema=options.ema)
    name = architecture_of(weights, options)
    plain = on_meta(lambda: build(name, 1))
    tensors = without_prefixes(weights.tensors, set(plain.state_dict()))
    classes = _classes(tensors, plain)
    arguments = _arguments(weights) | _channels(tensors, plain)
    size = options.input_size or _size(weights, tensors, plain)
    if size and takes_size(name):
        arguments["img_size"] = size
    network = build(name, classes, **arguments)
    load_weights(network, fitted(tensors, network), weights.path)
    preprocess = _preprocess(network, weights, size)
    labels = labels_for(classes, weights.value(list, "label_names", "labels", "class_names"), spec)
    kwargs = json.loads(json.dumps(arguments))
    return network.eval(), CheckpointInfo(name, labels, preprocess, kwargs=kwargs, task=task_for(classes))


def architecture_of(weights: Weights, options: LoadOptions) -> str:
    """timm's name of the architecture that is asked for, else of the one that the file names.

    Raises CheckpointError where neither does.
    """
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    name = options.model_name or weights.value(str, "arch", "architecture", "model", "model_name", "backbone")
    if name is None:
        raise CheckpointError(
            f"{weights.path} does not say which architecture its weights are of. Give it: --model NAME, in Python "
            "leanvit.LoadOptions(model_name=NAME) (timm's name; its tensors are "
            f"{', '.join(list(weights.tensors)[:3])}, ...)"
        )
    name = name.partition(".")[0]
    if not timm.is_model(name) and not options.model_name:
        raise CheckpointError(
            f"{weights.path} is of '{name}', which timm does not know.{did_you_mean(name, timm.list_models())} "
            "Give its name there: --model NAME"
        )
    return name


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _classes(tensors: Mapping[str, Tensor], network: nn.Module) -> int:
    """How many classes the file has by the shape of its classifier; 0 where it has none."""
    names = [*_classifiers(network), "head", "head.fc", "fc", "classifier"]
    found = (tensors.get(f"{name}.{part}") for name in names for part in ("weight", "l.weight", "linear.weight"))
    return next((int(weight.shape[0]) for weight in found if weight is not None and weight.dim() >= 2), 0)


def _channels(tensors: Mapping[str, Tensor], network: nn.Module) -> dict[str, int]:
    """in_chans by the shape of the first convolution, where it is not 3."""
    for name in first_convolutions(network):
        kernel = tensors.get(f"{name}.weight")
        own = network.state_dict().get(f"{name}.weight")
        if kernel is not None and own is not None and kernel.dim() == 4 and own.shape[1] == 3 != kernel.shape[1]:
            return {"in_chans": int(kernel.shape[1])}
    return {}


def _arguments(weights: Weights) -> dict[str, Any]:
    """Arguments of timm.create_model that the file keeps, beside those that its shapes tell."""
    told = weights.value(Mapping, "model_kwargs", "model_args") or {}
    skipped = ("num_classes", "in_chans", "img_size", "pretrained", "drop_rate", "drop_path_rate")
    return {key: value for key, value in told.items() if key not in skipped}


def _size(weights: Weights, tensors: Mapping[str, Tensor], network: nn.Module) -> tuple[int, int] | None:
    """(height, width) that the file was trained at, where it is not the architecture's usual one."""
    told = weights.value((int, list), "img_size")
    if isinstance(told, int):
        return (told, told)
    told = told or weights.value(list, "input_size")
    if told and len(told) in (2, 3):
        return (int(told[-2]), int(told[-1]))
    given, own = tensors.get("pos_embed"), network.state_dict().get("pos_embed")
    embed = getattr(network, "patch_embed", None)
    if given is None or own is None or given.dim() != 3 or given.shape == own.shape or embed is None:
        return None
    prefix = own.shape[1] - embed.grid_size[0] * embed.grid_size[1]
    side = round((given.shape[1] - prefix) ** 0.5)
    if side * side != given.shape[1] - prefix:
        raise CheckpointError(
            f"{weights.path} has {given.shape[1] - prefix} positions, which are no square. Give the size that it was "
            "trained at: --img-size HEIGHT WIDTH"
        )
    return (side * int(embed.patch_size[0]), side * int(embed.patch_size[1]))


def _preprocess(network: nn.Module, weights: Weights, size: tuple[int, int] | None) -> Preprocess:
    """timm's for the network, with what the file's training program was told otherwise."""
    preprocess = preprocess_for(network)
    changed: dict[str, Any] = {"input_size": size} if size else {}
    for name in ("mean", "std"):
        told = weights.value(list, name)
        if told and all(isinstance(one, int | float) for one in told):
            changed[name] = for_network(tuple(map(float, told)), preprocess.channels, name, str(weights.path))
    if weights.value(str, "interpolation") in get_args(Interpolation):
        changed["interpolation"] = weights.value(str, "interpolation")
    if weights.value(float, "crop_pct"):
        changed["crop_pct"] = weights.value(float, "crop_pct")
    return replace(preprocess, **changed)


def claims(spec: str) -> bool:
    """Whether a spec is a file with the ending of one of weights."""
    return Path(spec).suffix.lower() in SUFFIXES and Path(spec).is_file()


SOURCE = Source(name="file", form=f"a file of weights ({' '.join(SUFFIXES)})", claims=claims, open=open_file)
