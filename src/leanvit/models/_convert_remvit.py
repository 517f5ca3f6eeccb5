"""ReMViTv2 checkpoints of the authors' program (github.com/ADiko1997/ReViT) as leanvit's."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from torch import Tensor

from leanvit.errors import CheckpointError
from leanvit.models._convert_revit import depth_of, overrides, rename_head, renamed, shape_of
from leanvit.models._paper import Converted
from leanvit.models.remvit import ReMViT

BASE: dict[str, Any] = {
    "crop_size": 224,
    "num_classes": 1000,
    "embed_dim": 96,
    "num_heads": 1,
    "depth": 10,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "drop_path": 0.1,
    "dim_mul": [[1, 2.0], [3, 2.0], [8, 2.0]],
    "head_mul": [[1, 2.0], [3, 2.0], [8, 2.0]],
    "pool_q_stride": None,
}


def convert(state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Converted:
    """A ReMViTv2 of the authors in leanvit's names.

    state_dict: the authors' keys. config: their settings where they differ from ReMViTv2-T's (`cfg` of the
    golden files, or the metadata around it); None: read from the shapes.
    Raises CheckpointError where keys are unknown, missing or misshapen, or a setting is one we do not have.
    """
    given = _settings_from_shapes(state_dict) if config is None else overrides(config, "ReMViTv2-T", BASE)
    settings = {**BASE, **given}
    kwargs = {
        "img_size": settings["crop_size"],
        "num_classes": settings["num_classes"],
        "embed_dim": settings["embed_dim"],
        "depths": _depths(settings),
        "num_heads": settings["num_heads"],
        "mlp_ratio": settings["mlp_ratio"],
        "qkv_bias": settings["qkv_bias"],
    }
    return Converted(kwargs, renamed(state_dict, lambda: ReMViT(**kwargs), rename_head))


def _depths(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Blocks per stage. Raises CheckpointError where width, heads and queries do not change together by 2."""
    starts = [int(layer) for layer, _ in settings["dim_mul"]]
    doubled = [[layer, 2.0] for layer in starts]
    if [list(pair) for pair in settings["dim_mul"]] != doubled or settings["dim_mul"] != settings["head_mul"]:
        raise CheckpointError(
            f"dim_mul is {settings['dim_mul']} and head_mul {settings['head_mul']}, expected both to double at "
            "the same layers"
        )
    strides = settings["pool_q_stride"]
    if strides is not None and [[i, r, c] for i, r, c in strides if (r, c) != (1, 1)] != [
        [layer, 2, 2] for layer in starts
    ]:
        raise CheckpointError(f"pool_q_stride is {strides}, expected 2 2 at layers {starts} and 1 1 elsewhere")
    bounds = [0, *starts, settings["depth"]]
    return tuple(end - start for start, end in pairwise(bounds))


def _settings_from_shapes(state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
    width = shape_of(state_dict, "patch_embed.proj.weight")[0]
    head_dim = shape_of(state_dict, "blocks.0.attn.pool_q.weight")[0]
    depth = depth_of(state_dict)
    changes = [[layer, 2.0] for layer in range(depth) if f"blocks.{layer}.proj.weight" in state_dict]
    # The first layer's queries stand on the grid of patches, which are 4 pixels apart.
    side = (shape_of(state_dict, "blocks.0.attn.rel_pos_h")[0] + 1) // 2
    return {
        "embed_dim": width,
        "num_heads": width // head_dim,
        "depth": depth,
        "dim_mul": changes,
        "head_mul": changes,
        "crop_size": side * 4,
        "mlp_ratio": shape_of(state_dict, "blocks.0.mlp.fc1.weight")[0] / width,
        "num_classes": shape_of(state_dict, "head.projection.weight")[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in state_dict,
    }
