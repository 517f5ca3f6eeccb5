"""Parts that the pages about labelled images and about annotated pictures share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from leanvit.report import html
from leanvit.report.html import join
from leanvit.report.metrics import BARS_SHOWN, both_ends
from leanvit.report.svg import Row, bar_chart
from leanvit.report.words import fixed, short

LISTED = 100
"""Rows of a list on a page; inspect.json holds all."""
NAMED = 6
"""Copies of one image that are named."""


def total(result: dict[str, Any], key: str) -> tuple[str, str, str]:
    """Value, unit and explanation of a card: a count over all parts, and that of each."""
    sizes = {s: p[key] if isinstance(p[key], int) else len(p[key]) for s, p in result["parts"].items()}
    return fixed(sum(sizes.values())), "", ", ".join(f"{fixed(size)} {split}" for split, size in sizes.items())


def class_bars(
    classes: Sequence[str],
    parts: Mapping[str, Mapping[str, float]],
    charts: Mapping[str, tuple[str, str, str]],
    caption: str,
    digits: int = 0,
) -> Markup:
    """Bars of each class for every part side by side, largest class of the first part first.

    parts: {part: {class: value}}. charts: {part: (key, title, name of the axis)}. Where there are many classes, those
    at both ends are drawn.
    """
    first = next(iter(parts.values()))
    names = sorted(classes, key=lambda name: -first.get(name, 0.0))
    shown = both_ends(names)
    drawn = []
    for part, values in parts.items():
        bars = [Row(name, float(values.get(name, 0)), fixed(values.get(name, 0), digits)) for name in shown]
        key, title, label = charts[part]
        drawn.append(titled_bars(key, title, bars, label))
    half = BARS_SHOWN // 2
    ends = "" if shown == names else f"; the {half} largest and {half} smallest of {len(names)}"
    return html.figure(f"{caption}{ends}.", html.panels(*drawn))


def titled_bars(key: str, title: str, bars: Sequence[Row], label: str) -> Markup:
    """Bars below their title."""
    return html.titled(title, bar_chart(key, title, bars, label))


def kinds_table(result: dict[str, Any]) -> Markup:
    """Sizes, formats, modes and conversions of each part."""

    def counted(values: dict[str, int]) -> str:
        return ", ".join(f"{name} {fixed(number)}" for name, number in values.items())

    def spread(values: dict[str, float] | None) -> str:
        return "–" if values is None else " / ".join(fixed(values[key]) for key in ("min", "median", "max"))

    rows = [
        [split, spread(part["width"]), spread(part["height"]), counted(part["formats"]), counted(part["modes"])]
        for split, part in result["parts"].items()
    ]
    heads = ["Part", "Width", "Height", "Formats", "Modes"]
    caption = "Sizes in pixels (smallest / median / largest), file formats, and modes as Pillow calls them."
    notes = {
        f"{sentence} ({split})": fixed(number)
        for split, part in result["parts"].items()
        for sentence, number in part["converted"].items()
    }
    return join([html.table(caption, heads, rows, "lrrll"), html.facts(notes.items()) if notes else None])


def corrupt_table(result: dict[str, Any]) -> Markup:
    """The images that can't be read, and why."""
    rows = [(split, one["image"], one["problem"]) for split, part in result["parts"].items() for one in part["corrupt"]]
    if not rows:
        return html.paragraph("None: every image was decoded.")
    shown = [(short(image, 90), split, problem.removeprefix(f"{image}: ")) for split, image, problem in rows[:LISTED]]
    return html.table(f"{_first(len(rows))}What stopped the decoder.", ["Image", "Part", "Problem"], shown, "lll")


def _first(count: int) -> str:
    return f"The first {LISTED} of {fixed(count)}; all are in inspect.json. " if count > LISTED else ""


def copies_table(
    groups: Sequence[dict[str, Any]],
    noun: str,
    kind: Callable[[dict[str, Any]], str],
    name: Callable[[dict[str, Any]], str],
) -> Markup:
    """Groups of images with the same pixels. noun: what an image is called. kind: of a group. name: what stands in
    brackets at an image."""
    if not groups:
        return html.paragraph(f"None: no two {noun} have the same pixels.")
    rows = []
    for group in groups[:LISTED]:
        images = group["images"]
        names = [f"{short(one['image'], 60)} ({name(one)})" for one in images[:NAMED]]
        names += [f"and {len(images) - NAMED} more"] if len(images) > NAMED else []
        rows.append([kind(group), fixed(len(images)), html.bullets(names)])
    caption = f"{_first(len(groups))}{noun.capitalize()} with the very same pixels; leaks first."
    return html.table(caption, ["Kind", noun.capitalize(), "Which"], rows, "lrl")
