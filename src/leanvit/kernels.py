"""Which kernels a file runs on: how much of its time and of its multiply-adds is on integers, and what the rest is.

Times are the runtime's own profile. ONNX Runtime also tells shapes, and with them multiply-adds and how near integer
products come to the fastest that this machine does (its roofline); OpenVINO tells each kernel's precision.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from base64 import b64decode
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from leanvit.errors import require
from leanvit.runtime.engines import INTEGER_PRODUCT, compile_openvino, open_session, session_options

RUNS, WARM = 20, 3
"""Runs that are profiled, and those before them that fill caches."""
SIDES = (1024, 1536, 2048)
"""Of the square products by which the machine is judged: the largest rate counts."""
CONTROL = frozenset({"If", "Loop", "Scan"})
"""Their time is that of the operations inside, which the profile names as well."""
WEIGHT_OF = {
    "Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvInteger": 1, "QLinearConv": 3, "MatMul": 1, "FusedMatMul": 1,
    "Gemm": 1, "FusedGemm": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1,
    "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
"""Products of ONNX Runtime, and which input is the weight or the second factor."""
INTEGER = frozenset(name for name in WEIGHT_OF if "Q" in name or "Integer" in name or name == "DynamicQuantizeMatMul")
OPENVINO_PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
"""What else OpenVINO marks as of 8 bits, such as the copy of the images, is no computing on integers."""
ATTENTION = frozenset({"Attention", "MultiHeadAttention"})


@dataclass(frozen=True)
class Profile:
    """One run of a file, medians over RUNS.

    milliseconds: by (operation, whether it is a product of integers). multiply_adds: by the same, of
    products only; empty where the runtime tells no shapes.
    """

    milliseconds: dict[tuple[str, bool], float]
    multiply_adds: dict[tuple[str, bool], int]

    def share(self, values: Mapping[tuple[str, bool], float]) -> float | None:
        """Of `values`, the part on integers; None where there are none."""
        total = sum(values.values())
        return sum(value for (_, integer), value in values.items() if integer) / total if total else None

    def rate(self) -> float | None:
        """Multiply-adds a second (1e9) of products on integers; None without any."""
        products = {key: count for key, count in self.multiply_adds.items() if key[1] and count}
        spent = sum(self.milliseconds[key] for key in products)
        return sum(products.values()) / spent / 1e6 if spent else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, the longest operation first."""
        operations = [
            {"operation": name, "int8": integer, "milliseconds": spent,
             "multiply_adds": self.multiply_adds.get((name, integer))}
            for (name, integer), spent in sorted(self.milliseconds.items(), key=lambda pair: -pair[1])
        ]  # fmt: skip
        return {
            "operations": operations,
            "milliseconds": sum(self.milliseconds.values()),
            "int8_share_of_time": self.share(self.milliseconds),
            "int8_share_of_multiply_adds": self.share(self.multiply_adds),
            "int8_rate": self.rate(),
        }


def profile(model: Path, runtime: str, images: Any, threads: int = 0) -> Profile:
    """Profile a model file in one runtime on images (N, H, W, C) uint8; 0 threads means all cores.

    Raises MissingDependencyError (ONNX Runtime's needs the extra onnx, for shapes), BundleError where it can't be
    loaded.
    """
    if runtime == "onnxruntime":
        return _of_onnxruntime(model, images, threads)
    return _of_openvino(model, runtime, images, threads)


@lru_cache(maxsize=4)
def machine_rate(threads: int = 0) -> float:
    """Multiply-adds a second (1e9) of the fastest large product of uint8 and int8 in ONNX Runtime: the roofline."""
    session = require("onnxruntime").InferenceSession(
        b64decode(INTEGER_PRODUCT), session_options(threads), providers=["CPUExecutionProvider"]
    )
    generator, best = np.random.default_rng(0), 0.0
    for side in SIDES:
        feed = {
            "x": generator.integers(0, 255, (side, side)).astype(np.uint8),
            "w": generator.integers(-100, 100, (side, side)).astype(np.int8),
        }
        seconds = []
        for _ in range(WARM + RUNS):
            started = time.perf_counter()
            session.run(None, feed)
            seconds.append(time.perf_counter() - started)
        best = max(best, side**3 / statistics.median(seconds[WARM:]) / 1e9)
    return best


def _of_onnxruntime(model: Path, images: Any, threads: int) -> Profile:
    onnx = require("onnx")
    with tempfile.TemporaryDirectory(prefix="leanvit-profile-") as scratch:
        folder = Path(scratch)
        named, run_graph = folder / "named.onnx", folder / "run.onnx"
        proto = onnx.load(str(model))
        # By its node's name an event is found again in the graph as it is run; a file may have none.
        for number, node in enumerate(proto.graph.node):
            node.name = f"{node.op_type}_{number}"
        onnx.save(proto, str(named))
        session = open_session(named, threads, profile_to=folder / "profile", graph_to=run_graph)
        for _ in range(WARM + RUNS):
            session.run(None, {"images": images})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        fan_in = _fan_in(onnx.load(str(run_graph)).graph)
    return _summed(_runs(events), fan_in)


def _runs(events: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The kernels of each run but the first WARM."""
    runs = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run"][WARM:]
    kernels = [
        e for e in events
        if e.get("cat") == "Node" and e["name"].endswith("_kernel_time") and e["args"]["op_name"] not in CONTROL
    ]  # fmt: skip
    return [[e for e in kernels if start <= e["ts"] <= end] for start, end in runs]


def _summed(runs: list[list[dict[str, Any]]], fan_in: Mapping[str, int]) -> Profile:
    spent: dict[tuple[str, bool], list[float]] = defaultdict(lambda: [0.0] * len(runs))
    counts: dict[tuple[str, bool], int] = defaultdict(int)
    for number, kernels in enumerate(runs):
        for event in kernels:
            operation = event["args"]["op_name"]
            key = operation, operation in INTEGER
            spent[key][number] += event["dur"] / 1e3
            if number == 0:
                counts[key] += _multiply_adds(event, fan_in)
    return Profile(
        {key: statistics.median(values) for key, values in spent.items()},
        {key: count for key, count in counts.items() if count},
    )


def _fan_in(graph: Any) -> dict[str, int]:
    """Multiply-adds of each value that a product with a constant weight gives, by its node's name."""
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        position = WEIGHT_OF.get(node.op_type)
        if position is None or len(node.input) <= position or not (dims := sizes.get(node.input[position])):
            continue
        turned = any(a.name == "transB" and a.i for a in node.attribute)
        # A convolution's channels out are the first axis, as a turned matrix', else the last.
        first = "Conv" in node.op_type or turned
        found[node.name] = math.prod(dims[1:] if first else dims[:-1])
    return found


def _multiply_adds(event: dict[str, Any], fan_in: Mapping[str, int]) -> int:
    """Of one kernel, by the shapes that the profile tells; 0 of what is no product."""
    operation, shapes = event["args"]["op_name"], _shapes(event["args"]["input_type_shape"])
    given = _shapes(event["args"]["output_type_shape"])[0]
    if known := fan_in.get(event["name"].removesuffix("_kernel_time")):
        return math.prod(given) * known
    if operation in ATTENTION:
        query, key = shapes[:2]
        return 2 * math.prod(query) * key[-2]
    if operation not in WEIGHT_OF or "Conv" in operation:
        return 0
    # Of (..., m, k) and (..., k, n), whichever is turned: the sizes' product over the result's is k * k a matrix.
    a, b = (math.prod(shape) for shape in _matrices(shapes))
    matrices, values = math.prod(given[:-2]), math.prod(given)
    return round(values * math.sqrt(a * b / values / matrices)) if values else 0


def _matrices(shapes: Iterable[list[int]]) -> list[list[int]]:
    """The two factors of a product: what has axes, but vectors of scales and biases."""
    return [shape for shape in shapes if len(shape) >= 2][:2]


def _shapes(entries: Iterable[Mapping[str, list[int]]]) -> list[list[int]]:
    return [shape for entry in entries for shape in entry.values()]


def _of_openvino(model: Path, runtime: str, images: Any, threads: int) -> Profile:
    request = compile_openvino(model, threads, runtime, profiled=True).create_infer_request()
    runs: list[dict[tuple[str, bool], float]] = []
    for number in range(WARM + RUNS):
        request.infer([images])
        spent: dict[tuple[str, bool], float] = defaultdict(float)
        for kernel in request.profiling_info:
            if kernel.real_time:
                integer = kernel.node_type in OPENVINO_PRODUCTS and kernel.exec_type.endswith("_I8")
                spent[kernel.node_type, integer] += kernel.real_time.total_seconds() * 1e3
        if number >= WARM:
            runs.append(spent)
    names = {key for run in runs for key in run}
    return Profile({key: statistics.median(run.get(key, 0.0) for run in runs) for key in names}, {})
