"""ReSwin checkpoints of the authors' program (github.com/ADiko1997/ReViT) as leanvit's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from leanvit.models._convert_revit import depth_of, overrides, renamed, shape_of
from leanvit.models._paper import Converted
from leanvit.models.reswin import ReSwin

BASE: dict[str, Any] = {
    "crop_size": 224,
    "patch_size": 4,
    "num_classes": 1000,
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "drop_path": 0.2,
}

BUFFERS = ("relative_position_index", "attn_mask")


def convert(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Converted:
    """A ReSwin of the authors; parameter names are the same, index and mask buffers are left out.

    state_dict: the authors' keys. config: their settings where they differ from ReSwin-T's (`cfg` of the
    golden files, or the metadata around it); None: read from the shapes, for images of 224 px.
    Raises CheckpointError where keys are unknown, missing or misshapen, or a setting is unknown.
    """
    given = _settings_from_shapes(state_dict) if config is None else overrides(config, "ReSwin-T", BASE)
    settings = {**BASE, **given}
    kwargs = {
        "img_size": settings["crop_size"],
        "patch_size": settings["patch_size"],
        "num_classes": settings["num_classes"],
        "embed_dim": settings["embed_dim"],
        "depths": tuple(settings["depths"]),
        "num_heads": tuple(settings["num_heads"]),
        "window_size": settings["window_size"],
        "mlp_ratio": settings["mlp_ratio"],
        "qkv_bias": settings["qkv_bias"],
    }
    return Converted(kwargs, renamed(state_dict, lambda: ReSwin(**kwargs), lambda name: name, BUFFERS))


def _settings_from_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    width, _, patch, _ = shape_of(state_dict, "patch_embed.proj.weight")
    stages = range(depth_of(state_dict, "layers."))
    tables = [shape_of(state_dict, f"layers.{stage}.blocks.0.attn.relative_position_bias_table") for stage in stages]
    return {
        "patch_size": patch,
        "embed_dim": width,
        "depths": [depth_of(state_dict, f"layers.{stage}.blocks.") for stage in stages],
        "num_heads": [table[1] for table in tables],
        "window_size": (math.isqrt(tables[0][0]) + 1) // 2,
        "mlp_ratio": shape_of(state_dict, "layers.0.blocks.0.mlp.fc1.weight")[0] / width,
        "num_classes": shape_of(state_dict, "head.weight")[0],
        "qkv_bias": "layers.0.blocks.0.attn.qkv.bias" in state_dict,
    }
