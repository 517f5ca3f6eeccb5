"""Source: transformers:FOLDER_OR_ID, classifiers and image towers of Hugging Face's transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import LoadOptions
from leanvit.errors import CheckpointError, ConfigError, LeanvitError, require
from leanvit.load.hub import cache_where_offline, how_to_bring
from leanvit.load.labels import labels_for, task_for
from leanvit.load.processors import read_processor
from leanvit.load.source import Source, config_with
from leanvit.load.timm_names import require_no_other_name

KIND = "transformers"
_PREFIX = "transformers:"

TOWERS = {
    # Of models of pictures and texts the half that sees pictures.
    "CLIPModel": "CLIPVisionModelWithProjection",
    "ChineseCLIPModel": "ChineseCLIPVisionModel",
    "SiglipModel": "SiglipVisionModel",
    # Its own encoder hides patches at random; a ViT has the same weights.
    "ViTMAEForPreTraining": "ViTModel",
    "ViTMAEModel": "ViTModel",
}
"""Classes that are opened as others; all others as their config.json says."""

POSITIONS = ("position_embeddings", "position_embedding.weight")
"""Tensors (1, N, C) or (N, C) of absolute positions, by the ends of their names."""


class Answer(nn.Module):
    """A network of transformers that returns one tensor.

    output: logits, image_embeds or pooler_output of what it returns, or first_token of its last hidden state.
    """

    def __init__(self, network: nn.Module, output: str) -> None:
        """Share the weights of `network`."""
        super().__init__()
        self.network = network
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) float32. Returns logits (B, classes) or embeddings (B, width)."""
        found = self.network(pixel_values=x, return_dict=True)
        tensor: Tensor = found.last_hidden_state[:, 0] if self.output == "first_token" else found[self.output]
        return tensor


@dataclass(frozen=True)
class Parts:
    """How a network is built again. name: of its class. config: values of its configuration. output: see Answer."""

    name: str
    config: dict[str, Any]
    output: str

    def source(self) -> dict[str, Any]:
        """What CheckpointInfo.source keeps."""
        return {"kind": KIND, "class": self.name, "config": self.config, "output": self.output}


def open_spec(spec: str, options: LoadOptions) -> tuple[nn.Module, CheckpointInfo]:
    """The network of a folder that save_pretrained wrote, or of the hub (within seconds where it does not answer).

    Raises CheckpointError, ConfigError, MissingDependencyError.
    """
    library: Any = require("transformers")
    library.logging.disable_progress_bar()
    library.logging.set_verbosity_error()  # what is missing is told here
    place = spec.removeprefix(_PREFIX)
    if Path(place).is_dir():
        return _opened(place, spec, options, local=True)
    if place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise CheckpointError(f"{place}: no such folder, expected one that transformers' save_pretrained wrote.")
    with cache_where_offline() as online:
        try:
            return _opened(place, spec, options, local=not online)
        except LeanvitError:
            raise
        except OSError as error:
            if online:
                raise CheckpointError(f"{spec} can't be loaded ({_line(error)}). Check the name on the hub.") from error
            bring = how_to_bring(place).replace("local-dir:", _PREFIX)
            raise CheckpointError(
                f"{spec}: the Hugging Face hub does not answer, and its cache here does not hold it. {bring}"
            ) from error


def _opened(place: str, spec: str, options: LoadOptions, *, local: bool) -> tuple[nn.Module, CheckpointInfo]:
    import transformers

    stored = _config_json(place, local)
    name = _class_name(stored, spec)
    require_no_other_name(spec, name, options)
    network, config = _network(getattr(transformers, name), place, spec, local, stored)
    own_size = _image_size(config)
    preprocess, flipped = read_processor(place, own_size, int(getattr(_of_pictures(config), "num_channels", 3)), local)
    if flipped:
        _swap_channels(network)
    size = options.input_size
    if size and own_size and size != own_size:
        network, config = _resized(network, size, spec)
    parts = Parts(name, json.loads(config.to_json_string()), _output(network, name))
    classifies = parts.output == "logits"
    count = int(config.num_labels) if classifies else 0
    labels = labels_for(count, _names(config, count), spec) if classifies else ()
    info = CheckpointInfo(name, labels, preprocess, source=parts.source(), task=task_for(count))
    return Answer(network, parts.output).eval(), info


def _config_json(place: str, local: bool) -> dict[str, Any]:
    from transformers import PretrainedConfig

    try:
        stored, _ = PretrainedConfig.get_config_dict(place, local_files_only=local)
    except (ValueError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{place}: its config.json can't be read ({_line(error)}). Copy it again.") from error
    if "model_type" not in stored:
        raise CheckpointError(
            f"{place}: no config.json of transformers (no model_type in it). If timm wrote it: local-dir:FOLDER"
        )
    return dict(stored)


def _class_name(stored: Mapping[str, Any], spec: str) -> str:
    import transformers

    named = next(iter(stored.get("architectures") or ()), None)
    name = TOWERS.get(str(named), named)
    if name is None or not hasattr(transformers, name):
        raise CheckpointError(
            f"{spec} is of class '{named}' (model_type {stored['model_type']}), which this transformers "
            f"{transformers.__version__} does not have. Update it, or name its class in config.json."
        )
    return str(name)


def _network(cls: Any, place: str, spec: str, local: bool, stored: Mapping[str, Any]) -> tuple[nn.Module, Any]:
    """The network in float32, all of whose weights are in the files. Raises CheckpointError where some are not."""
    config = cls.config_class.from_pretrained(place, local_files_only=local)
    if "vision_config" in stored and "projection_dim" in stored:
        config.projection_dim = stored["projection_dim"]  # that of both halves counts, not the tower's own
    how = {"config": config, "local_files_only": local, "trust_remote_code": False, "output_loading_info": True}
    try:
        network, told = cls.from_pretrained(place, dtype=torch.float32, **how)
    except RuntimeError as error:
        raise CheckpointError(
            f"{spec}: its tensors are no {cls.__name__}'s ({_line(error)}). Copy it again."
        ) from error
    missing = [name for name in told["missing_keys"] if not name.startswith("pooler.")]
    wrong = [str(one[0] if isinstance(one, tuple) else one) for one in told.get("mismatched_keys", ())]
    if missing or wrong:
        raise CheckpointError(
            f"{spec}: {len(missing)} tensors of {cls.__name__} are missing and {len(wrong)} have another shape, e.g. "
            f"'{(sorted(missing) + wrong)[0]}', expected all of them. Give a trained network of that class."
        )
    if told["missing_keys"]:
        network.pooler = None  # it would be random
    return network.eval(), network.config


def _output(network: nn.Module, name: str) -> str:
    if "ForImageClassification" in name:
        return "logits"
    if name.endswith("WithProjection"):
        return "image_embeds"
    vision: Any = getattr(network, "vision_model", network)
    has_pooler = getattr(network, "pooler", False) is not None and getattr(vision, "use_head", True)
    return "pooler_output" if has_pooler else "first_token"


def _names(config: Any, count: int) -> list[str] | None:
    """Names of the classes; None where they are those that transformers makes up."""
    names = [str(config.id2label[i]) for i in range(count)]
    return None if names == [f"LABEL_{i}" for i in range(count)] else names


def _of_pictures(config: Any) -> Any:
    """The part of a configuration that is of the tower of pictures."""
    return getattr(config, "vision_config", config)


def _image_size(config: Any) -> tuple[int, int] | None:
    size = getattr(_of_pictures(config), "image_size", None)
    if isinstance(size, int):
        return (size, size)
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) and len(size) == 2 else None


@torch.no_grad()
def _swap_channels(network: nn.Module) -> None:
    """Take RGB where the processor turned pictures to BGR: the first kernels with their channels exchanged."""
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    first.weight.copy_(first.weight.flip(1))


def _resized(network: Any, size: tuple[int, int], spec: str) -> tuple[nn.Module, Any]:
    """The network for another input size, absolute positions resampled. Raises ConfigError where others differ."""
    import copy

    from timm.layers import resample_abs_pos_embed

    config = copy.deepcopy(network.config)
    old = _image_size(config)
    _of_pictures(config).image_size = size[0] if size[0] == size[1] else size
    other = type(network)(config)
    wanted, given = other.state_dict(), dict(network.state_dict())
    patch = getattr(_of_pictures(config), "patch_size", None)
    for name, own in wanted.items():
        if given[name].shape == own.shape:
            continue
        if not name.endswith(POSITIONS) or not isinstance(patch, int) or old is None:
            raise ConfigError(
                f"--img-size is {size[0]} x {size[1]}, but '{name}' of {spec} has another shape there and is no "
                "embedding of positions that can be resampled. Leave --img-size out."
            )
        grids = [[side // patch for side in sides] for sides in (size, old)]
        prefix = own.shape[-2] - grids[0][0] * grids[0][1]
        values = given[name].reshape(1, *given[name].shape[-2:])
        given[name] = resample_abs_pos_embed(values, grids[0], grids[1], num_prefix_tokens=prefix).reshape(own.shape)
    other.load_state_dict(given)
    return other.eval(), config


def build(info: CheckpointInfo) -> nn.Module:
    """The network of a description with random weights. Raises CheckpointError for a class that is not there."""
    transformers: Any = require("transformers")
    cls = getattr(transformers, info.source["class"], None)
    if cls is None:
        raise CheckpointError(
            f"the network is a {info.source['class']}, which transformers {transformers.__version__} does not have. "
            "Install the version that it was loaded with."
        )
    network = cls(cls.config_class.from_dict(info.source["config"]))
    if info.source["output"] == "first_token" and getattr(network, "pooler", None) is not None:
        network.pooler = None
    return Answer(network, info.source["output"]).eval()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def claims(spec: str) -> bool:
    """Whether a spec has the prefix, or is a folder with a config.json of transformers."""
    return spec.startswith(_PREFIX) or bool(config_with(spec, "model_type"))


SOURCE = Source(
    name=KIND, form="transformers:FOLDER_OR_ID (of Hugging Face)", claims=claims, open=open_spec, build=build
)
