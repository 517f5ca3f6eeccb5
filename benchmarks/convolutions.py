"""Convolutions in ONNX Runtime: float, int8 with float output, and int8 that gives codes as well.

    python benchmarks/convolutions.py --output benchmarks/results/convolutions.json

Each is one convolution between two elementwise operations, batch 1 if not said otherwise, one thread, in turns in one
process; processor time, medians of 40 rounds. Ratio is float over this: above 1 is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from leanvit.files import write_json
from measure import SEED, facts

ROUNDS = 40
WARM = 5
FORMS = ("float", "float_output", "codes")


@dataclass(frozen=True)
class Case:
    """One convolution: channels in and out, kernel, side of the map in pixels."""

    name: str
    inputs: int
    outputs: int
    kernel: int
    side: int
    batch: int = 1
    stride: int = 1
    groups: int = 1
    dilation: int = 1


CASES = [
    Case("3x3 of a pyramid", 64, 64, 3, 32),
    Case("3x3 of a mask head, 20 objects", 64, 64, 3, 14, batch=20),
    Case("3x3 on a small map", 64, 64, 3, 8),
    Case("3x3, 128 channels, batch 8", 128, 128, 3, 28, batch=8),
    Case("3x3, stride 2, dilation 4 (PRM)", 64, 64, 3, 32, stride=2, dilation=4),
    Case("1x1", 64, 64, 1, 32),
    Case("1x1, expanding, batch 8", 64, 256, 1, 32, batch=8),
    Case("depthwise 3x3", 256, 256, 3, 28, groups=256),
    Case("3x3 in 16 groups (PCM)", 64, 64, 3, 32, groups=16),
    Case("3x3 of an image", 3, 32, 3, 128, stride=2),
]


def session(case: Case, form: str) -> onnxruntime.InferenceSession:
    """The convolution of `case` in ONNX Runtime, with x (batch, inputs, side, side) float32 in."""
    generator = np.random.default_rng(SEED)
    codes = generator.integers(-80, 80, (case.outputs, case.inputs // case.groups, case.kernel, case.kernel))
    constants: dict[str, Any] = {
        "one": np.float32(1.01), "bias": generator.normal(size=case.outputs).astype(np.float32),
        "scale": np.float32(0.02), "zero": np.uint8(100), "output_scale": np.float32(0.3),
        "weight_scale": np.full(case.outputs, 0.01, np.float32),
        "codes": codes.astype(np.int8), "weight": codes.astype(np.float32) / 100,
    }  # fmt: skip
    options = {
        "pads": [case.kernel // 2 * case.dilation] * 4, "strides": [case.stride] * 2, "group": case.groups,
        "dilations": [case.dilation] * 2,
    }  # fmt: skip
    nodes = [helper.make_node("Mul", ["x", "one"], ["read"])]
    if form == "float":
        nodes.append(helper.make_node("Conv", ["read", "weight", "bias"], ["given"], **options))
    else:
        nodes += [
            helper.make_node("QuantizeLinear", ["read", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            helper.make_node("DequantizeLinear", ["codes", "weight_scale"], ["w"], axis=0),
            helper.make_node("Conv", ["d", "w", "bias"], ["given"], **options),
        ]
    last = "given"
    if form == "codes":
        nodes += [
            helper.make_node("QuantizeLinear", ["given", "output_scale", "zero"], ["written"]),
            helper.make_node("DequantizeLinear", ["written", "output_scale", "zero"], ["back"]),
        ]
        last = "back"
    nodes.append(helper.make_node("Add", [last, "one"], ["y"]))
    read = {name for node in nodes for name in node.input}
    kept = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items() if name in read]
    shape = [case.batch, case.inputs, case.side, case.side]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None)))
    model = helper.make_model(
        helper.make_graph(nodes, "convolution", [x], [y], kept), ir_version=10,
        opset_imports=[helper.make_opsetid("", 21)],
    )  # fmt: skip
    one_thread = onnxruntime.SessionOptions()
    one_thread.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), one_thread, providers=["CPUExecutionProvider"])


def measure(case: Case) -> dict[str, Any]:
    """Milliseconds of every form, and the ratios."""
    sessions = {form: session(case, form) for form in FORMS}
    shape = (case.batch, case.inputs, case.side, case.side)
    x = np.random.default_rng(SEED).normal(size=shape).astype(np.float32)
    times: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(WARM + ROUNDS):
        for form, runner in sessions.items():
            started = time.process_time()
            runner.run(None, {"x": x})
            times[form].append(time.process_time() - started)
    found = {form: 1e3 * statistics.median(values[WARM:]) for form, values in times.items()}
    ratios = {form: found["float"] / found[form] for form in FORMS}
    return {"case": asdict(case), "milliseconds": found, "ratios": ratios}


def main() -> None:
    """Measure all cases and print them as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "convolutions.json"))
    options = parser.parse_args()
    rows = [measure(case) for case in CASES]
    write_json(Path(options.output), {"version": 1, "facts": facts(), "results": rows})
    print("| convolution | float, ms | int8, float output: ratio | int8, int8 output: ratio |\n|---|---:|---:|---:|")
    for row in rows:
        ratios = row["ratios"]
        print(
            f"| {row['case']['name']} | {row['milliseconds']['float']:.3f} | {ratios['float_output']:.2f} "
            f"| {ratios['codes']:.2f} |"
        )


if __name__ == "__main__":
    main()
