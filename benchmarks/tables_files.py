"""Tables of deployed files: what runs how fast in which runtime, from deploy.json and merge.json."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import resources
from typing import Any

import deploy
import leanvit.commands.demo as demo_command
from leanvit.bench import RUNTIME_LABELS
from leanvit.report.svg import Row, bar_chart
from tables_common import day, days, machine_words, markdown, results

VIT = "vit_small_patch16_224"
MODELS = {
    "files_vit": ("ViT-S", VIT),
    "files_revit": ("ReViT-S", "revit_small_patch16_224"),
    "files_swin": ("Swin-T", "swin_tiny_patch4_window7_224"),
    "files_vitaev2": ("ViTAEv2-S", "vitaev2_small"),
    "files_exmobilevit": ("ExMobileViT-928", "exmobilevit_928"),
}
"""Tables of docs/measured/files.md and the networks that they are of, in words and by name."""

FILES = (
    ("float", "fp32", "ONNX Runtime"),
    ("**leanvit, w8a8**", "w8a8", "ONNX Runtime"),
    ("ONNX Runtime's dynamic quantization", "ort-dynamic", "ONNX Runtime"),
    ("ONNX Runtime's static quantization", "ort-static", "ONNX Runtime"),
    ("float", "fp32", "OpenVINO"),
    ("**leanvit, profile openvino**", "openvino-w8a8", "OpenVINO"),
    ("NNCF", "nncf", "OpenVINO"),
)
"""Rows of the README's table: what it is called there, the file's name in deploy.json, the runtime."""

SAME_DB = 100
"""Above which only the order of sums differs."""

LEAST_SHARE = 0.01
"""Of the time: operations below are left out of a table."""


def rows_of(model: str) -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of a network in deploy.json by file, with its runtime, and batch."""
    return {(r["name"], r["batch_size"]): r for r in results("deploy.json")["results"] if r["model"] == model}


def vit_small() -> str:
    """A ViT-S at 224 px: our files and the peers' in the same run."""
    rows = rows_of(VIT)
    lines = []
    for said, name, runtime in FILES:
        one, eight = (rows[f"{name}, {runtime}", batch] for batch in (1, 8))
        near = "the same" if one["sqnr_db"] > SAME_DB else f"{one['sqnr_db']:.0f} dB"
        lines.append(
            (said, runtime, f"{one['bytes'] / 1e6:.0f} MB", f"{one['median_ms']:.1f} ms",
             f"{one['ratio']:.2f}x", f"{eight['ratio']:.2f}x", near)
        )  # fmt: skip
    header = ("file", "runs in", "size", "1 image", "speed, batch 1", "batch 8", "near the float outputs")
    facts = rows[FILES[0][1] + ", " + FILES[0][2], 1]["facts"]
    return markdown(header, lines, 2) + (
        f"\n\n`{VIT}` with random weights, {machine_words(facts['machine'])}, {facts['threads']} threads, "
        f"in turns in one run, {day(facts['date'])}, seed {facts['seed']}: `python benchmarks/deploy.py`. "
        "Speed is against float in ONNX Runtime at the same batch size."
    )


def demo() -> str:
    """What `leanvit demo` prints: the first seed of benchmarks/demo.py."""
    first = results("demo.json")["runs"][0]
    ratios: dict[str, list[str]] = {}
    for row in first["speed"]["results"]:
        if row["speedup"] != 1:
            ratios.setdefault(RUNTIME_LABELS[row["runtime"]], []).append(f"{row['speedup']:.2f}")
    vit = ", ".join(f"{runtime} {' and '.join(found)} times" for runtime, found in ratios.items())
    cpu = f"CPU {'with' if 'avx512_vnni' in first['machine']['features'] else 'without'} VNNI"
    return (
        f"{demo_command.markdown({**first, 'speed': None})}The ViT-S on that {cpu}, W8A8 against float32 at batch 1 "
        f"and 8: {vit}."
    )


def _files_of(model: str) -> str:
    """All files of a network, ours and the peers', as benchmarks/deploy.py prints them."""
    rows = list(rows_of(model).values())
    facts = rows[0]["facts"]
    when = days(row["facts"]["date"] for row in rows)
    lines = deploy.speed_table(rows).splitlines()
    table = "\n".join("|" + line.split("|", 2)[2] for line in lines)  # without the model's name in every line
    return table + f"\n\n{when}, {machine_words(facts['machine'])}, seed {facts['seed']}."


SHIPPED = (("float", "fp32, ONNX Runtime"), ("w8a8", "w8a8, ONNX Runtime"), ("openvino", "openvino-w8a8, OpenVINO"))
"""Files of a family's page: profile, and file and runtime in deploy.json."""


def _family(model: str) -> str:
    """What a family's network costs as a float file and in 8 bits."""
    rows = rows_of(model)
    lines = [
        (profile, name.rpartition(", ")[2], f"{one['bytes'] / 1e6:.1f}", *_speed(one, rows[name, 8]))
        for profile, name in SHIPPED
        for one in (rows[name, 1],)
    ]  # fmt: skip
    header = ("profile", "runs in", "MB", "batch 1, ms", "ratio", "batch 8, ms", "ratio")
    facts = rows[SHIPPED[0][1], 1]["facts"]
    return markdown(header, lines, 2) + (
        f"\n\n`{model}`, random weights, {machine_words(facts['machine'])}, {day(facts['date'])}: "
        f"`python benchmarks/deploy.py --models {model}`. Yours: `leanvit optimize WEIGHTS --model {model} "
        "--data FOLDER --output runs/mine`."
    )


def _speed(*rows: dict[str, Any]) -> Iterator[str]:
    for row in rows:
        yield from (f"{row['median_ms']:.1f}", f"{row['ratio']:.2f}")


FAMILIES = ("revit", "vitaev2", "exmobilevit")
"""Of MODELS, those that have a page below docs/models."""


def file_accuracy() -> str:
    """Accuracy of the micro models' files, executed."""
    rows = [row for row in results("deploy.json")["results"] if "checks" in row]
    facts = rows[0]["facts"]
    when = days(row["facts"]["date"] for row in rows)
    return deploy.accuracy_table(rows) + f"\n\n{when}, {machine_words(facts['machine'])}, {rows[0]['images']:,} images."


def roofline() -> str:
    """Where the time of a w8a8 file goes, from ONNX Runtime's own profile."""
    (row,) = results("roofline.json")["results"]
    spent = sorted(row["milliseconds"].items(), key=lambda one: -one[1])
    whole = sum(row["milliseconds"].values())
    lines = [(name, f"{ms:.1f}", f"{ms / whole:.0%}") for name, ms in spent if ms >= LEAST_SHARE * whole]
    facts = row["facts"]
    return markdown(("operation", "ms", "share"), lines) + (
        f"\n\n`{row['model']}` w8a8, batch 8, {row['threads']} threads: integer products run at {row['rate']:.0f} "
        f"billion multiply-adds a second, {row['share_of_machine']:.0%} of what large square products reach "
        f"on this machine. {day(facts['date'])}, {machine_words(facts['machine'])}: `python benchmarks/roofline.py`."
    )


BATCH = 8
PEERS = ("ort-static", "ort-static-matmul", "ort-dynamic", "nncf")
OURS = ("w8a8", "openvino-w8a8", "exact-w8a8")
NEAR_DB = 20
"""A tenth of the signal is error. A file of ours that is further from float does not count: ExMobileViT's `exact` in
OpenVINO, which the gate leaves out there."""


def fastest(model: str, files: tuple[str, ...], least_db: float, runtime: str = "") -> dict[str, Any] | None:
    """The row of the fastest of some files at batch 8 that is near enough to float, in any runtime or one and its bf16
    form; None where there is none."""
    found = [
        row
        for (name, batch), row in rows_of(model).items()
        if batch == BATCH and name.rpartition(", ")[0] in files and runtime in name and row["sqnr_db"] >= least_db
    ]
    return max(found, key=lambda row: float(row["ratio"]), default=None)


def files_chart() -> str:
    """Of each network our fastest 8-bit file and the peers' fastest at batch 8, by ratio."""
    bars = []
    for said, model in MODELS.values():
        for who, files, least_db, css in (("leanvit", OURS, NEAR_DB, "s1"), ("peers", PEERS, 0, "s2")):
            row = fastest(model, files, least_db)
            if row is not None:
                text = f"{row['ratio']:.2f}x at {row['sqnr_db']:.0f} dB"
                bars.append(Row(f"{said}, {who}: {row['name']}", row["ratio"], text, css))
    title = "The fastest 8-bit file of each network and of its peers, batch 8"
    return _standalone(str(bar_chart("files", title, bars, "times the speed of float in ONNX Runtime")))


def _standalone(chart: str) -> str:
    """A drawing of a report as a file of its own, with the colours that a report gives it, on paper."""
    style = (resources.files("leanvit.report") / "templates" / "style.css").read_text(encoding="utf-8")
    style += "svg{font-family:system-ui,sans-serif}"
    paper = f"<style>{style}</style><rect width='100%' height='100%' fill='var(--paper)'/>"
    opened, _, rest = chart.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1).partition(">")
    return f"{opened}>{paper}{rest}\n"


def fewer_tokens() -> str:
    """Merged tokens: time against all tokens, from merge.json."""
    found = results("merge.json")["results"]
    lines = [
        (row["model"], f"{row['keep']:.0%}", row["runtime"], row["profile"], row["batch_size"],
         f"{row['milliseconds']:.1f}", f"{row['ratio']:.2f}")
        for row in found
    ]  # fmt: skip
    header = ("network", "tokens", "runs in", "profile", "batch", "ms", "times as fast as with all tokens")
    first = found[0]
    when = days(row["date"] for row in found)
    return markdown(header, lines, 4) + f"\n\n{when}, {machine_words(first['machine'])}, seed {first['seed']}."


TABLES: dict[str, Callable[[], str]] = {
    "vit_small": vit_small,
    "demo": demo,
    **{name: (lambda model=model: _files_of(model)) for name, (_, model) in MODELS.items()},
    **{f"family_{name}": (lambda name=name: _family(MODELS[f"files_{name}"][1])) for name in FAMILIES},
    "file_accuracy": file_accuracy,
    "roofline": roofline,
    "fewer_tokens": fewer_tokens,
}
CHARTS: dict[str, Callable[[], str]] = {"files.svg": files_chart}
