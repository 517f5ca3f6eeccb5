"""Section Benchmark: latency with its spread for every batch size."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.html import join
from leanvit.report.run import Run
from leanvit.report.words import Json, finite, fixed, megabytes, significant


def benchmark_section(run: Run, part: str = "benchmark") -> Markup | None:
    """Latency with its spread for every batch size. part: which of the run's benchmarks."""
    values = run.get(part)
    results = values.get("results") or []
    if not results:
        return None
    first = str(results[0]["name"])
    return join([_figure(part, values, results, first), _table(results, first)])


def _figure(part: str, values: Json, results: Sequence[Json], first: str) -> Markup:
    charts = []
    for batch in dict.fromkeys(result.get("batch_size") for result in results):
        title = f"Latency at batch {fixed(batch)}"
        bars = [_bar(result, first) for result in results if result.get("batch_size") == batch]
        chart = svg.bar_chart(f"{part}-latency-{fixed(batch)}", title, bars, "milliseconds per batch")
        charts.append(html.titled(title, chart))
    threads = finite(values.get("threads"))
    caption = (
        "Time of one batch, shorter is better: bar to the median, whisker from the 10th to the 90th percentile; "
        f"{fixed(threads)} thread{'s' * (threads != 1)}, {fixed(values.get('rounds'))} rounds in which the targets "
        "take turns. Grey is the first target; each batch size has an axis of its own."
    )
    return html.figure(caption, html.panels(*charts))


def _bar(result: Json, first: str) -> svg.Row:
    median, low, high = (finite(result.get(key)) for key in ("median_ms", "p10_ms", "p90_ms"))
    css = "s1" if result["name"] != first else "s0"
    return svg.Row(str(result["name"]), median, significant(median, " ms"), css, low, high)


def _table(results: Sequence[Json], first: str) -> Markup:
    cells = [
        [
            r["name"], fixed(r.get("batch_size")), significant(r.get("median_ms")),
            f"{significant(r.get('p10_ms'))} to {significant(r.get('p90_ms'))}",
            significant(r.get("images_per_second")), significant(r.get("ratio"), "×"),
            megabytes(r.get("bytes")), r.get("runtime"), r.get("precision"),
        ]
        for r in results
    ]  # fmt: skip
    heads = (
        "Target",
        "Batch",
        "Median, ms",
        "p10 to p90, ms",
        "Images/s",
        "Ratio",
        "Model, MB",
        "Runtime",
        "Precision",
    )
    note = (
        f"Latency and throughput. Ratio is the median of the first target, {first}, over the target's own at the same "
        "batch size: above 1 is faster."
    )
    return html.table(note, heads, cells, "lrrrrrrll")
