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
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, get_args

import numpy as np

from leanvit.config import Runtime
from leanvit.errors import BundleError, ConfigError, EnvironmentProblem, is_installed, require
from leanvit.files import read_json, sha256, write_json

RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
PACKAGES: dict[str, str] = {"onnxruntime": "onnxruntime", "openvino": "openvino", "openvino-bf16": "openvino"}

TURNS = 5

INTEGER_PRODUCT = (
    b"CAo6UAoYCgF4CgF3EgF5Ig1NYXRNdWxJbnRlZ2VyEgFnWg8KAXgSCgoICAISBAoACgBaDwoBdxIKCggIAxIECgAKAGIPCgF5EgoKCAgGEgQKAAoA"
    b"QgQKABAV"
)
"""An ONNX file of one MatMulInteger, x (m, k) uint8 times w (k, n) int8, in base64: the runtime doesn't need onnx."""


Run = Callable[[Any], Sequence[Any]]
"""From images (N, H, W, 3) uint8 to all outputs of a file, in their order."""


@dataclass(frozen=True)
class Engine:
    """A model file, loaded: engine(images) takes (N, H, W, 3) uint8 and returns logits (N, classes) float32.

    Many threads may call it at once, and it can be pickled. A forked process may call it in ONNX Runtime; in OpenVINO
    it raises EnvironmentProblem there.
    input_size: H and W that the file takes. names: of its outputs, in their order.
    """

    run: Run
    input_size: tuple[int, int]
    names: tuple[str, ...] = ("logits",)

    def __call__(self, images: Any) -> Any:
        """The first output for a batch: a classifier's logits."""
        return self.run(images)[0]

    def outputs(self, images: Any) -> dict[str, Any]:
        """All outputs for a batch by name."""
        return dict(zip(self.names, self.run(images), strict=True))


class _InEachProcess:
    """The `Run` of a file, which every other process that calls it opens for itself: after a fork, or from a pickle.

    Threads of a runtime do not survive a fork, and its sessions can't be pickled. There is no lock: one that another
    thread held while the process was forked would never be free again. At worst two threads open the file twice.
    """

    def __init__(self, run: Run, open_again: Callable[[], Engine], model: Path) -> None:
        self._opened: tuple[int, Run | None] = os.getpid(), run
        self._open_again = open_again
        self._model = model
        self._digest = sha256(model)

    def __call__(self, images: Any) -> Sequence[Any]:
        process, run = self._opened
        if run is None or process != os.getpid():
            run = self._open_here()
        return run(images)

    def _open_here(self) -> Run:
        if not self._model.is_file() or sha256(self._model) != self._digest:
            raise BundleError(
                f"{self._model}: gone or another file, expected the one that was loaded before this process started. "
                "Load the bundle again."
            )
        run = self._open_again().run
        self._opened = os.getpid(), run
        return run

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": (0, None)}


def session_options(threads: int = 0) -> Any:
    """How ONNX Runtime is to run a file: its SessionOptions, telemetry off. 0 threads means all cores.

    Raises MissingDependencyError without onnxruntime.
    """
    ort = require("onnxruntime")
    ort.disable_telemetry_events()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Idle threads that spin would take the cores from whatever runs beside this session.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # Where kernels of uint8 x int8 saturate, 15 dB are left where there should be 44 (vit_micro, AVX2). ONNX Runtime
    # then takes uint8 weights, on which a CPU with VNNI takes 2.5 times as long (197 x 1024 x 1024, 1.32.0).
    options.add_session_config_entry("session.x64quantprecision", "1" if saturates() else "0")
    return options


def open_session(model: Path, threads: int = 0, *, profile_to: Path | None = None, graph_to: Path | None = None) -> Any:
    """An ONNX Runtime session on the CPU, telemetry off; 0 threads means all cores.

    profile_to: beginning of the name of a file for the time of every kernel. graph_to: file for the graph as it is run.
    Raises MissingDependencyError without onnxruntime, BundleError where the file can't be loaded.
    """
    ort, options = require("onnxruntime"), session_options(threads)
    if profile_to:
        options.enable_profiling, options.profile_file_prefix = True, str(profile_to)
    if graph_to:
        options.optimized_model_filepath = str(graph_to)
    try:
        return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())
        if "opset" in reason.lower():
            raise BundleError(
                f"{model}: ONNX Runtime {ort.__version__} is too old for the file. Run: pip install --upgrade "
                "onnxruntime, or export with --opset 21, which 1.22 reads."
            ) from error
        raise BundleError(f"{model}: ONNX Runtime can't load it ({reason[:200]}). Export the model again.") from error


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether ONNX Runtime's kernels of uint8 x int8 add pairs of products in int16 here, as on x86 without VNNI.

    Asked of the runtime itself, by the largest values it multiplies: not every system tells of its CPU.
    """
    ort = require("onnxruntime")
    session = ort.InferenceSession(b64decode(INTEGER_PRODUCT), providers=["CPUExecutionProvider"])
    length = 64
    (found,) = session.run(None, {"x": np.full((16, length), 255, np.uint8), "w": np.full((length, 16), 127, np.int8)})
    return bool((found != 255 * 127 * length).any())


def open_engine(model: Path, runtime: Runtime, threads: int = 0) -> Engine:
    """Load a model file in one runtime; 0 threads means all cores.

    "openvino" computes in float32 what is not int8, "openvino-bf16" in bfloat16.
    Raises ConfigError for an unknown runtime, MissingDependencyError, BundleError where the file can't be loaded.
    """
    if runtime not in RUNTIMES:
        raise ConfigError(f"runtime is {runtime!r}, expected one of {', '.join(RUNTIMES)}")
    model = model.absolute()  # a spawned process may stand in another folder
    open_file = partial(_open_onnxruntime, model, threads)
    if runtime != "onnxruntime":
        open_file = partial(_open_openvino, model, threads, runtime)
    opened = open_file()
    return replace(opened, run=_InEachProcess(opened.run, open_file, model))


def _open_onnxruntime(model: Path, threads: int) -> Engine:
    session = open_session(model, threads)
    height, width = session.get_inputs()[0].shape[1:3]
    names = tuple(output.name for output in session.get_outputs())
    return Engine(lambda images: session.run(None, {"images": images}), (height, width), names)


def compile_openvino(model: Path, threads: int, runtime: str, *, profiled: bool = False) -> Any:
    """A model file compiled by OpenVINO. runtime: "openvino" or "openvino-bf16". profiled: it counts kernels' time.

    Raises MissingDependencyError, BundleError where the file can't be loaded.
    """
    precision = "bf16" if runtime == "openvino-bf16" else "f32"
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERF_COUNT": profiled}
    if threads:
        options["INFERENCE_NUM_THREADS"] = threads
    core = openvino_core()
    try:
        return core.compile_model(str(model), "CPU", options)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{model}: OpenVINO can't load it ({reason}). Use --runtime onnxruntime.") from error


def _open_openvino(model: Path, threads: int, runtime: str) -> Engine:
    compiled = compile_openvino(model, threads, runtime)
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


def openvino_core() -> Any:
    """OpenVINO's core, imported without its telemetry.

    Raises MissingDependencyError where it is not installed, EnvironmentProblem in a process that was forked from one
    that uses OpenVINO: there its calls may wait for ever for threads that did not survive the fork.
    """
    process, core = _core()
    if process != os.getpid():
        raise EnvironmentProblem(
            "OpenVINO was in use before this process was forked and does not survive that, expected a process of its "
            "own. Start it by spawn (multiprocessing.get_context('spawn')), or use runtime onnxruntime."
        )
    return core


@lru_cache(maxsize=1)
def _core() -> tuple[int, Any]:
    """The process that made the core, and the core."""
    with without_openvino_telemetry():
        return os.getpid(), require("openvino").Core()


def cpuinfo() -> dict[str, str]:
    """What Linux tells of the first processor; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in pairs}


def lacks_vnni() -> bool:
    """Whether this is an x86 processor whose int8 kernels add pairs of products in int16, which saturates."""
    flags = cpuinfo().get("flags", "").split()
    return "avx2" in flags and not {"avx512_vnni", "avx_vnni"} & set(flags)


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
