"""Time and peak memory of one image as its side grows from 224 to 1792 px.

    python benchmarks/resolution.py                              (about 10 minutes on 2 cores)
    python benchmarks/resolution.py --models vitaev2_small --sides 224 896

Inference at batch 1, our models after fuse(). ReViT-S runs with the carried logits kept (quadratic; definition is
the same before fuse(), which holds one more copy) and computed again from queries and keys (linear), also at 1,024
and 1,536 px. Each model at each side has a process of its own. `seconds` are of the clock; `cpu_seconds` of all
threads, less touched by other work on the machine. `added_megabytes` (MiB) is what one run adds to a loaded model,
`peak_megabytes` the whole process.
Where logits would need more than LIMIT the row says so instead. Results are merged with those stored:
benchmarks/results/resolution.json, drawn in resolution.svg.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from concurrent.futures.process import BrokenProcessPool
from html import escape
from pathlib import Path
from typing import Any

import timm
import torch

from leanvit.files import write_json
from leanvit.models import count_macs, fuse
from leanvit.progress import note
from measure import SEED, facts, in_fresh_process, merged, run_with_peak

RESULTS = Path(__file__).parent / "results" / "resolution.json"
LIMIT = 12 * 1024
"""MiB of logits above which a row is skipped."""

ENOUGH_SECONDS = 10.0
"""A first run longer than this is the measurement; otherwise ROUNDS more are taken."""

ROUNDS = 3
SIDES = (224, 448, 896, 1792)
REVIT_SIDES = (224, 448, 896, 1024, 1536, 1792)
MODELS = {
    "vitaev2_small": "ViTAEv2-S",
    "revit_linear": "ReViT-S, linear",
    "revit_quadratic": "ReViT-S, quadratic",
    "revit_definition": "ReViT-S, not fused",
    "vit": "ViT-S (timm)",
    "swin": "Swin-T (timm)",
}
QKV_GAIN = 5.0
"""ReViT's random queries and keys are enlarged, so that attention is far from uniform and errors would show."""


def build(model: str, side: int) -> torch.nn.Module:
    """A model with random weights for images of this side."""
    torch.manual_seed(SEED)
    if model == "vit":
        return timm.create_model("vit_small_patch16_224", dynamic_img_size=True).eval()
    if model == "swin":
        return timm.create_model("swin_tiny_patch4_window7_224", img_size=side).eval()
    if model == "vitaev2_small":
        return fuse(timm.create_model(model)).eval()
    net = timm.create_model("revit_small_patch16_224")
    net.set_attention_memory("linear" if model == "revit_linear" else "quadratic")
    with torch.no_grad():
        for block in net.blocks:
            block.attn.qkv.weight *= QKV_GAIN
    return (net if model == "revit_definition" else fuse(net)).eval()


def macs(model: str, side: int) -> int:
    """Multiply-adds of one image, attention by its definition."""
    name = {"vit": "vit_small_patch16_224", "swin": "swin_tiny_patch4_window7_224"}.get(model, model)
    options: dict[str, Any] = {"vit": {"dynamic_img_size": True}, "swin": {"img_size": side}}.get(model, {})
    name = "revit_small_patch16_224" if model.startswith("revit") else name
    with torch.device("meta"):
        net = timm.create_model(name, **options)
    if model.startswith("revit"):
        net.set_attention_memory("quadratic")
    return count_macs(net, (side, side))


def measure(model: str, side: int) -> tuple[dict[str, Any], list[float]]:
    """Time and memory of one image in this process, and the logits."""
    import leanvit.models  # noqa: F401 - registers our architectures

    with torch.inference_mode():
        # Libraries and threads start before, with a model that is let go again.
        build(model, 224)(torch.randn(1, 3, 224, 224))
        net = build(model, side)
        x = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(SEED))
        seconds: list[float] = []
        cpu_seconds: list[float] = []

        def run() -> torch.Tensor:
            started, cpu_started = time.perf_counter(), time.process_time()
            logits = net(x)
            seconds.append(time.perf_counter() - started)
            cpu_seconds.append(time.process_time() - cpu_started)
            return logits

        logits, added, peak = run_with_peak(run)
        if seconds[0] < ENOUGH_SECONDS:
            seconds.clear()
            cpu_seconds.clear()
            rounds = ROUNDS if side >= 896 else 5 * ROUNDS
            for _ in range(rounds):
                run()
    row = {
        "seconds": statistics.median(seconds),
        "cpu_seconds": statistics.median(cpu_seconds),
        "rounds": len(seconds),
        "added_megabytes": added,
        "peak_megabytes": peak,
        "logits_std": float(logits.std()),
    }
    return row, logits[0].tolist()


def logits_megabytes(side: int) -> float:
    """What the quadratic paths of ReViT-S need at most: logits of two layers and a softmax, 6 heads."""
    return 3 * 6 * (side // 16) ** 4 * 4 / 2**20


def row_of(model: str, side: int) -> tuple[dict[str, Any], list[float] | None]:
    """The row of one model at one side, measured or skipped, and its logits."""
    start = {"model": model, "side": side, "macs": macs(model, side)}
    needed = logits_megabytes(side)
    if model in ("revit_quadratic", "revit_definition") and needed > LIMIT:
        return {**start, "skipped": f"logits need {needed:.0f} MiB", "facts": facts()}, None
    try:
        found, logits = in_fresh_process(measure, model, side)
    except BrokenProcessPool:
        return {**start, "skipped": "the process was killed, most likely for its memory", "facts": facts()}, None
    return {**start, **found, "facts": facts()}, logits


def contract(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Growth of ViTAEv2-S from 224 to 896 px, and ReViT-S linear over quadratic."""
    by_key = {(row["model"], row["side"]): row for row in rows if "cpu_seconds" in row}
    found: dict[str, Any] = {}
    small, large = by_key.get(("vitaev2_small", 224)), by_key.get(("vitaev2_small", 896))
    if small and large:
        names = ("seconds", "cpu_seconds", "added_megabytes", "peak_megabytes", "macs")
        shared = [name for name in names if name in small and name in large]
        found["vitaev2_growth"] = {name: large[name] / small[name] for name in shared}
    for side in REVIT_SIDES:
        linear, quadratic = by_key.get(("revit_linear", side)), by_key.get(("revit_quadratic", side))
        if linear and quadratic:
            found[f"revit_{side}"] = {
                "added_memory_ratio": linear["added_megabytes"] / quadratic["added_megabytes"],
                "added_memory_ratio_to_definition": _ratio(linear, by_key.get(("revit_definition", side))),
                "peak_memory_ratio": linear["peak_megabytes"] / quadratic["peak_megabytes"],
                "time_ratio": linear["seconds"] / quadratic["seconds"],
                "cpu_time_ratio": linear["cpu_seconds"] / quadratic["cpu_seconds"],
                "max_logit_difference": linear.get("difference_to_quadratic"),
            }
    return found


def _ratio(row: dict[str, Any], other: dict[str, Any] | None) -> float | None:
    return row["added_megabytes"] / other["added_megabytes"] if other else None


def panel(rows: list[dict[str, Any]], key: str, title: str, left: float) -> list[str]:
    """One log-log panel, 360 units wide."""
    points = {m: [(r["side"], r[key]) for r in rows if r["model"] == m and key in r] for m in MODELS}
    values = [value for line in points.values() for _, value in line]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    x0, x1, y0, y1 = left + 50, left + 345, 290, 40

    def at(side: float, value: float) -> tuple[float, float]:
        across = math.log(side / SIDES[0]) / math.log(SIDES[-1] / SIDES[0])
        return x0 + across * (x1 - x0), y0 + (math.log10(value) - low) / (high - low) * (y1 - y0)

    parts = [f'<text x="{x0}" y="22" class="title">{escape(title)}</text>']
    for power in range(low, high + 1):
        y = at(SIDES[0], 10.0**power)[1]
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x1}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="{x0 - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:,g}</text>')
    for side in SIDES:
        x = at(side, 10.0**low)[0]
        parts.append(f'<text x="{x:.1f}" y="{y0 + 18}" text-anchor="middle">{side}</text>')
    parts.append(f'<text x="{(x0 + x1) / 2}" y="{y0 + 36}" text-anchor="middle">side of the image (px)</text>')
    for index, line in enumerate(points.values()):
        places = [at(*point) for point in sorted(line)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" class="c{index}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="d{index}"/>' for x, y in places]
    return parts


def draw(rows: list[dict[str, Any]]) -> str:
    """Both panels and a legend as SVG."""
    colours = ("#0072b2", "#d55e00", "#e69f00", "#cc79a7", "#009e73", "#555555")
    dashes = ("none", "none", "6 3", "3 2", "2 3", "8 3 2 3")
    style = "text{font:12px sans-serif;fill:#222}.title{font-weight:bold}.grid{stroke:#ddd}"
    style += "polyline{fill:none;stroke-width:2}"
    for index, (colour, dash) in enumerate(zip(colours, dashes, strict=True)):
        style += f".c{index}{{stroke:{colour};stroke-dasharray:{dash}}}.d{index}{{fill:{colour}}}"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 730 370" role="img">',
        "<title>Time and memory of one image by its side</title>",
        f'<style>{style}</style><rect width="730" height="370" fill="#fff"/>',
        *panel(rows, "seconds", "Time (s)", 0),
        *panel(rows, "added_megabytes", "Memory that a run adds (MiB)", 365),
    ]
    for index, label in enumerate(MODELS.values()):
        x = 8 + 120 * index
        parts.append(f'<polyline points="{x},352 {x + 24},352" class="c{index}"/>')
        parts.append(f'<text x="{x + 29}" y="356">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    """Measure, merge, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--sides", nargs="+", type=int, choices=REVIT_SIDES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--redraw", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.redraw:
        options.models = []
    rows: list[dict[str, Any]] = []
    for side in options.sides or REVIT_SIDES:
        kept: dict[str, list[float]] = {}
        for model in options.models:
            if side not in SIDES and not model.startswith("revit"):
                continue
            row, logits = row_of(model, side)
            rows.append(row)
            if logits is not None:
                kept[model] = logits
            note(
                f"{model} {side} px: {row.get('seconds')} s, {row.get('added_megabytes')} MiB {row.get('skipped', '')}"
            )
            if model == "revit_quadratic" and "revit_linear" in kept and logits is not None:
                difference = max(abs(a - b) for a, b in zip(kept["revit_linear"], logits, strict=True))
                for other in rows:
                    if other["model"] == "revit_linear" and other["side"] == side:
                        other["difference_to_quadratic"] = difference
            store(options.output, rows)
    note(str(store(options.output, rows)))


def store(output: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge rows with those in `output`, write and draw all; returns the numbers of the contract."""
    everything = merged(output, rows, ("model", "side"))
    found = contract(everything)
    write_json(output, {"contract": found, "results": everything})
    output.with_suffix(".svg").write_text(draw(everything), encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
