"""Where a W8A8 file's time goes in ONNX Runtime, and how near its integer products come to what the machine can do.

    python benchmarks/roofline.py --models vit_small_patch16_224 vitaev2_small

The file is that of benchmarks/deploy.py (random weights, seed 0), batch 8. Times are ONNX Runtime's own profile:
medians of 20 runs, milliseconds by operation. Rate is multiply-adds of integer products (from the shapes that the
profile names) over their time. The machine's rate is the best that ONNX Runtime's integer product reaches on large
square matrices with as many threads, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from deploy import write_files
from leanvit.files import write_json
from measure import SEED, facts

RUNS, WARM = 20, 3
SIDES = (1024, 1536, 2048)
INTEGER = ("MatMulIntegerToFloat", "MatMulInteger", "QLinearConv")
BATCH = 8


def _session(model: Any, threads: int, folder: Path | None = None) -> onnxruntime.InferenceSession:
    """folder: where a profile goes, and the graph as it is run."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if folder:
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def machine_rate(threads: int) -> float:
    """Multiply-adds a second (1e9) of the fastest large integer product."""
    generator, best = np.random.default_rng(SEED), 0.0
    for side in SIDES:
        tensors = [
            helper.make_tensor_value_info("a", TensorProto.UINT8, [side, side]),
            helper.make_tensor_value_info("y", TensorProto.INT32, [side, side]),
        ]
        codes = generator.integers(-100, 100, (side, side)).astype(np.int8)
        weight = numpy_helper.from_array(codes, "b")
        product = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
        graph = helper.make_graph([product], "product", tensors[:1], tensors[1:], [weight])
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
        session = _session(model.SerializeToString(), threads)
        a = generator.integers(0, 255, (side, side)).astype(np.uint8)
        seconds = []
        for _ in range(WARM + RUNS):
            started = time.perf_counter()
            session.run(None, {"a": a})
            seconds.append(time.perf_counter() - started)
        best = max(best, side**3 / statistics.median(seconds[WARM:]) / 1e9)
    return best


def fan_ins(optimized: Path) -> dict[str, int]:
    """Multiply-adds of each value that a product with a weight gives, by its node's name."""
    graph = onnx.load(str(optimized)).graph
    sizes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    weight_of = {"QLinearConv": 3, "MatMulIntegerToFloat": 1, "MatMulInteger": 1}
    found = {}
    for node in graph.node:
        if node.op_type in weight_of and (dims := sizes.get(node.input[weight_of[node.op_type]])):
            # A convolution's channels out are the first axis, a matrix' the last.
            found[node.name] = math.prod(dims[1:] if node.op_type == "QLinearConv" else dims[:-1])
    return found


def _multiply_adds(event: dict[str, Any], fan_in: dict[str, int]) -> int:
    """Of one product, by the shape of what it gives."""
    output = next(iter(event["args"]["output_type_shape"][0].values()))
    return math.prod(output) * fan_in[event["name"].removesuffix("_kernel_time")]


def profile(path: Path, pixels: np.ndarray[Any, Any], threads: int) -> dict[str, Any]:
    """Milliseconds by operation, and multiply-adds of integer products, of one run."""
    model = onnx.load(str(path))
    # By its node's name a product of the profile is found again in the graph as it is run; a file may have none.
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    session = _session(model.SerializeToString(), threads, path.parent)
    for _ in range(WARM + RUNS):
        session.run(None, {"images": pixels})
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    nodes = len(kernels) // (WARM + RUNS)
    runs = [kernels[i * nodes : (i + 1) * nodes] for i in range(WARM, WARM + RUNS)]
    by_operation: dict[str, float] = defaultdict(float)
    for same in zip(*runs, strict=True):
        by_operation[same[0]["args"]["op_name"]] += statistics.median(event["dur"] for event in same) / 1e3
    products = [event for event in runs[0] if event["args"]["op_name"] in INTEGER]
    fan_in = fan_ins(path.with_name("optimized.onnx"))
    return {"milliseconds": dict(by_operation), "multiply_adds": sum(_multiply_adds(e, fan_in) for e in products)}


def measure(name: str, threads: int) -> dict[str, Any]:
    """One row: a model's profile and its rate beside the machine's."""
    with tempfile.TemporaryDirectory(prefix="leanvit-roofline-") as folder:
        files, held_out = write_files(name, Path(folder), ["fp32", "w8a8"])
        found = profile(files["w8a8"], held_out[:BATCH], threads)
    integer = sum(ms for operation, ms in found["milliseconds"].items() if operation in INTEGER)
    rate, machine = found["multiply_adds"] / integer / 1e6, machine_rate(threads)
    return found | {
        "model": name, "threads": threads, "integer_milliseconds": integer, "rate": rate, "machine_rate": machine,
        "share_of_machine": rate / machine, "facts": facts(),
    }  # fmt: skip


def table(row: dict[str, Any]) -> str:
    """A row as Markdown: the operations that take 1% and more."""
    times = row["milliseconds"]
    total = sum(times.values())
    lines = [
        f"{row['model']}, {row['threads']} threads, batch {BATCH}: integer products run at {row['rate']:.0f} billion "
        f"multiply-adds a second, {row['share_of_machine']:.0%} of the machine's {row['machine_rate']:.0f}, and take "
        f"{row['integer_milliseconds'] / total:.0%} of {total:.0f} ms.\n",
        "| operation | ms | share |\n|---|---:|---:|",
    ]
    for operation, milliseconds in sorted(times.items(), key=lambda pair: -pair[1]):
        if milliseconds >= total / 100:
            lines.append(f"| {operation} | {milliseconds:.1f} | {milliseconds / total:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Profile the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vitaev2_small"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "roofline.json"))
    options = parser.parse_args()
    rows = [measure(name, options.threads) for name in options.models]
    write_json(Path(options.output), {"version": 1, "results": rows})
    print("\n\n".join(map(table, rows)))


if __name__ == "__main__":
    main()
