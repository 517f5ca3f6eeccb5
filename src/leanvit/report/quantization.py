"""Section Quantization: plans compared, noise at every site, bits, searches and smoothing; for every task.

A network that is quantized as one graph has its sites in its own report; one of several parts, each a graph of its
own, has a report for each part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.html import join
from leanvit.report.metrics import change_in_points, meaning_of, numbers_of
from leanvit.report.quantization_search import histograms, search_parts
from leanvit.report.quantization_sites import bits_figure, lowest_site, part_sites, site_figure
from leanvit.report.run import Run
from leanvit.report.why import why_part
from leanvit.report.words import Json, finite, fixed, megabytes, ratio, short, significant

Reports = Mapping[str, Json]
"""quantize.json of each plan, by the name of the plan."""


def quantization_section(run: Run) -> Markup | None:
    """What quantization costs at every site, the bits it was given, and what was left in float."""
    if not run.quantized:
        return None
    whole = {name: report for name, report in run.quantized.items() if "parts" not in report}
    networks = {name: report for name, report in run.quantized.items() if "parts" in report}
    return join([*(_of_graphs(whole) if whole else ()), *(_of_networks(networks) if networks else ())])


def _of_graphs(reports: Reports) -> list[Markup | None]:
    """Networks of one graph."""
    return [
        _accuracy_table(reports),
        site_figure(reports),
        bits_figure(reports),
        *(part for number, (name, report) in enumerate(reports.items()) for part in search_parts(number, name, report)),
        histograms(reports),
        *_why(reports),
        *_left_out(reports),
        *_calibration(reports),
    ]


def _of_networks(reports: Reports) -> list[Markup | None]:
    """Networks of several graphs."""
    return [
        _metric_table(reports),
        _metric_bars(reports),
        _all_metrics(reports),
        _parts_table(reports),
        part_sites(reports),
        *_why(reports),
        _left_out_of_parts(reports),
    ]


def _why(reports: Reports) -> list[Markup | None]:
    """What runs on integers and what costs the accuracy, of each plan that says it."""
    return [why_part(report["explain"], name) for name, report in reports.items() if report.get("explain")]


def _size(report: Json) -> list[str]:
    """Megabytes of the weights, and their share of float32."""
    size = report.get("quantized_bytes")
    return [megabytes(size), fixed(ratio(size, report.get("float_bytes")), 2)]


def _smoothing(report: Json) -> str:
    return str((report.get("config") or {}).get("smoothing", "–"))


def _lowest(report: Json) -> str:
    """'12.5 at blocks.0.attn.qk'."""
    found = lowest_site(report)
    return "–" if found is None else f"{fixed(found[1], 1)} at {short(found[0], 48)}"


def _accuracy_table(reports: Reports) -> Markup:
    rows = [
        [
            name,
            fixed((report.get("accuracy") or {}).get("top1"), 2),
            fixed(report.get("average_weight_bits"), 2),
            *_size(report),
            significant(ratio(report.get("bitops"), 1e9)),
            fixed(len(report.get("sites") or [])),
            _lowest(report),
            _smoothing(report),
        ]
        for name, report in reports.items()
    ]
    heads = (
        "Plan", "Accuracy, %", "Weight bits, mean", "Weights, MB", "of float32", "BitOps, 10⁹", "Sites",
        "Lowest SQNR, dB", "Smoothing",
    )  # fmt: skip
    caption = (
        "The plans compared. W8A8 stands for weights and activations of 8 bits each; a site is one product that is "
        "quantized; BitOps are its multiply-adds times the bits of both sides."
    )
    return html.table(caption, heads, rows, "lrrrrrrrl")


def _main(report: Json, which: str) -> Any:
    return (report.get(which) or {}).get(report.get("metric"))


def _metric_table(reports: Reports) -> Markup:
    rows = []
    for name, report in reports.items():
        before, after = _main(report, "float_metrics"), _main(report, "metrics")
        measured = [report.get("metric") or "–", fixed(before, 4), fixed(after, 4), change_in_points(before, after)]
        rows.append([name, *measured, *_size(report), _smoothing(report)])
    heads = ("Plan", "Metric", "Float", "Quantized", "Points", "Weights, MB", "of float32", "Smoothing")
    caption = (
        "The plans compared. W8A8 stands for weights and activations of 8 bits each; the metric is that of the "
        "simulated network, proposals and NMS in float."
    )
    return html.table(caption, heads, rows, "llrrrrrl")


def _metric_bars(reports: Reports) -> Markup | None:
    first = next(iter(reports.values()))
    metric = str(first.get("metric"))
    values = {"float": (_main(first, "float_metrics"), first.get("float_bytes"))}
    values |= {name: (_main(report, "metrics"), report.get("quantized_bytes")) for name, report in reports.items()}
    charts, caption = [], ""
    if any(finite(value) is not None for value, _ in values.values()):
        caption = f"{metric} (longer is better; a dashed outline is simulated) and weights (shorter is better). "
        rows = [_bar(name, value, fixed(value, 4), "simulated") for name, (value, _) in values.items()]
        charts.append(svg.bar_chart("network-metric", f"{metric} of each form", rows, metric))
    sizes = {name: ratio(size, 1e6) for name, (_, size) in values.items()}
    rows = [_bar(name, size, megabytes(values[name][1], " MB"), "s1") for name, size in sizes.items()]
    charts.append(svg.bar_chart("network-size", "Weights of each form", rows, "weights (MB)"))
    return html.figure(f"{caption or 'Weights. '}Grey is float.", html.panels(*charts))


def _bar(name: str, value: Any, text: str, css: str) -> svg.Row:
    number = finite(value)
    return svg.Row(name, number, "not measured" if number is None else text, "s0" if name == "float" else css)


def _all_metrics(reports: Reports) -> Markup | None:
    measured = {name: report for name, report in reports.items() if report.get("metrics")}
    names = dict.fromkeys(key for report in measured.values() for key in numbers_of(report["metrics"]))
    if not names:
        return None
    rows = []
    for key in names:
        row = [key, meaning_of(key)]
        for report in measured.values():
            before, after = ((report.get(which) or {}).get(key) for which in ("float_metrics", "metrics"))
            row += [fixed(before, 4), fixed(after, 4), change_in_points(before, after)]
        rows.append(row)
    heads = ["Metric", "What it is"]
    heads += [f"{name} {what}".strip() for name in measured for what in ("float", "quantized", "points")]
    caption = "Every metric in float and quantized, from 0 to 1, on the same pictures; the difference in points."
    main = next(iter(measured.values())).get("metric")
    pick = list(names).index(main) if main in names else -1
    return html.table(caption, heads, rows, "ll" + "rrr" * len(measured), pick)


def _parts_table(reports: Reports) -> Markup | None:
    rows = [
        [
            f"{name}, {part}",
            fixed(len(values.get("sites") or [])),
            fixed(ratio(sum(finite(site.get("macs")) or 0.0 for site in values.get("sites") or []), 1e6), 1),
            *_size(values),
            fixed((values.get("calibration") or {}).get("images")),
            _lowest(values),
        ]
        for name, part, values in parts_of(reports)
    ]
    if not rows:
        return None
    heads = (
        "Part", "Sites", "Multiply-adds, 10⁶", "Weights, MB", "of float32", "Calibrated on", "Lowest SQNR, dB",
    )  # fmt: skip
    caption = (
        "Parts of the network, each quantized as a graph of its own; multiply-adds of one input. The box and mask "
        "heads are calibrated on the regions that the network finds."
    )
    return html.table(caption, heads, rows, "lrrrrrl")


def parts_of(reports: Reports) -> Iterable[tuple[str, str, Json]]:
    """Name of the plan, name of the part and report of every part."""
    return (
        (name, part, values)
        for name, report in reports.items()
        for part, values in (report.get("part_reports") or {}).items()
    )


def _shared(reports: Reports, describe: Any) -> Iterable[tuple[Any, list[str]]]:
    """Descriptions with the names of the plans that share them, so that what holds for all is said once."""
    groups: dict[Any, list[str]] = {}
    for name, report in reports.items():
        groups.setdefault(describe(report), []).append(name)
    return groups.items()


def _unquantized(report: Json) -> list[str]:
    return [f"not quantized, because no quantizer supports it: {line}" for line in report.get("unquantized") or ()]


def _left_out(reports: Reports) -> list[Markup]:
    parts = [html.heading("What was left out, and why")]
    for lines, who in _shared(reports, _reasons):
        parts += [html.paragraph(", ".join(who), ":"), html.bullets(lines)]
    return parts


def _reasons(report: Json) -> tuple[str, ...]:
    smoothing = (report.get("config") or {}).get("smoothing", "none")
    lines = _unquantized(report) or ["no product was left out for want of a quantizer"]
    lines += _not_rotated(report.get("rotation") or {})
    lines += [line] if (line := (report.get("sinks") or {}).get("summary")) else []
    if smoothing == "none":
        return (*lines, "smoothing was off")
    norms = [f"not smoothed with {smoothing}: {line}" for line in report.get("smoothing_left_out") or ()]
    return (*lines, *(norms or [f"every LayerNorm was smoothed with {smoothing}"]))


def _not_rotated(rotation: Json) -> list[str]:
    """What of the residual streams was not turned, and why; nothing where it was not asked for."""
    lines = [f"residual stream not rotated: {line}" for line in rotation.get("left_out") or ()]
    noise = rotation.get("noise_db") or {}
    if noise and not rotation.get("taken"):
        rotated, kept = (fixed(noise.get(way), 2, " dB") for way in ("rotated", "as it is"))
        lines.append(f"residual stream not rotated: noise behind norms {rotated}, {kept} as it is")
    return lines


def _left_out_of_parts(reports: Reports) -> Markup | None:
    lines = [f"{name}, {part}: {line}" for name, part, values in parts_of(reports) for line in _unquantized(values)]
    return html.bullets(lines) if lines else None


def _calibration(reports: Reports) -> Sequence[Markup]:
    told = [html.paragraph(f"{', '.join(who)}: {text}") for text, who in _shared(reports, _calibrated_on)]
    return [html.heading("Calibration"), *told]


def _calibrated_on(report: Json) -> str:
    facts = report.get("calibration") or {}
    unlike = ", ".join(f"{name} by {fixed(far, 1)}" for name, far in (report.get("unlike_validation") or {}).items())
    differs = f" They differ in kind from the validation images, in standard deviations: {unlike}." if unlike else ""
    return (
        f"{fixed(facts.get('images'))} images, after normalisation mean {fixed(facts.get('mean'), 2)} and standard "
        f"deviation {fixed(facts.get('std'), 2)}. Neighbouring pixels correlate with "
        f"{fixed(facts.get('neighbour_correlation'), 2)}: photographs and scans are near 1, noise is near 0.{differs}"
    )
