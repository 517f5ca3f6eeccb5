"""Why a file is as fast and as exact as it is: what runs on integer kernels, and which sites cost the accuracy."""

from __future__ import annotations

from markupsafe import Markup

from leanvit.export.explained import integer_lines
from leanvit.report import html
from leanvit.report.html import join
from leanvit.report.words import Json, fixed

SHOWN = 12


def why_part(explanation: Json, name: str = "") -> Markup | None:
    """Sentences and a table of what `leanvit.export.explain` found. name: of the file, where there are several."""
    told = integer_lines(explanation)
    costs = explanation.get("costs") or []
    if not told and not costs:
        return None
    head = f"{name}: " if name else ""
    title = html.heading(f"{head}what runs on integers, and what costs accuracy")
    return join([title, html.bullets(told), _costs_table(costs) if costs else None])


def _costs_table(costs: list[Json]) -> Markup:
    rows = [
        [
            entry["site"],
            fixed(100 * entry["share"], 1),
            fixed(100 * entry["macs"], 1),
            "–" if entry.get("lifting_ms") is None else f"{entry['lifting_ms']:+.3f}".replace("-", "−"),
        ]
        for entry in costs[:SHOWN]
    ]
    heads = ("Site", "Share of the error, %", "Multiply-adds, %", "In float, ms an image")
    note = (
        "The sites that cost most: each runs in float in turn on a few calibration images, all else as it is, and the "
        "share is how much nearer the outputs come to the float network's. Errors meet on "
        "their way, so that shares need not add up to 100; below zero, a site's error makes up for others."
    )
    return html.table(note, heads, rows, "lrrr")
