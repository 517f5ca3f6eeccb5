"""ReViT checkpoints of the authors' program (github.com/ADiko1997/ReViT) as leanvit's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.errors import CheckpointError
from leanvit.models._paper import Converted
from leanvit.models.revit import ReViT

BASE: dict[str, Any] = {
    "crop_size": 224,
    "num_classes": 1000,
    "embed_dim": 768,
    "num_heads": 12,
    "depth": 12,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "patch_kernel": [16, 16],
    "drop_path": 0.2,
    "cls_embed_on": False,
}


def convert(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Converted:
    """A ReViT of the authors in leanvit's names.

    state_dict: the authors' keys. config: their settings where they differ from ReViT-B's (`cfg` of the
    golden files, or the metadata around it); None: read from the shapes, with heads of 64 channels.
    Raises CheckpointError where keys are unknown, missing or misshapen, or a setting is unknown.
    """
    if config is None:
        settings = {**BASE, **_settings_from_shapes(state_dict)}
    else:
        settings = {**BASE, **overrides(config, "ReViT-B", BASE)}
    kwargs = {
        "img_size": settings["crop_size"],
        "patch_size": tuple(settings["patch_kernel"]),
        "num_classes": settings["num_classes"],
        "embed_dim": settings["embed_dim"],
        "depth": settings["depth"],
        "num_heads": settings["num_heads"],
        "mlp_ratio": settings["mlp_ratio"],
        "qkv_bias": settings["qkv_bias"],
        "class_token": settings["cls_embed_on"],
    }
    return Converted(kwargs, renamed(state_dict, lambda: ReViT(**kwargs), rename_head))


def rename_head(name: str) -> str:
    """The authors' name of one of our parameters (ReViT and ReMViTv2)."""
    return name.replace("head.", "head.projection.") if name.startswith("head.") else name


def overrides(config: Mapping[str, Any], program: str, known: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a golden file's metadata, or the `cfg` inside it, changes.

    Raises CheckpointError where it is of another program or a setting is not in `known`.
    """
    cfg = dict(config.get("cfg", config))
    found = cfg.pop("yaml", program)
    if found != program:
        raise CheckpointError(f"config is of {found!r}, expected {program!r}: choose the family by its yaml")
    unknown = sorted(set(cfg) - set(known))
    if unknown:
        raise CheckpointError(f"config has unknown settings {unknown}, expected some of {sorted(known)}")
    return cfg


def renamed(
    state_dict: Mapping[str, Tensor],
    build: Callable[[], nn.Module],
    authors_name: Callable[[str], str],
    ignored: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The authors' tensors under our names, checked against the model that `build` makes.

    ignored: last parts of the authors' keys that hold no weights.
    Raises CheckpointError that lists every unknown, missing and misshapen key.
    """
    with torch.device("meta"):
        ours = build().state_dict()
    theirs = {key: value for key, value in state_dict.items() if key.rsplit(".", 1)[-1] not in ignored}
    names = {authors_name(name): name for name in ours}
    problems = []
    if unknown := sorted(theirs.keys() - names.keys()):
        problems.append(f"unknown keys {unknown}")
    if missing := sorted(names.keys() - theirs.keys()):
        problems.append(f"missing keys {missing}")
    misshapen = [
        f"{key} is {tuple(theirs[key].shape)}, expected {tuple(ours[name].shape)}"
        for key, name in names.items()
        if key in theirs and theirs[key].shape != ours[name].shape
    ]
    if misshapen:
        problems.append("misshapen keys: " + ", ".join(misshapen))
    if problems:
        raise CheckpointError(
            f"checkpoint is of another architecture: {'; '.join(problems)}. Give the config it was trained with"
        )
    return {name: theirs[key] for key, name in names.items()}


def shape_of(state_dict: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    """Shape of one tensor. Raises CheckpointError where the checkpoint has no such key."""
    if key not in state_dict:
        raise CheckpointError(f"checkpoint has missing keys ['{key}']: is it of another family?")
    return tuple(state_dict[key].shape)


def depth_of(state_dict: Mapping[str, Tensor], prefix: str = "blocks.") -> int:
    """How many numbered modules the keys under `prefix` name. Raises CheckpointError where there are none."""
    start = len(prefix)
    found = {key[start:].split(".", 1)[0] for key in state_dict if key.startswith(prefix)}
    if not found:
        raise CheckpointError(f"checkpoint has missing keys ['{prefix}*']: is it of another family?")
    return len(found)


def _settings_from_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, *patch = shape_of(state_dict, "patch_embed.proj.weight")
    class_token = "cls_token" in state_dict
    tokens = shape_of(state_dict, "pos_embed")[1] - class_token
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise CheckpointError(f"pos_embed holds {tokens} positions, expected a square number: give a config")
    return {
        "embed_dim": width,
        "num_heads": width // 64,
        "depth": depth_of(state_dict),
        "patch_kernel": patch,
        "crop_size": side * patch[0],
        "mlp_ratio": shape_of(state_dict, "blocks.0.mlp.fc1.weight")[0] / width,
        "num_classes": shape_of(state_dict, "head.projection.weight")[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
        "cls_embed_on": class_token,
    }
