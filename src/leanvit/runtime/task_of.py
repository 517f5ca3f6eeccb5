"""What a checkpoint, a quantized network or a bundle says of itself, and which task it is for; without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

CLASSIFY = "classify"
_CHECKPOINT = "model.safetensors"
_QUANTIZED = "quantized.safetensors"
_BUNDLE = "bundle.json"
_REPORT = "quantize.json"
_LARGEST_HEADER = 100 << 20


def task_of(path: str | Path) -> str:
    """The task of a checkpoint file, run folder, folder of quantized parts or bundle; "classify" for all else."""
    task = description_of(path).get("task", CLASSIFY)
    return task if isinstance(task, str) else CLASSIFY


def description_of(path: str | Path) -> dict[str, Any]:
    """What bundle.json says, or the metadata of a checkpoint file, run folder or folder of quantized parts.

    Empty for all else. Nothing is judged here: what opens the files says what is wrong with them.
    """
    path = Path(path)
    try:
        if (path / _BUNDLE).is_file():
            return dict(json.loads((path / _BUNDLE).read_bytes()))
        parts = sorted(path.glob(f"*/{_QUANTIZED}")) if (path / _REPORT).is_file() else []
        for candidate in (path / _CHECKPOINT, *parts, path):
            if candidate.is_file():
                return _metadata_of_tensors(candidate)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, struct.error):
        pass
    return {}


def _metadata_of_tensors(path: Path) -> dict[str, Any]:
    """From the header of a safetensors file: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            return {}
        header = json.loads(file.read(length))
    return dict(json.loads(header.get("__metadata__", {}).get("leanvit", "{}")))
