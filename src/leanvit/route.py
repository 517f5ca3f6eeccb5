"""Which task a checkpoint, a quantized network or a bundle is for, read without torch."""

from __future__ import annotations

import json
import struct
from pathlib import Path

CLASSIFY = "classify"
_CHECKPOINT = "model.safetensors"
_QUANTIZED = "quantized.safetensors"
_BUNDLE = "bundle.json"
_LARGEST_HEADER = 100 << 20


def task_of(path: str | Path) -> str:
    """The task of a checkpoint file, run folder, folder of quantized parts or bundle; "classify" for all else.

    Nothing is judged here: what opens the files says what is wrong with them.
    """
    path = Path(path)
    try:
        if (path / _BUNDLE).is_file():
            return str(json.loads((path / _BUNDLE).read_bytes()).get("task", CLASSIFY))
        for candidate in (path / _CHECKPOINT, *(path / part / _QUANTIZED for part in ("network", "pyramid")), path):
            if candidate.is_file():
                return _task_of_tensors(candidate)
    except (OSError, ValueError, AttributeError, struct.error):
        pass
    return CLASSIFY


def _task_of_tensors(path: Path) -> str:
    """From the header of a safetensors file: eight bytes of length, then JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > _LARGEST_HEADER:
            return CLASSIFY
        header = json.loads(file.read(length))
    info = json.loads(header.get("__metadata__", {}).get("leanvit", "{}"))
    return str(info.get("task", CLASSIFY))
