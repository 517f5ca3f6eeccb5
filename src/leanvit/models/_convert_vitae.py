"""Checkpoints of the authors of ViTAE and ViTAEv2 under leanvit's names."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanvit.errors import CheckpointError
from leanvit.models._cellnet import CellNet
from leanvit.models._cells import NormalCell, ParallelConv, ReductionCell
from leanvit.models._paper import Converted
from leanvit.models.vitae import VARIANTS as VARIANTS_V1
from leanvit.models.vitae import Performer, ViTAE
from leanvit.models.vitaev2 import VARIANTS as VARIANTS_V2
from leanvit.models.vitaev2 import ViTAEv2

Kind = Literal["pyramid", "plain", "v2"]

STATED = {
    "embed_dims": "embed_dims",
    "token_dims": "token_dims",
    "NC_depth": "depths",
    "num_classes": "num_classes",
    "relative_pos": "relative_position",
}
"""Options of the authors that a config may state and that must be what the weights tell, and ours."""

UNTOLD = {
    "NC_heads": "num_heads",
    "RC_heads": "reduction_heads",
    "downsample_ratios": "ratios",
    "dilations": "dilations",
    "window_size": "window_size",
}
"""Options of the authors that no shape tells, and ours: from the config or a published network."""

ATTENTION = {"window": "window", "full": "transformer"}


def convert(state_dict: dict[str, Tensor], config: dict[str, Any] | None = None) -> Converted:
    """Read the widths off the weights, name these as `ViTAE` or `ViTAEv2` does, and check every one of them.

    state_dict: of a ViTAE or ViTAEv2 classifier. config: as in the golden files' metadata; None for published
    networks, which are recognised by their widths and depths; `relative_position_index` is passed over.
    Raises CheckpointError that lists unknown, missing and misshapen keys.
    """
    weights = {key: t for key, t in state_dict.items() if not key.endswith(".relative_position_index")}
    kind, layer = _kind(weights)
    model_class = ViTAEv2 if kind == "v2" else ViTAE
    try:
        kwargs = _plain_widths(weights, layer) if kind == "plain" else _pyramid_widths(weights, kind)
    except KeyError as error:
        raise _error([f"missing {error.args[0]}"]) from error
    if config is None:
        kwargs |= _published(kwargs, model_class)
        problems = []
    else:
        problems = _contradictions(kwargs, kind, config)
        kwargs |= _from_config(kwargs, kind, layer, config)
    with torch.device("meta"):
        model = model_class(**kwargs)
    authors = _authors_names(model, layer)
    converted: dict[str, Tensor] = {}
    used = set()
    for name, like in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        key = f"{authors[module]}.{leaf}"
        used.add(key)
        if key not in weights:
            problems.append(f"missing {key}")
        elif weights[key].shape != like.shape:
            problems.append(f"{key} has shape {tuple(weights[key].shape)}, expected {tuple(like.shape)}")
        else:
            converted[name] = weights[key]
    problems += [f"unknown {key}" for key in weights if key not in used]
    if problems:
        raise _error(problems)
    return Converted(kwargs, converted)


def _kind(weights: dict[str, Tensor]) -> tuple[Kind, int]:
    """Which network it is, and the layer that holds a plain network's normal cells."""
    if "layers.0.RC.cls_token" in weights:
        layers = [int(found[1]) for key in weights if (found := re.match(r"layers\.(\d+)\.NC\.", key))]
        return "plain", max(layers, default=2)
    if any(key.endswith(".RC.attn.attn.qkv.weight") for key in weights):
        return "v2", 0
    if any(key.endswith(".RC.attn.kqv.weight") for key in weights):
        return "pyramid", 0
    raise _error(["no reduction cell found (layers.0.RC.*)"])


def _count(weights: dict[str, Tensor], prefix: str) -> int:
    """How many numbered parts 'prefix.0.', 'prefix.1.', ... there are."""
    numbers = [int(found[1]) for key in weights if (found := re.match(re.escape(prefix) + r"\.(\d+)\.", key))]
    return max(numbers, default=-1) + 1


def _shared(weights: dict[str, Tensor]) -> dict[str, Any]:
    return {"num_classes": weights["head.weight"].shape[0]}


def _plain_widths(weights: dict[str, Tensor], layer: int) -> dict[str, Any]:
    dim, in_chans, patch, _ = weights["layers.0.RC.PRM.proj.weight"].shape
    cell = f"layers.{layer}.NC"
    side = math.isqrt(weights["layers.0.RC.pos_embed"].shape[1] - 1)
    return _shared(weights) | {
        "in_chans": in_chans,
        "patch_size": patch,
        "img_size": patch * side,
        "token_dims": (dim,),
        "depths": (_count(weights, cell),),
        "groups": (dim // weights[f"{cell}.0.PCM.0.weight"].shape[1],),
        "mlp_ratio": weights[f"{cell}.0.mlp.fc1.weight"].shape[0] / dim,
    }


def _pyramid_widths(weights: dict[str, Tensor], kind: Kind) -> dict[str, Any]:
    by_stage: dict[str, list[Any]] = {}
    in_chans = width = weights["layers.0.RC.PRM.convs.0.0.weight"].shape[1]
    mlp_ratio = 1.0
    for index in range(_count(weights, "layers")):
        cell, normal = f"layers.{index}.RC", f"layers.{index}.NC"
        embed_dim, _, kernel, _ = weights[f"{cell}.PRM.convs.0.0.weight"].shape
        dilations = _count(weights, f"{cell}.PRM.convs")
        performer_less = kind == "pyramid" and f"{cell}.attn.kqv.weight" not in weights
        inner = f"{cell}.attn.attn" if kind == "v2" else f"{cell}.attn"
        dim = embed_dim * dilations if performer_less else weights[f"{inner}.proj.weight"].shape[0]
        depth = _count(weights, normal)
        stage: dict[str, Any] = {
            "embed_dims": embed_dim,
            "token_dims": dim,
            "depths": depth,
            "kernel_sizes": kernel,
            "dilations": tuple(range(1, dilations + 1)),
            "groups": dim // weights[f"{normal}.0.PCM.0.weight"].shape[1] if depth else 1,
            "reduction_groups": 1 if performer_less else width // weights[f"{cell}.PCM.0.weight"].shape[1],
        }
        if kind == "v2":
            stage["attention"] = "window" if f"{inner}.qkv.bias" in weights else "full"
        else:
            stage["reductions"] = "performer_less" if performer_less else "performer"
        for name, value in stage.items():
            by_stage.setdefault(name, []).append(value)
        if depth:
            mlp_ratio = weights[f"{normal}.0.mlp.fc1.weight"].shape[0] / dim
        width = dim
    kwargs: dict[str, Any] = {name: tuple(values) for name, values in by_stage.items()}
    if kind == "v2":
        kwargs["relative_position"] = any(key.endswith(".relative_position_bias_table") for key in weights)
    return _shared(weights) | kwargs | {"in_chans": in_chans, "mlp_ratio": mlp_ratio}


def _published(kwargs: dict[str, Any], model_class: type[CellNet]) -> dict[str, Any]:
    """What no shape tells of the published network with these widths and depths."""
    defaults = {name: p.default for name, p in inspect.signature(model_class).parameters.items()}
    for variant in (VARIANTS_V2 if model_class is ViTAEv2 else VARIANTS_V1).values():
        options = defaults | variant
        same = ("token_dims", "depths", "patch_size") if "patch_size" in kwargs else ("token_dims", "depths")
        if all(options[name] == kwargs[name] for name in same):
            return {name: options[name] for name in UNTOLD.values() if name in defaults}
    raise CheckpointError(
        f"no published {model_class.__name__} has token widths {kwargs['token_dims']} and depths "
        f"{kwargs['depths']}; give the authors' options as config"
    )


def _contradictions(kwargs: dict[str, Any], kind: Kind, config: dict[str, Any]) -> list[str]:
    """Where a config states other numbers than the weights, or a part that there is none of."""
    stated = STATED if kind != "plain" else {"num_classes": "num_classes"}
    problems = []
    for theirs, ours in stated.items():
        if theirs in config and ours in kwargs:
            value = _by_stage(config[theirs], kwargs) if isinstance(kwargs[ours], tuple) else config[theirs]
            if value != kwargs[ours]:
                problems.append(f"{theirs} is {kwargs[ours]} in the weights, {config[theirs]} in the config")
    if kind == "v2":
        expected = tuple(ATTENTION[name] for name in kwargs["attention"])
        for theirs in ("RC_tokens_type", "NC_tokens_type"):
            if theirs in config and _by_stage(config[theirs], kwargs) != expected:
                problems.append(f"{theirs} is {config[theirs]}, expected {list(expected)}")
    return problems


def _from_config(kwargs: dict[str, Any], kind: Kind, layer: int, config: dict[str, Any]) -> dict[str, Any]:
    """What no shape tells, from a config."""
    found = {ours: config[theirs] for theirs, ours in UNTOLD.items() if theirs in config}
    if kind != "v2":
        found.pop("reduction_heads", None)
        found.pop("window_size", None)
    if kind == "plain":
        heads = config.get("NC_heads", 1)
        return {"num_heads": (heads[layer] if isinstance(heads, list | tuple) else heads,)}
    return {name: value if name == "window_size" else _by_stage(value, kwargs) for name, value in found.items()}


def _by_stage(value: Any, kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """A config's value as one entry per stage."""
    values = value if isinstance(value, list | tuple) else [value] * len(kwargs["depths"])
    return tuple(tuple(v) if isinstance(v, list) else v for v in values)


def _authors_names(model: CellNet, layer: int) -> dict[str, str]:
    """Our module names -> the authors', for every module with weights."""
    names = {
        "head": "head",
        "fc_norm": "fc_norm",
        "embedding": "layers.0.RC",
        "embedding.patch_embed.proj": "layers.0.RC.PRM.proj",
    }
    for ours, module in model.named_modules():
        numbers = re.findall(r"\d+", ours)
        if isinstance(module, ReductionCell):
            theirs = f"layers.{numbers[0]}.RC"
            performer = isinstance(module.attn, Performer)
            inner = f"{theirs}.attn" if performer else f"{theirs}.attn.attn"
            first, second = ("0", "2") if performer else ("fc1", "fc2")
            names |= {f"{ours}.prm.convs.{i}": f"{theirs}.PRM.convs.{i}.0" for i in range(len(module.prm.convs))}
            names |= {f"{ours}.{norm}": f"{theirs}.attn.{norm}" for norm in ("norm1", "norm2")}
            names |= {f"{ours}.attn": inner}
            names |= {f"{ours}.attn.{part}": f"{inner}.{part}" for part in ("kqv", "qkv", "proj")}
            names |= {f"{ours}.mlp.fc1": f"{theirs}.attn.mlp.{first}"}
            names |= {f"{ours}.mlp.fc2": f"{theirs}.attn.mlp.{second}"}
        elif isinstance(module, NormalCell):
            theirs = f"layers.{numbers[0]}.NC.{numbers[1]}" if len(numbers) > 1 else f"layers.{layer}.NC.{numbers[0]}"
            parts = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
            names |= {f"{ours}.{part}": f"{theirs}.{part}" for part in parts}
        elif isinstance(module, ParallelConv):
            place = 0
            # The cell was met before its PCM, so `theirs` is still the cell's name.
            for index, norm in enumerate(module.norms):
                names[f"{ours}.convs.{index}"] = f"{theirs}.PCM.{place}"
                names[f"{ours}.norms.{index}"] = f"{theirs}.PCM.{place + 1}"
                place += 3 if isinstance(norm, nn.BatchNorm2d) else 2
    return names


def _error(problems: list[str]) -> CheckpointError:
    more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
    return CheckpointError(
        f"checkpoint does not fit ViTAE: {'; '.join(problems[:12])}{more}. "
        "Give a classifier's state dict as ViTAE-Transformer/ViTAE-Transformer saves it."
    )
