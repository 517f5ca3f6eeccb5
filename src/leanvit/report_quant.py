"""The part of the report that looks inside a quantization: the search of bits, and what smoothing did."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanvit import _svg as svg
from leanvit._svg import Markup, fixed, significant, tag

Json = dict[str, Any]
SHOWN_NORMS = 6
PARTS = {0: "weight or second operand", 1: "activation", 2: "both"}


def inside(quantized: dict[str, Json]) -> list[Markup]:
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
