"""Charts as inline SVG: axes, curves, bars, each with a name and a description for those who can't see it.

They are 440 units wide with 11-unit text, so that two stand side by side on a desk and one fills a phone without its
text becoming too small to read. Nothing here knows a file of a run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from leanvit.report.html import join
from leanvit.report.words import fixed, short, significant

WIDTH = 440
EXACT_DB = 120.0
"""Levels above are rounding of float32, not of a quantizer: the site is called exact."""


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element of a drawing; children and attributes that are no Markup are escaped.

    Trailing underscores of attributes fall off, inner ones become hyphens; None omits an attribute or a child.
    """
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{text}>{join(children)}</{name}>")


def _number(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """At most `count` (3 or more) round numbers, rising, the first not above `low`, the last not below `high`."""
    largest = max(abs(low), abs(high))
    if high - low < 1e-6 * max(1e-3, largest):
        pad = 0.1 * largest if largest > 1e-6 else 1.0
        low, high = low - pad, high + pad
    exponent = math.floor(math.log10((high - low) / count))
    while True:
        for factor in (1, 2, 5):
            first = math.floor(low / (factor * 10.0**exponent) + 1e-9)
            first -= _multiple(first, factor, exponent) > low
            last = math.ceil(high / (factor * 10.0**exponent) - 1e-9)
            last += _multiple(last, factor, exponent) < high
            if last - first < count:
                return [_multiple(i, factor, exponent) for i in range(first, last + 1)]
        exponent += 1


def _multiple(index: int, factor: int, exponent: int) -> float:
    # Dividing by a whole power of ten is rounded correctly; multiplying by 0.1 is not.
    return index * factor / 10**-exponent if exponent < 0 else float(index * factor * 10**exponent)


def tick_texts(values: Sequence[float]) -> list[str]:
    """Labels of ticks, all with the decimals that their distance needs."""
    digits = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [fixed(value, digits) for value in values]


@dataclass(frozen=True)
class Scale:
    """A linear axis: the value `low` lies at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Position of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def drawing(key: str, title: str, description: str, height: float, children: Iterable[object]) -> Markup:
    """An SVG image of the chart width with a name and a description for those who can't see it."""
    return element(
        "svg",
        element("title", title, id=f"{key}-title"),
        element("desc", description, id=f"{key}-desc"),
        *children,
        viewBox=f"0 0 {WIDTH} {_number(float(height))}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def line_at(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    """A straight line. css: class of its colour and width."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css)


def text_at(x: float, y: float, text: object, css: str | None = None, anchor: str | None = None) -> Markup:
    """One line of text, its baseline at y. anchor: which end of it stands at x."""
    return element("text", text, x=x, y=y, class_=css, text_anchor=anchor)


def _vertical_grid(scale: Scale, values: Sequence[float], top: float, bottom: float) -> list[Markup]:
    """Grid lines with their labels below."""
    parts = []
    for value, label in zip(values, tick_texts(values), strict=True):
        parts.append(line_at(scale(value), top, scale(value), bottom, "axis" if value == 0 else "grid"))
        parts.append(text_at(scale(value), bottom + 14, label, "tick", "middle"))
    return parts


@dataclass(frozen=True)
class Line:
    """One curve: (x, y) points, all finite. css: class of its colour and dashes."""

    points: list[tuple[float, float]]
    css: str


def line_chart(
    key: str, title: str, description: str, lines: Sequence[Line], *, x_label: str, y_label: str,
    mark: tuple[float, float, str] | None = None, hints: Sequence[tuple[float, str]] = (),
) -> Markup:  # fmt: skip
    """Curves over one x axis. mark: (x, y, text) of a point to point out. hints: text shown over an x."""
    height, left, right, top, bottom = 256, 44, WIDTH - 12, 30, 214
    points = [point for line in lines for point in line.points]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    y_ticks = ticks(min(ys), max(ys))
    spread = 0.0 if max(xs) > min(xs) else 0.5
    x = Scale(min(xs) - spread, max(xs) + spread, left, right)
    y = Scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [text_at(0, 12, y_label, "label"), text_at((left + right) / 2, height - 6, x_label, "label", "middle")]
    for value, label in zip(y_ticks, tick_texts(y_ticks), strict=True):
        parts.append(line_at(left, y(value), right, y(value), "axis" if value == y_ticks[0] else "grid"))
        parts.append(text_at(left - 7, y(value) + 4, label, "tick", "end"))
    whole = [v for v in ticks(x.low, x.high, 9) if x.low <= v <= x.high and v == round(v)]
    parts += [text_at(x(value), bottom + 16, fixed(value), "tick", "middle") for value in whole]
    for line in lines:
        path = " ".join(f"{_number(x(a))},{_number(y(b))}" for a, b in line.points)
        parts.append(element("polyline", points=path, class_=f"curve {line.css}"))
        if len(line.points) == 1:
            parts.append(
                element("circle", cx=x(line.points[0][0]), cy=y(line.points[0][1]), r=4, class_=f"dot {line.css}")
            )
    band = (right - left) / max(1, len(hints))
    for at, text in hints:
        area = {"x": x(at) - band / 2, "y": top, "width": band, "height": bottom - top}
        parts.append(element("rect", element("title", text), class_="hover", **area))
    if mark:
        at_x, at_y = x(mark[0]), y(mark[1])
        anchor, shift = ("end", -9) if at_x > (left + right) / 2 else ("start", 9)
        # At the end of the marker that is far from the point: curves are usually near the point.
        text_y = top + 12 if at_y > (top + bottom) / 2 else bottom - 10
        parts.append(line_at(at_x, top, at_x, bottom, "marker"))
        parts.append(element("circle", cx=at_x, cy=at_y, r=4.5, class_="best"))
        parts.append(text_at(at_x + shift, text_y, mark[2], "strong halo", anchor))
    return drawing(key, title, description, height, parts)


@dataclass(frozen=True)
class Dot:
    """One point of a scatter chart. css: class of its colour. said: what is shown over it."""

    x: float
    y: float
    name: str
    css: str = "s1"
    said: str = ""


def scatter_chart(
    key: str, title: str, dots: Sequence[Dot], *, x_label: str, y_label: str, limits: tuple[float, float],
) -> Markup:  # fmt: skip
    """Named points from x = 0. limits: (x, y) of dashed lines, within which (to the left and above) a point must be."""
    height, left, right, top, bottom = 256.0, 52.0, WIDTH - 16.0, 30.0, 206.0
    x_ticks = ticks(0.0, max([limits[0], *(dot.x for dot in dots)]), 6)
    y_ticks = ticks(min([limits[1], *(dot.y for dot in dots)]), max([limits[1], *(dot.y for dot in dots)]))
    x, y = Scale(0.0, x_ticks[-1], left, right), Scale(y_ticks[0], y_ticks[-1], bottom, top)
    parts = [text_at(0, 12, y_label, "label"), text_at((left + right) / 2, height - 6, x_label, "label", "middle")]
    for value, label in zip(y_ticks, tick_texts(y_ticks), strict=True):
        parts.append(line_at(left, y(value), right, y(value), "axis" if value == y_ticks[0] else "grid"))
        parts.append(text_at(left - 7, y(value) + 4, label, "tick", "end"))
    parts += _vertical_grid(x, x_ticks, top, bottom)
    parts.append(line_at(x(limits[0]), top, x(limits[0]), bottom, "marker"))
    parts.append(line_at(left, y(limits[1]), right, y(limits[1]), "marker"))
    taken: list[tuple[float, float]] = []
    for dot in sorted(dots, key=lambda dot: -dot.y):
        at_x, at_y = x(dot.x), y(dot.y)
        anchor, shift = ("end", -8.0) if at_x > (left + right) / 2 else ("start", 8.0)
        text_y = at_y + 4
        while any(abs(text_y - other) < 12 and abs(at_x - near) < 90 for near, other in taken):
            text_y += 12
        taken.append((at_x, text_y))
        tip = element("title", f"{dot.name}: {dot.said}")
        parts.append(element("circle", tip, cx=at_x, cy=at_y, r=5.0, class_=dot.css))
        parts.append(text_at(at_x + shift, text_y, dot.name, "strong halo", anchor))
    said = "; ".join(f"{dot.name}: {dot.said}" for dot in dots)
    return drawing(key, title, f"{y_label} over {x_label}. {said}.", height, parts)


@dataclass(frozen=True)
class Row:
    """One horizontal bar. value None: not measured. text: printed at its end. low, high: ends of a whisker."""

    name: str
    value: float | None
    text: str
    css: str = "s1"
    low: float | None = None
    high: float | None = None

    @property
    def said(self) -> str:
        """The row in words."""
        spread = "" if self.low is None else f", from {significant(self.low)} to {significant(self.high)}"
        return f"{self.name}: {self.text}{spread}"


def bar_chart(key: str, title: str, rows: Sequence[Row], label: str) -> Markup:
    """Horizontal bars from zero, each under its name, with its number at the end; label names the axis."""
    pitch, bar, end = 40, 14, WIDTH - 96
    bottom = pitch * len(rows) + 2
    largest = max((max(row.value or 0.0, row.high or 0.0) for row in rows), default=0.0)
    values = ticks(0.0, largest or 1.0, 5)
    scale = Scale(0.0, values[-1], 4, end)
    parts = _vertical_grid(scale, values, 0, bottom)
    parts.append(text_at(4, bottom + 32, label, "label"))
    for index, row in enumerate(rows):
        y = pitch * index + 18
        parts.append(text_at(9, y - 5, short(row.name, 52), "halo"))
        if row.value is None:
            parts.append(text_at(9, y + 11, row.text, "tick halo"))
            continue
        tip = element("title", row.said)
        width = max(1.0, scale(row.value) - 4)
        parts.append(element("rect", tip, x=4, y=y, width=width, height=bar, rx=2, class_=row.css))
        reach = scale(row.value)
        if row.low is not None and row.high is not None:
            low, high, middle = scale(row.low), scale(row.high), y + bar / 2
            parts += [line_at(a, middle + b, c, middle + d, css) for css in ("whisker under", "whisker")
                      for a, b, c, d in ((low, 0, high, 0), (low, -4, low, 4), (high, -4, high, 4))]  # fmt: skip
            reach = max(reach, high)
        parts.append(text_at(reach + 6, y + 11, row.text, "strong halo"))
    return drawing(key, title, f"{label}. {'; '.join(row.said for row in rows)}.", bottom + 40, parts)


def sqnr_axis(values: Iterable[float | None]) -> list[float]:
    """Ticks of an axis in dB for all these values; those of exact sites (200 dB) don't stretch it."""
    usual = [v for v in values if v is not None and v < EXACT_DB]
    return ticks(min(0.0, *usual, 0.0), max(1.0, *usual, 0.0), 7)


def site_bars(
    key: str, title: str, sites: Sequence[tuple[str, Sequence[float | None]]],
    *, axis: Sequence[float], names: Sequence[str], lowest: Sequence[str],
) -> Markup:  # fmt: skip
    """A group of thin bars for every site, one for each run.

    sites: (name, dB for each run, None where it isn't quantized). axis: its ticks, shared by all parts of
    the figure. names: of the runs. lowest: for each run the site whose number is printed.
    """
    bar, gap = (7.0, 7.0) if len(sites) <= 40 else (5.0, 5.0)
    pitch = max(11.0, bar * len(names) + gap)
    left, right, top = 142.0, WIDTH - 48.0, 18.0
    bottom = top + pitch * len(sites) + 2
    scale = Scale(axis[0], axis[-1], left, right)
    parts = _vertical_grid(scale, axis, top - 4, bottom)
    parts += [text_at(scale(v), top - 8, t, "tick", "middle") for v, t in zip(axis, tick_texts(axis), strict=True)]
    parts.append(text_at((left + right) / 2, bottom + 30, "SQNR (dB)", "label", "middle"))
    for index, (site, levels) in enumerate(sites):
        y = top + pitch * index + 3
        head, dot, leaf = short(site, 25).rpartition(".")
        label = join([element("tspan", head + dot, class_="mute"), leaf])
        parts.append(text_at(left - 7, y + bar * len(names) / 2 + 3.5, label, "site", "end"))
        reach, notes = 0.0, []
        for run, level in enumerate(levels):
            if level is None:
                continue
            a, b = sorted((scale(0.0), scale(min(level, axis[-1]))))
            tip = "exact" if level >= EXACT_DB else fixed(level, 1, " dB")
            area = {"x": a, "y": y + bar * run, "width": max(1.0, b - a), "height": bar - 1, "rx": 1}
            parts.append(
                element("rect", element("title", f"{site}, {names[run]}: {tip}"), class_=f"s{run % 4 + 1}", **area)
            )
            reach = max(reach, b)
            notes += [f"{names[run]} {tip}"] if lowest[run] == site else []
        if notes:
            text, middle = f"lowest: {', '.join(notes)}", y + bar * len(names) / 2 + 3
            fits = reach + 5.9 * len(text) < WIDTH
            place = (reach + 5, "start") if fits else (WIDTH - 2.0, "end")
            parts.append(text_at(place[0], middle, text, "note halo", place[1]))
    said = f"Bars for {', '.join(names)}, site by site from {sites[0][0]} to {sites[-1][0]}."
    return drawing(key, title, said, bottom + 36, parts)
