"""Figures of quantized sites: the noise at each, as bars, and its bits, as a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.bit_plan import MANY_BLOCKS, bit_grid, split_sites
from leanvit.report.html import join
from leanvit.report.words import Json, finite, fixed

WORST_SITES = 8
"""Bars for each part of a network of several graphs: together about as many as a network of one graph has."""
ONE_COLUMN = 16
"""More sites than these are drawn in two columns."""

Levels = dict[str, list[float | None]]
"""SQNR in dB of every site for each plan; None where it was not measured."""


def lowest_site(report: Json) -> tuple[str, float] | None:
    """The site with the lowest SQNR and that level in dB, None where none was measured."""
    known = [(finite(site.get("sqnr_db")), str(site["name"])) for site in report.get("sites") or []]
    level, name = min(((level, name) for level, name in known if level is not None), default=(0.0, ""))
    return (name, level) if name else None


def _levels(reports: Sequence[Json]) -> Levels:
    by_plan = [
        {str(site["name"]): finite(site.get("sqnr_db")) for site in report.get("sites") or []} for report in reports
    ]
    order = dict.fromkeys(site for sites in by_plan for site in sites)
    return {site: [sites.get(site) for sites in by_plan] for site in order}


def _lowest(levels: Sequence[tuple[str, Sequence[float | None]]], plans: int) -> list[str]:
    """For each plan its site with the lowest level, "" where none was measured."""
    known = [[(row[plan], site) for site, row in levels if row[plan] is not None] for plan in range(plans)]
    return [min(found, default=(0.0, ""))[1] for found in known]


def _plan_legend(names: Sequence[str]) -> Markup:
    return html.legend((f"s{i % 4 + 1}", name) for i, name in enumerate(names))


def site_figure(reports: Mapping[str, Json]) -> Markup | None:
    """Bars of every site of networks of one graph, and their table."""
    names, levels = list(reports), list(_levels(list(reports.values())).items())
    if not levels:
        return None
    axis = svg.sqnr_axis(level for _, row in levels for level in row)
    lowest = _lowest(levels, len(names))
    half = math.ceil(len(levels) / 2) if len(levels) > ONE_COLUMN else len(levels)
    charts = []
    for start in range(0, len(levels), half):
        part = levels[start : start + half]
        title = f"SQNR of sites {start + 1} to {start + len(part)} of {len(levels)}"
        charts.append(svg.site_bars(f"sqnr-{start}", title, part, axis=axis, names=names, lowest=lowest))
    caption = (
        "Signal to quantization noise ratio (SQNR) of every site's output as the whole quantized network runs, against "
        "the float network; 6 dB more is half the error. Sites in execution order"
        + (f", in each group from top to bottom {', '.join(names)}." if len(names) > 1 else ".")
    )
    figure = html.figure(caption, _plan_legend(names), html.panels(*charts))
    return join([figure, html.details("Numbers of this figure", _site_table(reports, [site for site, _ in levels]))])


def _by_name(report: Json) -> dict[str, Json]:
    return {str(site["name"]): site for site in report.get("sites") or []}


def _site_table(reports: Mapping[str, Json], order: Sequence[str]) -> Markup:
    by_plan = [_by_name(report) for report in reports.values()]
    rows = []
    for site in order:
        here = [sites.get(site, {}) for sites in by_plan]
        known = next(values for values in here if values)
        row = [site, str(known.get("kind", "–")), fixed(known.get("macs"))]
        for values in here:
            row += [f"{fixed(values.get('weight_bits'))} / {fixed(values.get('activation_bits'))}"]
            row += [fixed(values.get("sqnr_db"), 1)]
        rows.append(row)
    columns = [f"{name} {what}" for name in reports for what in ("bits W / A", "SQNR, dB")]
    note = "Sites in execution order. For a product of two activations, W is the second one."
    return html.table(note, ["Site", "Kind", "Multiply-adds", *columns], rows, "llr" + "rr" * len(reports))


def bits_figure(reports: Mapping[str, Json]) -> Markup | None:
    """The bits of every site of networks of one graph."""
    order = list(dict.fromkeys(site for report in reports.values() for site in _by_name(report)))
    if not order:
        return None
    plans = {
        name: {n: (int(s["weight_bits"]), int(s["activation_bits"])) for n, s in _by_name(report).items()}
        for name, report in reports.items()
    }
    used: list[int | None] = [*sorted({bits for plan in plans.values() for pair in plan.values() for bits in pair})]
    used += [None] if any(len(plan) < len(order) for plan in plans.values()) else []
    caption = (
        "The bit plan. A column is a block of the network, a row a site inside it; the left number is the bits of the "
        "weights, the right one those of the activations. qk and av, the two products of attention, multiply two "
        "activations."
    )
    grids = [html.titled(name, bit_grid(f"Bit plan {name}", order, plan)) for name, plan in plans.items()]
    wide = len({block for block, _ in split_sites(order).values()}) > MANY_BLOCKS
    return html.figure(caption, html.bit_legend(used), join(grids) if wide else html.panels(*grids))


def part_sites(reports: Mapping[str, Json]) -> Markup | None:
    """Bars of the worst sites of every part of networks of several graphs, and a table of all."""
    names = list(reports)
    parts = dict.fromkeys(part for report in reports.values() for part in report.get("part_reports") or {})
    levels = {}
    for part in parts:
        found = _levels([(report.get("part_reports") or {}).get(part) or {} for report in reports.values()])
        levels[part] = {site: row for site, row in found.items() if any(level is not None for level in row)}
    levels = {part: sites for part, sites in levels.items() if sites}
    if not levels:
        return None
    shown = {
        part: sorted(sites.items(), key=lambda pair: min(v for v in pair[1] if v is not None))[:WORST_SITES]
        for part, sites in levels.items()
    }
    axis = svg.sqnr_axis(level for rows in shown.values() for _, row in rows for level in row)
    charts = []
    for part, rows in shown.items():
        title = f"Worst sites of {part}: {len(rows)} of {len(levels[part])}"
        lowest = _lowest(rows, len(names))
        chart = svg.site_bars(f"worst-{part}", title, rows, axis=axis, names=names, lowest=lowest)
        charts.append(html.titled(title, chart))
    caption = (
        "Signal to quantization noise ratio (SQNR) of the worst sites of each part, against the float part; 6 dB more "
        "is half the error, below 0 dB the noise is larger than the signal."
    )
    every = [
        [f"{part}.{site}", *(fixed(level, 1) for level in row)]
        for part, sites in levels.items()
        for site, row in sites.items()
    ]
    heads = ["Site", *(f"{name} SQNR, dB" for name in names)]
    table = html.table("Every site, in execution order of its part.", heads, every, "l" + "r" * len(names))
    figure = html.figure(caption, _plan_legend(names), html.panels(*charts))
    return join([figure, html.details("Numbers of every site", table)])
