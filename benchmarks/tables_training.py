"""Tables and sentences about training, data and the kernels that int8 is worth: docs/train.md, data.md, bundle.md."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

from leanvit.checkpoint import load_checkpoint
from leanvit.models._pretrained import weights_file
from tables_common import markdown, results, where
from tables_files import VIT, rows_of

WAYS = {"scratch": "fresh weights"} | {way: way for way in ("fine-tuned", "fine-tuned, layer decay", "linear probe")}
"""Ways of finetune.json and what they are called."""


def _spread(values: list[float], places: int) -> str:
    return f"{mean(values):.{places}f} ± {stdev(values):.{places}f}"


def _seeds(found: dict[str, Any]) -> str:
    *first, last = map(str, sorted({row["seed"] for row in found["rows"]}))
    return f"seeds {', '.join(first)} and {last}"


def _finetuned(model: str, way: str) -> list[float]:
    return [r["top1"] for r in results("finetune.json")["rows"] if (r["model"], r["way"]) == (model, way)]


def finetune() -> str:
    """Fresh weights, fine-tuning and a linear probe on few images."""
    found = results("finetune.json")
    models = list(dict.fromkeys(row["model"] for row in found["rows"]))
    lines = [(f"`{model}`", *(_spread(_finetuned(model, way), 1) for way in WAYS)) for model in models]
    return markdown(("model", *WAYS.values()), lines) + (
        f"\n\nMean and standard deviation of top-1 in %; {where(found, threads=True)}, {_seeds(found)}."
    )


def distilled() -> str:
    """A student with and without a teacher."""
    found = results("distill.json")
    teacher = found["rows"][0]["teacher"]
    _, info = load_checkpoint(weights_file(*teacher.split(".")))
    ways = {"labels": "none", "soft": f"`{teacher}` ({info.metrics['top1']:.1f}%), soft labels"}
    lines = []
    for way, said in ways.items():
        rows = [row for row in found["rows"] if row["way"] == way]
        right = ", ".join(f"{row['correct']:,}" for row in rows)
        lines.append((said, _spread([row["top1"] for row in rows], 2), right))
    header = ("teacher", "top-1, %", f"correct of {found['rows'][0]['images']:,}, by seed")
    return markdown(header, lines, 3) + f"\n\n{where(found, threads=True)}, {_seeds(found)}."


def resumed() -> str:
    """Runs that were killed, by mode."""
    found = results("resume.json")
    keys = ("kills", "inside_a_write", "resumed_inside_an_epoch", "runs", "identical")
    lines = [
        (row["mode"], *(row.get(key, "") for key in keys)) for row in (*found["rows"], found["total"] | {"mode": "all"})
    ]
    header = ("mode", "kills", "inside a write", "resumed inside an epoch", "runs", "identical to the bit")
    return markdown(header, lines) + (f"\n\n{where(found)}, one thread a process, seed {found['seed']} (of the kills).")


def pipeline() -> str:
    """How much of a training step is the network's."""
    found = results("pipeline.json")
    lines = [
        (row["model"] + (", rotated, erased and mixed" if "mixup" in row else ""), f"{row['seconds']:.2f}",
         f"{row['seconds_without_network']:.3f}", f"{row['share_of_network']:.1%}")
        for row in found["rows"]
    ]  # fmt: skip
    header = ("model", "CPU seconds", "without the network", "share of the network")
    row = found["rows"][0]
    return markdown(header, lines) + (
        f"\n\nCPU seconds of {row['steps']} steps of {row['images'] // row['steps']} images, medians of 3; "
        f"{where(found, threads=True)}, beside other work."
    )


READERS = {
    ("training", "leanvit, threads"): "leanvit, threads (`--workers 0`)",
    ("training", "leanvit, 2 worker processes"): "leanvit, 2 worker processes (`--workers 2`)",
}
"""Readers of data.json that a flag of `leanvit train` chooses."""


def reading() -> str:
    """Images a second that are read, beside timm's loader."""
    found = results("data.json")
    lines = []
    for kind, rows in found["results"].items():
        for index, row in enumerate(rows):
            clock = f"{row['speed_ratio']:.2f}"
            if index:
                clock += f" ({row['speed_ratio_lowest']:.2f} to {row['speed_ratio_highest']:.2f})"
            cost = (f"{row['cpu_ms_per_image']:.2f}", f"{row['cpu_ratio']:.2f}")
            reader = READERS.get((kind, row["reader"]), row["reader"])
            lines.append((kind if index == 0 else "", reader, f"{row['images_per_second']:.0f}", *cost, clock))
    header = ("", "reader", "images/s", "processor ms/image", "ratio by processor time",
              "ratio by the clock (lowest to highest)")  # fmt: skip
    return markdown(header, lines, 2) + (
        f"\n\n{found['files']:,} files of {found['bytes_per_file'] / 1000:.0f} kB, {where(found)}, "
        f"seed {found['seed']}, medians of {found['rounds']} rounds in turns: "
        "`python benchmarks/data.py`."
    )


def convolutions() -> str:
    """Where a convolution is faster in int8."""
    found = results("convolutions.json")
    lines = []
    for row in found["results"]:
        ratios = (f"{row['ratios'][form]:.2f}" for form in ("float_output", "codes"))
        lines.append((row["case"]["name"], f"{row['milliseconds']['float']:.3f}", *ratios))
    header = ("convolution", "float, ms", "int8, float output: ratio", "int8, int8 output: ratio")
    return markdown(header, lines) + (
        f"\n\nRatio of float over int8 in processor time, {where(found['facts'], threads=True)}, beside other work: "
        "`python benchmarks/convolutions.py`."
    )


def int8_attention() -> str:
    """What int8 products in attention cost in ONNX Runtime, and which quantizers are left out for it."""
    rows = rows_of(VIT)
    costs = [
        f"{1 - rows['exact-w8a8, ONNX Runtime', batch]['ratio'] / rows['w8a8, ONNX Runtime', batch]['ratio']:.0%}"
        for batch in (1, 8)
    ]
    return (
        "For ONNX Runtime the fast profiles leave attention products to float kernels, and so drop their activation "
        f"quantizers: on ViT-S the file that runs them all (`exact-w8a8`) loses {costs[0]} of the speed there at "
        f"batch 1 and {costs[1]} at batch 8 ([files](measured/files.md))."
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (finetune, distilled, resumed, pipeline, reading, convolutions, int8_attention)
}
