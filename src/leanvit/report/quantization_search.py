"""What the search of bits tried and what smoothing did, of each plan that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.html import join
from leanvit.report.words import Json, fixed, significant

NORMS_SHOWN = 6
PARTS = {0: "weight or second operand", 1: "activation", 2: "both"}


def search_parts(number: int, name: str, report: Json) -> list[Markup]:
    """The search of bits of one plan: what was spent, the Pareto curve, and the sensitivity of every site; empty where
    no bits were searched. number: of the plan on its page."""
    search = report.get("search")
    if not search:
        return []
    steps = search.get("steps") or []
    parts = [
        html.heading(f"Search of bits, {name}"),
        html.paragraph(
            f"{fixed(search.get('evaluations'))} evaluations of the network ({fixed(search.get('from_journal'))} more "
            f"from the journal of an earlier run) for {fixed(len(steps))} steps of {fixed(search.get('candidates'))} "
            f"candidates; cost {significant(search.get('cost'))} of at most {significant(search.get('limit'))}; loss "
            f"(KL divergence) {significant(search.get('loss'))}. Measured increases were "
            f"{significant(search.get('estimate_ratio_median'))} times the predicted ones, in the median of "
            f"{fixed(search.get('measured_steps'))}. {_gap(search.get('additive') or {})}",
        ),
    ]
    points = [(float(step["cost"]), float(step["loss"])) for step in steps]
    if len(points) > 1:
        title = "Loss against cost, from the steps taken"
        said = f"From cost {points[0][0]:.4g} at loss {points[0][1]:.3g} to {points[-1][0]:.4g} at {points[-1][1]:.3g}."
        curve = svg.Line(points, "l1")
        parts.append(
            html.figure(
                "The Pareto curve: every point is a plan that the search passed through, so that another budget can be "
                "read off without a new search.",
                svg.line_chart(f"pareto-{number}", title, said, [curve], x_label="cost", y_label="KL divergence"),
            )
        )
    rows, levels = _sensitivities(search)
    if rows:
        caption = "Predicted increase of the loss where one tensor alone goes to so many bits, most sensitive first."
        heads = ["Site", "Tensor", *(f"{level} bits" for level in levels)]
        table = html.table(caption, heads, rows, "ll" + "r" * len(levels))
        parts.append(html.details("Sensitivity by site and bits", table))
    return parts


def _gap(additive: Json) -> str:
    """How far the plan is from the optimum of an integer program; empty where that was not solved."""
    if not additive or additive.get("optimum") is None:
        return ""
    over = max(0.0, additive["plan"] - additive["optimum"]) / max(additive["optimum"], 1e-12)
    taken = " The search went on from the program's plan, which had the lower loss." if additive["taken"] else ""
    return (
        f"Were the increases of single tensors to add up, no plan within the budget could add less than "
        f"{significant(additive['optimum'])} (integer program); this one is {over:.1%} above that.{taken}"
    )


def _sensitivities(search: Json) -> tuple[list[list[str]], list[str]]:
    entries = search.get("sensitivities") or []
    levels = sorted({level for entry in entries for level in entry["loss"]}, key=int, reverse=True)
    ordered = sorted(entries, key=lambda entry: -max(map(float, entry["loss"].values()), default=0.0))
    rows = [
        [entry["site"], PARTS[entry["part"]], *(significant(entry["loss"].get(level)) for level in levels)]
        for entry in ordered
    ]
    return rows, levels


def histograms(reports: Mapping[str, Json]) -> Markup | None:
    """Activations after a few norms of the first plan that has them, before and after smoothing, each over its own
    range."""
    plan, report = next(((name, report) for name, report in reports.items() if report.get("histograms")), ("", {}))
    if not report:
        return None
    exponents = report.get("smoothing_exponents") or {}
    named = list(report["histograms"].items())
    step = max(1, len(named) // NORMS_SHOWN)
    charts = []
    for name, pair in named[::step][:NORMS_SHOWN]:
        lines = [svg.Line(_outline(pair[which]["counts"]), css) for which, css in (("before", "l1"), ("after", "l2"))]
        reach = {w: f"{pair[w]['range'][0]:.3g} to {pair[w]['range'][1]:.3g}" for w in ("before", "after")}
        exponent = exponents.get(name)
        title = f"{name}, exponent {'none' if exponent is None else exponent}"
        said = f"Before from {reach['before']}, after from {reach['after']}."
        chart = svg.line_chart(
            f"histogram-{name}", title, said, lines, x_label="share of the range, %", y_label="share of values, %"
        )
        charts.append(html.titled(title, chart, html.paragraph(said)))
    caption = (
        "Values after a LayerNorm before and after smoothing, each over its own range: a peak in a wide range is what "
        "a uniform quantizer can't resolve."
    )
    figure = html.figure(caption, html.legend([("l1", "before"), ("l2", "after")]), html.panels(*charts))
    return join([html.heading(f"What smoothing did, {plan}"), figure])


def _outline(counts: Sequence[int]) -> list[tuple[float, float]]:
    total = sum(counts) or 1
    return [(100.0 * (i + 0.5) / len(counts), 100.0 * count / total) for i, count in enumerate(counts)]
