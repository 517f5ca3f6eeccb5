"""Section Result: accuracy, size and speed of every form of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.headline import pick
from leanvit.report.html import join
from leanvit.report.run import Run
from leanvit.report.words import Json, finite, fixed, interval, megabytes, ratio, significant


def result_section(run: Run) -> Markup | None:
    """Accuracy, size and speed of every form of the model."""
    rows = run.get("demo").get("table") or []
    if not rows:
        return None
    batch = f" at batch {fixed(_batch_of(run, rows[0].get('throughput')))}".removesuffix(" at batch –")
    return join([_table(rows, batch), _charts(rows, batch)])


def _table(rows: Sequence[Json], batch: str) -> Markup:
    first = rows[0]
    note = f"Accuracy, size and speed. Ratios and speed-ups refer to the first row, {first['name']}."
    if any(row.get("simulated") for row in rows):
        note += " Simulated: values are rounded as in the integers they stand for but computed in float, so that"
        note += " accuracy is real, size is that of the packed weights, and there is no speed to measure."
    heads = (
        "Model", "Accuracy, %", "Correct", "95% interval, %", "Size, MB", "Size ratio", "Latency at batch 1, ms",
        f"Throughput{batch}, images/s", "Speed-up",
    )  # fmt: skip
    return html.table(note, heads, [_cells(row, first) for row in rows], "lrrrrrrrr", pick(rows))


def _cells(row: Json, first: Json) -> list[object]:
    told = not row.get("simulated") or "simulated" in str(row["name"])
    bounds = interval(row.get("correct"), row.get("images"))
    return [
        row["name"] if told else join([row["name"], " ", html.mark("simulated", "badge")]),
        fixed(row.get("accuracy"), 2),
        f"{fixed(row.get('correct'))} / {fixed(row.get('images'))}",
        "–" if bounds is None else f"{bounds[0]:.1f} to {bounds[1]:.1f}",
        megabytes(row.get("bytes")),
        fixed(ratio(row.get("bytes"), first.get("bytes")), 2),
        significant(row.get("latency_ms")),
        significant(row.get("throughput")),
        significant(row.get("speedup"), "×"),
    ]


def _charts(rows: Sequence[Json], batch: str) -> Markup:
    speed = [_bar(row, i, row.get("throughput"), significant(row.get("throughput"))) for i, row in enumerate(rows)]
    size = [
        _bar(row, i, ratio(row.get("bytes"), 1e6), megabytes(row.get("bytes"), " MB")) for i, row in enumerate(rows)
    ]
    caption = (
        f"Throughput{batch} (longer is better) and size (shorter is better). Grey is the reference; a dashed outline "
        "marks what is only simulated."
    )
    charts = (
        svg.bar_chart(
            "throughput", "Throughput of each form of the model", speed, f"throughput{batch} (images per second)"
        ),
        svg.bar_chart("size", "Size of each form of the model", size, "size (MB)"),
    )
    return html.figure(caption, html.panels(*charts))


def _batch_of(run: Run, throughput: Any) -> Any:
    """Batch size of the benchmark's result that the table quotes, None where there is none."""
    results = run.get("benchmark").get("results") or []
    return next((r.get("batch_size") for r in results if throughput and r.get("images_per_second") == throughput), None)


def _bar(row: Json, index: int, value: Any, text: str) -> svg.Row:
    number = finite(value)
    css = "simulated" if row.get("simulated") else "s1" if index else "s0"
    return svg.Row(str(row["name"]), number, "not measured" if number is None else text, css)
