"""Pickles, which can run code when they are read: opened only with weights_only, in a child process with a limit.

The child hands plain tensors back as safetensors, and plain values as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from leanvit.errors import CheckpointError
from leanvit.load.state_dicts import weights_in

MEMORY_LIMIT_BYTES = 16 * 2**30
TIMEOUT_SECONDS = 600.0
ALLOWED = (argparse.Namespace,)
"""What a checkpoint may hold beside tensors and plain values: timm's trainer keeps its arguments so."""

KEPT_DEPTH = 3
"""How deep plain values beside the weights are kept: hyper_parameters, and a configuration in them."""


def read_pickle(path: Path, *, ema: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a pickle, and what it says beside them: plain values, and under "key" where the tensors stood.

    Raises CheckpointError where it is damaged, or holds more than tensors, plain values and argparse's Namespace.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "weights.safetensors"
        # A process of its own that does not import the caller's script, as multiprocessing's would.
        command = [sys.executable, "-m", "leanvit.load.pickles", str(path), str(target), "ema" if ema else ""]
        paths = os.pathsep.join(one for one in sys.path if one)
        try:
            subprocess.run(
                command,
                check=False,
                capture_output=True,
                timeout=TIMEOUT_SECONDS,
                env={**os.environ, "PYTHONPATH": paths},
            )
            answer = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))
        except subprocess.TimeoutExpired:
            answer = {"problem": "it took more than ten minutes"}
        except OSError:
            answer = {"problem": "the reader was ended, perhaps for want of memory"}
        if "problem" in answer:
            raise CheckpointError(
                f"{path}: not a checkpoint that can be read safely ({answer['problem']}). "
                "Save its state_dict alone with torch.save, or as safetensors, where it was made."
            )
        return load_file(target), dict(answer)


def _unpickle(path: Path, target: Path, ema: bool) -> dict[str, Any]:
    """Body of the child process: writes `target` and returns what else is known, or the reason why not."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        with torch.serialization.safe_globals(list(ALLOWED)):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, Mapping):
            raise CheckpointError(f"it holds a {type(checkpoint).__name__}, expected a dictionary of tensors")
        tensors, key = weights_in(checkpoint, ema=ema)
        # Clones, because tensors of a checkpoint may share storage, which safetensors refuses.
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, str(target))
        said = {str(name): _plain(value, KEPT_DEPTH) for name, value in checkpoint.items() if name != "optimizer"}
        return {"key": key, "said": said}
    except Exception as error:
        return {"problem": _reason(error, path)}


def _reason(error: Exception, path: Path) -> str:
    """Why, in a line: torch's text names what was not allowed after a page of advice to allow it."""
    try:
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:
        unsafe = []
    others = [name for name in unsafe if name != "argparse.Namespace"]
    if others:
        return f"it holds objects of {', '.join(others[:3])}, which would run code"
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _plain(value: Any, depth: int) -> Any:
    """Numbers, texts, and lists and dictionaries of them; None for all else."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, bool | int | float | str):
        return value
    if depth and isinstance(value, Mapping):
        return {str(name): _plain(one, depth - 1) for name, one in value.items() if not isinstance(one, Tensor)}
    if depth and isinstance(value, list | tuple) and len(value) <= 1000:
        return [_plain(one, depth - 1) for one in value]
    return None


if __name__ == "__main__":
    given, wanted, averaged = sys.argv[1:]
    told = json.dumps(_unpickle(Path(given), Path(wanted), bool(averaged)))
    Path(wanted).with_suffix(".json").write_text(told, encoding="utf-8")
