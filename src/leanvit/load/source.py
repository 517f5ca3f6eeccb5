"""What a kind of source is: one value of Source."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import LoadOptions

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Source:
    """One kind of what a user calls a network.

    name: of the kind, which CheckpointInfo.source["kind"] has where timm does not build the network.
    form: how a spec of it is written. claims: whether a spec is of this kind, without opening more than a header.
    open: (spec, options) -> network in eval mode on the CPU in float32, and its description. It obeys the options that
    decide how the network is built (model_name, ema, img_size); labels and preprocessing are adjusted after it.
    build: (info) -> the network that a description is of, with random weights; None where timm builds it.
    """

    name: str
    form: str
    claims: Callable[[str], bool]
    open: Callable[[str, LoadOptions], tuple[nn.Module, CheckpointInfo]]
    build: Callable[[CheckpointInfo], nn.Module] | None = None


def config_with(folder: str | Path, key: str) -> dict[str, Any]:
    """What config.json of a folder says, where it has a key by which its library is told; empty for all else."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) and key in config else {}
