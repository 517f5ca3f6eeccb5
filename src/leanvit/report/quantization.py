"""Section Quantization: plans compared, every site, the search of bits, smoothing, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from leanvit.report import svg
from leanvit.report.run import Json, Run
from leanvit.report.svg import Markup, finite, fixed, join, significant, tag
from leanvit.report.words import megabytes, ratio

SHOWN_NORMS = 6
PARTS = {0: "weight or second operand", 1: "activation", 2: "both"}


def quantization_section(run: Run) -> Markup | None:
    """What quantization costs at every site, the bits it was given, and what was left in float."""
    if not run.quantized:
        return None
    names = list(run.quantized)
    by_run = [{str(site["name"]): site for site in report.get("sites") or []} for report in run.quantized.values()]
    order = list(dict.fromkeys(site for sites in by_run for site in sites))
    levels = [[(finite(s.get("sqnr_db")), name) for name, s in sites.items()] for sites in by_run]
    lowest = [min(((db, name) for db, name in known if db is not None), default=(0.0, "")) for known in levels]
    parts = [_plans_table(run.quantized, lowest)]
    if order:
        parts += [_sqnr_figure(names, order, by_run, [name for _, name in lowest]), _plan_figure(names, order, by_run)]
    parts += _inside(run.quantized)
    parts.append(tag("h3", "What was left out, and why"))
    for lines, who in _shared(run.quantized, _left_out):
        parts.append(tag("p", ", ".join(who), ":"))
        parts.append(tag("ul", *(tag("li", line) for line in lines)))
    parts.append(tag("h3", "Calibration"))
    parts += [tag("p", f"{', '.join(who)}: {text}") for text, who in _shared(run.quantized, _calibration)]
    return join(parts)


def _plans_table(quantized: dict[str, Json], lowest: Sequence[tuple[float, str]]) -> Markup:
    rows = []
    for (name, report), (level, site) in zip(quantized.items(), lowest, strict=True):
        size = report.get("quantized_bytes")
        rows.append(
            [
                name,
                fixed((report.get("accuracy") or {}).get("top1"), 2),
                fixed(report.get("average_weight_bits"), 2),
                megabytes(size),
                fixed(ratio(size, report.get("float_bytes")), 2),
                significant(ratio(report.get("bitops"), 1e9)),
                fixed(len(report.get("sites") or [])),
                f"{fixed(level, 1)} at {site}" if site else "–",
                (report.get("config") or {}).get("smoothing", "–"),
            ]
        )
    heads = (
        "Plan", "Accuracy, %", "Weight bits, mean", "Weights, MB", "of float32", "BitOps, 10⁹", "Sites",
        "Lowest SQNR, dB", "Smoothing",
    )  # fmt: skip
    caption = (
        "The plans compared. W8A8 stands for weights and activations of 8 bits each; a site is one product that is "
        "quantized; BitOps are its multiply-adds times the bits of both sides."
    )
    return svg.table(caption, heads, rows, "lrrrrrrrl")


def _sqnr_figure(
    names: Sequence[str], order: Sequence[str], by_run: Sequence[dict[str, Json]], lowest: Sequence[str]
) -> Markup:
    levels = [(site, [finite(sites.get(site, {}).get("sqnr_db")) for sites in by_run]) for site in order]
    axis = svg.sqnr_axis(level for _, row in levels for level in row)
    half = math.ceil(len(order) / 2) if len(order) > 16 else len(order)
    charts = []
    for start in range(0, len(order), half):
        part = levels[start : start + half]
        title = f"SQNR of sites {start + 1} to {start + len(part)} of {len(order)}"
        charts.append(svg.site_bars(f"sqnr-{start}", title, part, axis=axis, names=names, lowest=lowest))
    rows = []
    for site in order:
        here = [sites.get(site, {}) for sites in by_run]
        known = next(values for values in here if values)
        row = [site, str(known.get("kind", "–")), fixed(known.get("macs"))]
        for values in here:
            row += [f"{fixed(values.get('weight_bits'))} / {fixed(values.get('activation_bits'))}"]
            row += [fixed(values.get("sqnr_db"), 1)]
        rows.append(row)
    heads = [
        "Site",
        "Kind",
        "Multiply-adds",
        *(f"{name} {what}" for name in names for what in ("bits W / A", "SQNR, dB")),
    ]
    caption = (
        "Signal to quantization noise ratio (SQNR) of every site's output as the whole quantized network runs, against "
        "the float network; 6 dB more is half the error. Sites in execution order"
        + (f", in each group from top to bottom {', '.join(names)}." if len(names) > 1 else ".")
    )
    note = "Sites in execution order. For a product of two activations, W is the second one."
    return join(
        [
            svg.figure(
                caption, svg.legend((f"s{i % 4 + 1}", name) for i, name in enumerate(names)), svg.panels(*charts)
            ),
            svg.details("Numbers of this figure", svg.table(note, heads, rows, "llr" + "rr" * len(names))),
        ]
    )


def _plan_figure(names: Sequence[str], order: Sequence[str], by_run: Sequence[dict[str, Json]]) -> Markup:
    plans = [{n: (int(s["weight_bits"]), int(s["activation_bits"])) for n, s in sites.items()} for sites in by_run]
    used = sorted({bits for plan in plans for pair in plan.values() for bits in pair})
    legend = [tag("li", svg.bit(bits), f"{bits} bits") for bits in used]
    legend += [tag("li", svg.bit(None), "float")] if any(len(plan) < len(order) for plan in plans) else []
    caption = (
        "The bit plan. A column is a block of the network, a row a site inside it; the left number is the bits of the "
        "weights, the right one those of the activations. qk and av, the two products of attention, multiply two "
        "activations."
    )
    grids = [
        tag("div", tag("h4", n), svg.bit_grid(f"Bit plan {n}", order, p)) for n, p in zip(names, plans, strict=True)
    ]
    wide = len({block for block, _ in svg.split_sites(order).values()}) > svg.MANY_BLOCKS
    return svg.figure(caption, tag("ul", *legend, class_="legend"), join(grids) if wide else svg.panels(*grids))


def _shared(quantized: dict[str, Json], describe: Any) -> Iterable[tuple[Any, list[str]]]:
    """Descriptions with the names of the plans that share them, so that what holds for all is said once."""
    groups: dict[Any, list[str]] = {}
    for name, report in quantized.items():
        groups.setdefault(describe(report), []).append(name)
    return groups.items()


def _left_out(report: Json) -> tuple[str, ...]:
    products, norms = report.get("unquantized") or (), report.get("smoothing_left_out") or ()
    smoothing = (report.get("config") or {}).get("smoothing", "none")
    lines = [f"not quantized, because no quantizer supports it: {line}" for line in products]
    lines = lines or ["no product was left out for want of a quantizer"]
    if smoothing == "none":
        return (*lines, "smoothing was off")
    norms = [f"not smoothed with {smoothing}: {line}" for line in norms]
    return (*lines, *(norms or [f"every LayerNorm was smoothed with {smoothing}"]))


def _calibration(report: Json) -> str:
    facts = report.get("calibration") or {}
    return (
        f"{fixed(facts.get('images'))} images, after normalisation mean {fixed(facts.get('mean'), 2)} and standard "
        f"deviation {fixed(facts.get('std'), 2)}. Neighbouring pixels correlate with "
        f"{fixed(facts.get('neighbour_correlation'), 2)}: photographs and scans are near 1, noise is near 0."
    )


def _inside(quantized: dict[str, Json]) -> list[Markup]:
    """Searches and smoothing of every plan that has them."""
    parts: list[Markup] = []
    for index, (name, report) in enumerate(quantized.items()):
        if report.get("search"):
            parts += [tag("h3", f"Search of bits, {name}"), *_search(f"{index}", report["search"])]
    shown = next(((n, r) for n, r in quantized.items() if r.get("histograms")), None)
    if shown:
        parts += [tag("h3", f"What smoothing did, {shown[0]}"), _histograms(shown[1])]
    return parts


def _search(key: str, search: Json) -> list[Markup]:
    """The Pareto curve, what was spent, and the sensitivity of every site."""
    steps = search.get("steps") or []
    parts = [
        tag(
            "p",
            f"{fixed(search.get('evaluations'))} evaluations of the network ({fixed(search.get('from_journal'))} more "
            f"from the journal of an earlier run) for {fixed(len(steps))} steps of {fixed(search.get('candidates'))} "
            f"candidates; cost {significant(search.get('cost'))} of at most {significant(search.get('limit'))}; loss "
            f"(KL divergence) {significant(search.get('loss'))}. Measured increases were "
            f"{significant(search.get('estimate_ratio_median'))} times the predicted ones, in the median of "
            f"{fixed(search.get('measured_steps'))}.",
        )
    ]
    points = [(float(step["cost"]), float(step["loss"])) for step in steps]
    if len(points) > 1:
        title = "Loss against cost, from the steps taken"
        said = f"From cost {points[0][0]:.4g} at loss {points[0][1]:.3g} to {points[-1][0]:.4g} at {points[-1][1]:.3g}."
        curve = svg.Line(points, "l1")
        parts.append(
            svg.figure(
                "The Pareto curve: every point is a plan that the search passed through, so that another budget can be "
                "read off without a new search.",
                svg.line_chart(f"pareto-{key}", title, said, [curve], x_label="cost", y_label="KL divergence"),
            )
        )
    rows, levels = _sensitivities(search)
    if rows:
        caption = "Predicted increase of the loss where one tensor alone goes to so many bits, most sensitive first."
        heads = ["Site", "Tensor", *(f"{level} bits" for level in levels)]
        table = svg.table(caption, heads, rows, "ll" + "r" * len(levels))
        parts.append(svg.details("Sensitivity by site and bits", table))
    return parts


def _sensitivities(search: Json) -> tuple[list[list[str]], list[str]]:
    entries = search.get("sensitivities") or []
    levels = sorted({level for entry in entries for level in entry["loss"]}, key=int, reverse=True)
    ordered = sorted(entries, key=lambda entry: -max(map(float, entry["loss"].values()), default=0.0))
    rows = [
        [entry["site"], PARTS[entry["part"]], *(significant(entry["loss"].get(level)) for level in levels)]
        for entry in ordered
    ]
    return rows, levels


def _histograms(report: Json) -> Markup:
    """Activations after a few norms, before and after smoothing, each over its own range."""
    exponents = report.get("smoothing_exponents") or {}
    named = list(report["histograms"].items())
    step = max(1, len(named) // SHOWN_NORMS)
    charts = []
    for name, pair in named[::step][:SHOWN_NORMS]:
        lines = [svg.Line(_outline(pair[which]["counts"]), css) for which, css in (("before", "l1"), ("after", "l2"))]
        reach = {w: f"{pair[w]['range'][0]:.3g} to {pair[w]['range'][1]:.3g}" for w in ("before", "after")}
        exponent = exponents.get(name)
        title = f"{name}, exponent {'none' if exponent is None else exponent}"
        said = f"Before from {reach['before']}, after from {reach['after']}."
        chart = svg.line_chart(
            f"histogram-{name}", title, said, lines, x_label="share of the range, %", y_label="share of values, %"
        )
        charts.append(tag("div", tag("h4", title), chart, tag("p", said)))
    caption = (
        "Values after a LayerNorm before and after smoothing, each over its own range: a peak in a wide range is what "
        "a uniform quantizer can't resolve."
    )
    return svg.figure(caption, svg.legend([("l1", "before"), ("l2", "after")]), svg.panels(*charts))


def _outline(counts: Sequence[int]) -> list[tuple[float, float]]:
    total = sum(counts) or 1
    return [(100.0 * (i + 0.5) / len(counts), 100.0 * count / total) for i, count in enumerate(counts)]
