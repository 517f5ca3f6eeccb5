"""ONNX Runtime as leanvit opens it, for files that a test holds in memory; and what this CPU can't do."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest


def exact_integers(options: Any | None = None) -> Any:
    """Session options with which int8 products do not saturate on a CPU without VNNI."""
    options = options or onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1" if SATURATES else "0")
    return options


def open_model(proto: Any, options: Any | None = None) -> Any:
    """A session on the CPU of an onnx.ModelProto or its bytes."""
    data = proto if isinstance(proto, bytes) else proto.SerializeToString()
    return onnxruntime.InferenceSession(data, exact_integers(options), providers=["CPUExecutionProvider"])


CPU = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
SATURATES = "avx2" in CPU and "vnni" not in CPU
"""Whether kernels of uint8 x int8 clip sums in int16, which OpenVINO has no way around."""

needs_vnni = pytest.mark.skipif(SATURATES, reason="some int8 products saturate on this CPU: it has no VNNI")


def exact_runtimes(runtimes: Iterable[str]) -> list[str]:
    """The runtimes whose int8 products don't saturate on this CPU."""
    return [name for name in runtimes if not (SATURATES and name.startswith("openvino"))]
