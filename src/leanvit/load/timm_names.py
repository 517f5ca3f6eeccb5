"""Sources by timm's names: NAME, NAME.TAG, hf-hub:ORG/NAME and local-dir:FOLDER."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanvit.checkpoint import CheckpointInfo, build, load_weights, preprocess_for
from leanvit.config import LoadOptions
from leanvit.errors import CheckpointError, ConfigError, LeanvitError, UnknownModelError, did_you_mean
from leanvit.load.hub import cache_where_offline, how_to_bring, require_reachable
from leanvit.load.labels import labels_for, task_for
from leanvit.load.source import Source, config_with
from leanvit.load.state_dicts import fitted
from leanvit.progress import note

_HUB, _FOLDER = "hf-hub:", "local-dir:"


def open_name(spec: str, options: LoadOptions) -> tuple[nn.Module, CheckpointInfo]:
    """NAME.TAG, or NAME with the weights that timm takes by default.

    Raises CheckpointError where there are no such weights or they can't be had, ConfigError.
    """
    name = spec.partition(".")[0]
    require_no_other_name(spec, name, options)
    cfg = _weights_of(spec)
    named = tuple(getattr(cfg, "label_names", None) or ())
    classes = len(named) or int(1000 if cfg.num_classes is None else cfg.num_classes)
    size = size_arguments(name, options, tuple(cfg.input_size[-2:]))
    full = f"{name}.{cfg.tag}" if cfg.tag else name
    network = _fetched(full, cfg, lambda: build(full, classes, pretrained=True))
    if size:
        network = _resized(network, build(full, classes, **size), spec)
    # Weights that timm knows of and that have as many classes as an ImageNet are ImageNet's.
    labels = labels_for(classes, named, spec, sure=True)
    return network, CheckpointInfo(name, labels, preprocess_for(network), kwargs=size, task=task_for(classes))


def _weights_of(spec: str) -> Any:
    """timm's description of the weights of NAME or NAME.TAG. Raises CheckpointError where there are none."""
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    name, _, tag = spec.partition(".")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in known:
        raise CheckpointError(
            f"{spec}: no weights of {name} have the tag '{tag}'.{did_you_mean(tag, known)} Known: "
            f"{', '.join(known) or 'none'}. Or give a file: FILE --model {name}"
        )
    cfg = timm.get_pretrained_cfg(spec)
    if cfg is None or not cfg.has_weights:
        raise CheckpointError(
            f"{spec} has no weights of its own, and random ones are of no use here. "
            f"Give a file of weights: FILE --model {name}, or train: leanvit train --model {name}"
        )
    if not tag and cfg.tag:
        note(f"{spec}: its weights {name}.{cfg.tag} are taken" + (f", of {', '.join(known)}" if len(known) > 1 else ""))
    return cfg


def _fetched(spec: str, cfg: Any, make: Any) -> nn.Module:
    """A network whose weights are on this machine or are fetched. Raises CheckpointError within seconds offline."""
    if cfg.file:
        return make().eval()
    if cfg.hf_hub_id:
        with cache_where_offline() as online:
            try:
                return make().eval()
            except CheckpointError as error:
                if online:
                    raise
                raise CheckpointError(
                    f"{spec}: its weights are on the Hugging Face hub ({cfg.hf_hub_id}), which does not answer, and "
                    f"not in its cache here. {how_to_bring(cfg.hf_hub_id)}"
                ) from error
    address = cfg.url[0] if isinstance(cfg.url, list | tuple) else cfg.url
    require_reachable(address, spec)
    return make().eval()


def open_hub(spec: str, options: LoadOptions) -> tuple[nn.Module, CheckpointInfo]:
    """A repository of the Hugging Face hub in timm's format. Raises CheckpointError, within seconds offline."""
    from timm.models import load_model_config_from_hf

    repository = spec[len(_HUB) :]
    with cache_where_offline() as online:
        try:
            cfg, name, arguments = load_model_config_from_hf(repository)
            return _described(spec, options, cfg, name, arguments)
        except LeanvitError:
            raise
        except KeyError as error:
            raise CheckpointError(
                f"{spec}: its config.json names no architecture of timm. If it is of transformers: "
                f"transformers:{repository}"
            ) from error
        except Exception as error:
            reason = " ".join(str(error).split())[:160]
            if online:
                raise CheckpointError(f"{spec} can't be loaded ({reason}). Check the name on the hub.") from error
            raise CheckpointError(
                f"{spec}: the Hugging Face hub does not answer, and its cache here does not hold it. "
                f"{how_to_bring(repository)}"
            ) from error


def open_folder(spec: str, options: LoadOptions) -> tuple[nn.Module, CheckpointInfo]:
    """A folder that timm's save_for_hf wrote: config.json and weights. Raises CheckpointError."""
    from timm.models._hub import load_model_config_from_path

    folder = Path(spec.removeprefix(_FOLDER))
    try:
        cfg, name, arguments = load_model_config_from_path(folder)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: no folder that timm wrote ({' '.join(str(error).split())[:160]}), expected config.json that "
            "names an architecture, beside model.safetensors. If it is of transformers: transformers:FOLDER"
        ) from error
    try:
        return _described(f"{_FOLDER}{folder}", options, cfg, name, arguments)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: its weights don't fit {name} ({' '.join(str(error).split())[:160]}). Copy the folder again."
        ) from error


def _described(
    spec: str, options: LoadOptions, cfg: dict[str, Any], name: str, arguments: dict[str, Any]
) -> tuple[nn.Module, CheckpointInfo]:
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    require_no_other_name(spec, name, options)
    if not timm.is_model(name):
        raise UnknownModelError(
            f"{spec} is a '{name}', which this timm does not know.{did_you_mean(name, timm.list_models())}"
        )
    kept = {key: value for key, value in arguments.items() if key not in ("num_classes", "pretrained")}
    size = size_arguments(name, options, tuple(cfg.get("input_size", (3, 224, 224))[-2:]))
    network = timm.create_model(spec, pretrained=True).eval()
    if size:
        network = _resized(network, timm.create_model(spec, pretrained=False, **size), spec)
    classes = int(getattr(network, "num_classes", cfg.get("num_classes", 0)))
    labels = labels_for(classes, cfg.get("label_names"), spec)
    return network, CheckpointInfo(
        name, labels, preprocess_for(network), kwargs=json.loads(json.dumps(kept | size)), task=task_for(classes)
    )


def _resized(network: nn.Module, other: nn.Module, spec: str) -> nn.Module:
    """The same network built for another size, with the weights of `network`."""
    load_weights(other, fitted(network.state_dict(), other, network), spec)
    return other.eval()


def require_no_other_name(spec: str, name: str, options: LoadOptions) -> None:
    """Raise ConfigError where --model contradicts a spec that names its architecture."""
    if options.model_name and options.model_name != name:
        raise ConfigError(f"--model is {options.model_name}, but {spec} is a {name}. Leave --model out.")


def size_arguments(name: str, options: LoadOptions, usual: tuple[int, ...]) -> dict[str, Any]:
    """Arguments that build an architecture for the size that is asked for; none where it is the usual one."""
    size = options.input_size
    return {"img_size": size} if size and size != usual and takes_size(name) else {}


@functools.cache
def takes_size(name: str) -> bool:
    """Whether an architecture is built for a size; convolutional ones take any."""
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    cfg = timm.get_pretrained_cfg(name)
    try:
        with torch.device("meta"):
            build(name, 1, img_size=tuple(cfg.input_size[-2:]) if cfg else 224)
    except ConfigError:
        return False
    return True


def is_name(spec: str) -> bool:
    """Whether a spec is an architecture of timm, with or without a tag, and no file."""
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    return timm.is_model(spec.partition(".")[0]) and not Path(spec).exists()


def _is_folder(spec: str) -> bool:
    """A folder with timm's config.json, with or without the prefix."""
    return spec.startswith(_FOLDER) or bool(config_with(spec, "architecture"))


HUB = Source(name="hf-hub", form="hf-hub:ORG/NAME", claims=lambda spec: spec.startswith(_HUB), open=open_hub)
FOLDER = Source(
    name="local-dir", form="local-dir:FOLDER (config.json and weights)", claims=_is_folder, open=open_folder
)
NAMES = Source(name="timm", form="NAME.TAG of timm", claims=is_name, open=open_name)
