"""Checkpoints of the authors of ExMobileViT (program EmPasLab/ExMobileVIT) under leanvit's names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanvit.errors import CheckpointError
from leanvit.models._paper import Converted
from leanvit.models.exmobilevit import ExMobileViT

DEPTHS = (2, 4, 3)
INVERTED_RESIDUALS = ("0.0", "1.0", "1.1", "1.2", "2.0", "3.0", "4.0")
"""Stage and place with us, in the order of the authors' list."""

WIDTHS = ("conv1.0", *(f"mv2.{i}.conv.6" for i in (0, 1, 4, 5, 6)))
DIMS = ("mvit.0.conv2.0", "mvit.1.conv2.0", "mvit.2.conv2.0")
SHORTCUTS = ("conv2_1", "conv2_2")
LAST = "conv2"


def convert(state_dict: dict[str, Tensor], config: dict[str, Any] | None) -> Converted:
    """Read the widths off the weights, name these as `ExMobileViT` does, and check every one of them.

    state_dict: of the authors' `mobilevit_s` or an ExMobileViT. config: as in the golden files' metadata,
    checked against the weights; None for published networks. The network averages with pool='official'.
    Raises CheckpointError that lists unknown, missing and misshapen keys.
    """
    is_ex = any(key.startswith(tuple(f"{name}." for name in SHORTCUTS)) for key in state_dict)
    scales = (*SHORTCUTS, LAST) if is_ex else (LAST,)
    needed = [f"{name}.weight" for name in (*WIDTHS, *DIMS, *(f"{scale}.0" for scale in scales), "fc")]
    if missing := [key for key in needed if key not in state_dict]:
        raise _error([f"missing {key}" for key in missing])

    def rows(names: tuple[str, ...]) -> tuple[int, ...]:
        return tuple(state_dict[f"{name}.weight"].shape[0] for name in names)

    channels = rows(tuple(f"{scale}.0" for scale in scales))
    kwargs: dict[str, Any] = {
        "num_classes": rows(("fc",))[0],
        "in_chans": state_dict["conv1.0.weight"].shape[1],
        "widths": rows(WIDTHS),
        "dims": rows(DIMS),
        "channels": channels if is_ex else (0, 0, *channels),
        "pool": "official",
    }
    problems = [
        f"{name} is {kwargs[name]} in the weights, {config[name]} in the config"
        for name in ("dims", "num_classes")
        if config and name in config and kwargs[name] != _hashable(config[name])
    ]
    with torch.device("meta"):
        expected = ExMobileViT(**kwargs).state_dict()
    authors = _authors_names(scales)
    converted: dict[str, Tensor] = {}
    used = set()
    for name, like in expected.items():
        module, _, leaf = name.rpartition(".")
        key = f"{authors[module]}.{leaf}"
        used.add(key)
        if key not in state_dict:
            problems.append(f"missing {key}")
        elif state_dict[key].shape != like.shape:
            problems.append(f"{key} has shape {tuple(state_dict[key].shape)}, expected {tuple(like.shape)}")
        else:
            converted[name] = state_dict[key]
    problems += [f"unknown {key}" for key in state_dict if key not in used]
    if problems:
        raise _error(problems)
    return Converted(kwargs, converted)


def _authors_names(scales: tuple[str, ...]) -> dict[str, str]:
    """Our module names -> the authors', for every module with weights."""
    pairs = {"fc": "fc"}

    def conv_norm(ours: str, theirs: str, first: int = 0) -> None:
        pairs[f"{ours}.conv"] = f"{theirs}.{first}"
        pairs[f"{ours}.bn"] = f"{theirs}.{first + 1}"

    conv_norm("backbone.stem", "conv1")
    for i, place in enumerate(INVERTED_RESIDUALS):
        for first, conv in ((0, "expand"), (3, "depthwise"), (6, "project")):
            conv_norm(f"backbone.stages.{place}.{conv}", f"mv2.{i}.conv", first)
    for i, depth in enumerate(DEPTHS):
        block = f"backbone.stages.{i + 2}.1"
        for j, conv in enumerate(("conv_kxk", "conv_1x1", "conv_proj", "conv_fusion"), start=1):
            conv_norm(f"{block}.{conv}", f"mvit.{i}.conv{j}")
        for j in range(depth):
            ours, theirs = f"{block}.transformer.{j}", f"mvit.{i}.transformer.layers.{j}"
            pairs |= {
                f"{ours}.norm1": f"{theirs}.0.norm",
                f"{ours}.attn.qkv": f"{theirs}.0.fn.to_qkv",
                f"{ours}.attn.proj": f"{theirs}.0.fn.to_out.0",
                f"{ours}.norm2": f"{theirs}.1.norm",
                f"{ours}.mlp.fc1": f"{theirs}.1.fn.net.0",
                f"{ours}.mlp.fc2": f"{theirs}.1.fn.net.3",
            }
    for i, scale in enumerate(scales):
        conv_norm(f"shortcut.convs.{i}", scale)
    return pairs


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _error(problems: list[str]) -> CheckpointError:
    more = f" and {len(problems) - 12} more" if len(problems) > 12 else ""
    return CheckpointError(
        f"checkpoint does not fit ExMobileViT: {'; '.join(problems[:12])}{more}. "
        "Give a state dict of mobilevit_s or ExMobileViT-576, -640 or -928 as EmPasLab/ExMobileVIT saves it."
    )
