"""Runtimes behind one call: pixels in, logits out. ONNX Runtime, and OpenVINO where it is installed; torch-free.

Nothing is sent home: ONNX Runtime's telemetry events are switched off, and OpenVINO's Python package is imported
without `openvino_telemetry`, which it then replaces by a stub of its own.
"""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args

import numpy as np

from leanvit.config import Runtime
from leanvit.errors import BundleError, ConfigError, is_installed, require
from leanvit.files import read_json, write_json

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
PACKAGES: dict[str, str] = {"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino-bf16": "openvino"}

TURNS = 5


@dataclass(frozen=True)
class Engine:
    """A model file, loaded: engine(images) takes (N, H, W, 3) uint8 and returns logits (N, classes) float32.

    input_size: H and W that the file takes. names: of its outputs, in their order.
    """

    run: Callable[[Any], Sequence[Any]]
    input_size: tuple[int, int]
    names: tuple[str, ...] = ("logits",)

    def __call__(self, images: Any) -> Any:
        """The first output for a batch: a classifier's logits."""
        return self.run(images)[0]

    def outputs(self, images: Any) -> dict[str, Any]:
        """All outputs for a batch by name."""
        return dict(zip(self.names, self.run(images), strict=True))


def open_session(model: Path, threads: int = 0) -> Any:
    """An ONNX Runtime session on the CPU, telemetry off; 0 threads means all cores.

    Raises MissingDependencyError without onnxruntime, BundleError where the file can't be loaded.
    """
    ort = require("onnxruntime")
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads that spin would take the cores from whatever runs beside this session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Without VNNI, kernels of uint8 x int8 add pairs of products in int16 and saturate: 15 dB where there should be 44
    # (vit_micro, AVX2). ONNX Runtime then takes uint8 weights; where the CPU has VNNI this changes nothing.
    options.add_session_config_entry("session.x64quantprecision", "1")
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{model}: ONNX Runtime can't load it ({reason}). Export the model again.") from error


def open_engine(model: Path, runtime: Runtime, threads: int = 0) -> Engine:
    """Load a model file in one runtime; 0 threads means all cores.

    "openvino" computes in float32 what is not int8, "openvino-bf16" in bfloat16.
    Raises ConfigError for an unknown runtime, MissingDependencyError, BundleError where the file can't be loaded.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    if runtime == "onnxruntime":
        session = open_session(model, threads)
        height, width = session.get_inputs()[0].shape[1:3]
        names = tuple(output.name for output in session.get_outputs())
        return Engine(lambda images: session.run(None, {"images": images}), (height, width), names)
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if runtime == "openvino-bf16" else "f32"}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    try:
        compiled = openvino_core().compile_model(str(model), "CPU", options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{model}: OpenVINO can't load it ({reason}). Use --runtime onnxruntime.") from error
    requests = threading.local()
    height, width = (compiled.inputs[0].partial_shape[axis].get_length() for axis in (1, 2))
    names = tuple(output.get_any_name() for output in compiled.outputs)

    def run(images: Any) -> list[Any]:
        # One request a thread: a request that is busy refuses a second caller.
        if not hasattr(requests, "own"):
            requests.own = compiled.create_infer_request()
        found = requests.own.infer([images])
        # The result's memory belongs to the request and is overwritten by the next call.
        return [np.array(found[index]) for index in range(len(names))]

    return Engine(run, (height, width), names)


@contextlib.contextmanager
def without_openvino_telemetry() -> Iterator[None]:
    """Let packages that are imported meanwhile find no `openvino_telemetry`: they fall back to a stub of their own."""
    before = sys.modules.get("openvino_telemetry")
    # None makes an import fail.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["openvino_telemetry"]
        if before is not None:
            sys.modules["openvino_telemetry"] = before


@lru_cache(maxsize=1)
def openvino_core() -> Any:
    """OpenVINO's core, imported without its telemetry. Raises MissingDependencyError where it is not installed."""
    with without_openvino_telemetry():
        return require("openvino").Core()


def cpuinfo() -> dict[str, str]:
    """What Linux tells of the first processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor() -> str:
    """Name of the processor, as far as the system tells."""
    return cpuinfo().get("model name", platform.processor() or platform.machine())


def available() -> tuple[Runtime, ...]:
    """Runtimes that this machine has; bfloat16 only where the processor computes in it."""
    found = [runtime for runtime in RUNTIMES if is_installed(PACKAGES[runtime])]
    if "openvino-bf16" in found and "BF16" not in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        found.remove("openvino-bf16")
    return tuple(found)


def remembered_choices() -> Path:
    """File that keeps which runtime was fastest for which bundle on this machine."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "leanvit" / "runtimes.json"


def fastest(model: Path, candidates: Sequence[Runtime], images: Any, threads: int, digest: str) -> Runtime:
    """The fastest of the candidates for this file on this machine.

    digest: tells the bundle from others. Measured once, in turns, on `images` (N, H, W, 3) uint8; then seconds a batch
    are remembered in `remembered_choices()`.
    """
    path = remembered_choices()
    known = _read_choices(path)
    key = f"{digest} {processor()} {threads}"
    found = known.get(key)
    if found is None or set(found) != set(candidates):
        found = _measure(model, candidates, images, threads)
        # A read-only home costs a measurement at every start, nothing else.
        with contextlib.suppress(OSError):
            write_json(path, {**known, key: found})
    return min(candidates, key=lambda runtime: found[runtime])


def _read_choices(path: Path) -> dict[str, dict[str, float]]:
    try:
        choices: dict[str, dict[str, float]] = read_json(path)
    except Exception:  # missing or damaged: it is only a memory, and is measured again
        return {}
    return choices


def _measure(model: Path, candidates: Sequence[Runtime], images: Any, threads: int) -> dict[str, float]:
    runs = {runtime: open_engine(model, runtime, threads) for runtime in candidates}
    seconds: dict[str, list[float]] = {runtime: [] for runtime in candidates}
    for turn in range(TURNS + 1):
        for runtime, run in runs.items():
            started = time.perf_counter()
            run(images)
            # The first turn warms up.
            if turn:
                seconds[runtime].append(time.perf_counter() - started)
    return {runtime: statistics.median(values) for runtime, values in seconds.items()}
