"""Section Quantization of a task's network: its metrics in float and quantized, its parts and their worst sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanvit.report import svg
from leanvit.report.run import Json, Run
from leanvit.report.svg import Markup, finite, fixed, join
from leanvit.report.task_words import meaning_of, numbers_of, points
from leanvit.report.words import megabytes, ratio

WORST_SITES = 8


def network_section(run: Run) -> Markup | None:
    """Metrics before and after, sizes, and signal to noise of the worst sites by part."""
    plans = {name: report for name, report in run.quantized.items() if "parts" in report}
    return join([_plans(plans), _bars(plans), _metrics(plans), _parts(plans), _sites(plans), _left_out(plans)])


def _main(report: Json, which: str) -> Any:
    return (report.get(which) or {}).get(report.get("metric"))


def _plans(plans: dict[str, Json]) -> Markup:
    rows = []
    for name, report in plans.items():
        before, after = _main(report, "float_metrics"), _main(report, "metrics")
        size = report.get("quantized_bytes")
        share = fixed(ratio(size, report.get("float_bytes")), 2)
        measured = [report.get("metric") or "–", fixed(before, 4), fixed(after, 4), points(before, after)]
        rows.append([name, *measured, megabytes(size), share, (report.get("config") or {}).get("smoothing", "–")])
    heads = ("Plan", "Metric", "Float", "Quantized", "Points", "Weights, MB", "of float32", "Smoothing")
    caption = (
        "The plans compared. W8A8 stands for weights and activations of 8 bits each; the metric is that of the "
        "simulated network, proposals and NMS in float."
    )
    return svg.table(caption, heads, rows, "llrrrrrl")


def _bars(plans: dict[str, Json]) -> Markup | None:
    first = next(iter(plans.values()))
    metric = str(first.get("metric"))
    values = {"float": (_main(first, "float_metrics"), first.get("float_bytes"))}
    values |= {name: (_main(report, "metrics"), report.get("quantized_bytes")) for name, report in plans.items()}
    charts, caption = [], ""
    if any(finite(value) is not None for value, _ in values.values()):
        caption = f"{metric} (longer is better; a dashed outline is simulated) and weights (shorter is better). "
        rows = [_bar(name, value, fixed(value, 4), "simulated") for name, (value, _) in values.items()]
        charts.append(svg.bar_chart("network-metric", f"{metric} of each form", rows, metric))
    sizes = {name: ratio(size, 1e6) for name, (_, size) in values.items()}
    rows = [_bar(name, size, megabytes(values[name][1], " MB"), "s1") for name, size in sizes.items()]
    charts.append(svg.bar_chart("network-size", "Weights of each form", rows, "weights (MB)"))
    return svg.figure(f"{caption or 'Weights. '}Grey is float.", svg.panels(*charts))


def _bar(name: str, value: Any, text: str, css: str) -> svg.Row:
    number = finite(value)
    return svg.Row(name, number, "not measured" if number is None else text, "s0" if name == "float" else css)


def _metrics(plans: dict[str, Json]) -> Markup | None:
    measured = {name: report for name, report in plans.items() if report.get("metrics")}
    names = dict.fromkeys(key for report in measured.values() for key in numbers_of(report["metrics"]))
    if not names:
        return None
    rows = []
    for key in names:
        row = [key, meaning_of(key)]
        for report in measured.values():
            before, after = ((report.get(which) or {}).get(key) for which in ("float_metrics", "metrics"))
            row += [fixed(before, 4), fixed(after, 4), points(before, after)]
        rows.append(row)
    heads = ["Metric", "What it is"]
    heads += [f"{name} {what}".strip() for name in measured for what in ("float", "quantized", "points")]
    caption = "Every metric in float and quantized, from 0 to 1, on the same pictures; the difference in points."
    main = next(iter(measured.values())).get("metric")
    pick = list(names).index(main) if main in names else -1
    return svg.table(caption, heads, rows, "ll" + "rrr" * len(measured), pick)


def _parts(plans: dict[str, Json]) -> Markup | None:
    rows = []
    for name, report in plans.items():
        for part, values in (report.get("part_reports") or {}).items():
            worst = _ordered(values)[:1]
            lowest = f"{fixed(worst[0][1], 1)} at {svg.short(worst[0][0], 48)}" if worst else "–"
            macs = sum(finite(site.get("macs")) or 0.0 for site in values.get("sites") or [])
            size = values.get("quantized_bytes")
            inputs = (values.get("calibration") or {}).get("images")
            share = fixed(ratio(size, values.get("float_bytes")), 2)
            facts = [fixed(len(values.get("sites") or [])), fixed(ratio(macs, 1e6), 1), megabytes(size), share]
            rows.append([f"{name}, {part}", *facts, fixed(inputs), lowest])
    if not rows:
        return None
    heads = (
        "Part", "Sites", "Multiply-adds, 10⁶", "Weights, MB", "of float32", "Calibrated on", "Lowest SQNR, dB",
    )  # fmt: skip
    caption = (
        "Parts of the network, each quantized as a graph of its own; multiply-adds of one input. The box and mask "
        "heads are calibrated on the regions that the network finds."
    )
    return svg.table(caption, heads, rows, "lrrrrrl")


def _ordered(report: Json) -> list[tuple[str, float]]:
    """Sites with their SQNR, worst first."""
    known = [(str(site["name"]), finite(site.get("sqnr_db"))) for site in report.get("sites") or []]
    return sorted(((name, level) for name, level in known if level is not None), key=lambda pair: pair[1])


def _sites(plans: dict[str, Json]) -> Markup | None:
    """Bars of the worst sites of every part, and a table of all."""
    parts = dict.fromkeys(part for report in plans.values() for part in report.get("part_reports") or {})
    levels = {part: _levels(plans, part) for part in parts}
    levels = {part: sites for part, sites in levels.items() if sites}
    if not levels:
        return None
    names = list(plans)
    shown = {
        part: sorted(sites.items(), key=lambda pair: min(v for v in pair[1] if v is not None))[:WORST_SITES]
        for part, sites in levels.items()
    }
    axis = svg.sqnr_axis(level for rows in shown.values() for _, row in rows for level in row)
    charts = []
    for part, rows in shown.items():
        title = f"Worst sites of {part}: {len(rows)} of {len(levels[part])}"
        worst = [_lowest(rows, run) for run in range(len(names))]
        chart = svg.site_bars(f"worst-{part}", title, rows, axis=axis, names=names, lowest=worst)
        charts.append(svg.tag("div", svg.tag("h4", title), chart))
    caption = (
        "Signal to quantization noise ratio (SQNR) of the worst sites of each part, against the float part; 6 dB more "
        "is half the error, below 0 dB the noise is larger than the signal."
    )
    legend = svg.legend((f"s{i % 4 + 1}", name) for i, name in enumerate(names))
    all_rows = [
        [f"{part}.{site}", *(fixed(level, 1) for level in row)] for part, sites in levels.items() for site, row in
        sites.items()
    ]  # fmt: skip
    heads = ["Site", *(f"{name} SQNR, dB" for name in names)]
    table = svg.table("Every site, in execution order of its part.", heads, all_rows, "l" + "r" * len(names))
    return join([svg.figure(caption, legend, svg.panels(*charts)), svg.details("Numbers of every site", table)])


def _levels(plans: dict[str, Json], part: str) -> dict[str, list[float | None]]:
    """SQNR of every site of a part for each plan; sites that no plan quantizes are left out."""
    by_plan = [
        {str(site["name"]): finite(site.get("sqnr_db")) for site in sites}
        for sites in (((r.get("part_reports") or {}).get(part) or {}).get("sites") or [] for r in plans.values())
    ]
    order = dict.fromkeys(site for sites in by_plan for site in sites)
    found = {site: [sites.get(site) for sites in by_plan] for site in order}
    return {site: row for site, row in found.items() if any(level is not None for level in row)}


def _lowest(rows: Sequence[tuple[str, Sequence[float | None]]], run: int) -> str:
    known = [(row[run], site) for site, row in rows if row[run] is not None]
    return min(known, default=(0.0, ""))[1]


def _left_out(plans: dict[str, Json]) -> Markup | None:
    lines = [
        f"{name}, {part}: not quantized, because no quantizer supports it: {line}"
        for name, report in plans.items()
        for part, values in (report.get("part_reports") or {}).items()
        for line in values.get("unquantized") or []
    ]
    return svg.tag("ul", *(svg.tag("li", line) for line in lines)) if lines else None
