"""Drawing for the report: escaped markup, numbers as text, tables, axes, charts and pictures.

Charts are inline SVG, 440 units wide with 11-unit text, so that two stand side by side on a desk and one
fills a phone without its text becoming too small to read. Nothing here knows a file of a run.
"""

from __future__ import annotations

import base64
import html
import math
import re
import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

WIDTH = 440
EXACT_DB = 120.0
MANY_BLOCKS = 10
_VOID = frozenset({"meta", "link", "img", "br"})
_VIRIDIS = np.array(
    [(68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129), (92, 200, 99),
     (170, 220, 50), (253, 231, 37)], np.float64
)  # fmt: skip


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters a tag."""

    __slots__ = ()


def join(parts: Iterable[object]) -> Markup:
    """Parts in one: Markup as it is, None as nothing, everything else escaped."""
    return Markup(
        "".join(part if isinstance(part, Markup) else html.escape(str(part)) for part in parts if part is not None)
    )


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """One element. Trailing underscores of attributes fall off, inner ones become hyphens; None omits one."""
    text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{text}>") if name in _VOID else Markup(f"<{name}{text}>{join(children)}</{name}>")


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def finite(value: Any) -> float | None:
    """A number from JSON as a float; None where it is absent, not a number, NaN or infinite."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def fixed(value: Any, digits: int = 0, unit: str = "") -> str:
    """A number with `digits` decimals and a true minus sign, such as '−0.28%'; a dash where there is none."""
    number = finite(value)
    return "–" if number is None else f"{number:,.{digits}f}{unit}".replace("-", "−")


def significant(value: Any, unit: str = "") -> str:
    """A number with about three significant digits and no exponent."""
    number = finite(value)
    if number is None or number == 0:
        return fixed(number, 0, unit)
    return fixed(number, min(6, max(0, 2 - math.floor(math.log10(abs(number))))), unit)


def short(text: str, limit: int) -> str:
    """At most `limit` characters; an ellipsis takes the place of the front, because ends tell names apart."""
    return text if len(text) <= limit else "…" + text[len(text) - limit + 1 :]


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
    return tag(
        "svg",
        tag("title", title, id=f"{key}-title"),
        tag("desc", description, id=f"{key}-desc"),
        *children,
        viewBox=f"0 0 {WIDTH} {_number(float(height))}",
        role="img",
        aria_labelledby=f"{key}-title {key}-desc",
    )


def table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[object]], align: str, pick: int = -1) -> Markup:
    """A table with a row header a line. align: 'l' or 'r' for each column. pick: index of the row to point out."""
    classes = ["r" if side == "r" else None for side in align]
    head = (tag("th", text, scope="col", class_=css) for text, css in zip(heads, classes, strict=True))
    body = []
    for index, row in enumerate(rows):
        first, *rest = zip(row, classes, strict=True)
        start = tag("th", first[0], scope="row", class_=first[1])
        cells = (tag("td", cell, class_=css) for cell, css in rest)
        body.append(tag("tr", start, *cells, class_="pick" if index == pick else None))
    parts = (tag("caption", tag("span", caption)), tag("thead", tag("tr", *head)), tag("tbody", *body))
    return scroll(tag("table", *parts, class_="wide"), caption.split(". ")[0])


def scroll(content: Markup, label: str) -> Markup:
    """Content that scrolls sideways where it is too wide, by keyboard as well."""
    return tag("div", content, class_="scroll", role="region", aria_label=label, tabindex=0)


def figure(caption: str, *children: object) -> Markup:
    """Pictures with the words that say what is seen."""
    return tag("figure", *children, tag("figcaption", caption))


def panels(*children: object) -> Markup:
    """Charts side by side where there is room."""
    return tag("div", *children, class_="panels")


def details(summary: str, *children: object) -> Markup:
    """Content that opens with a click."""
    return tag("details", tag("summary", summary), *children)


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Samples of the classes l1, l2 (lines) and s1 to s4 (areas) with their names."""
    return tag("ul", *(tag("li", _swatch(css), text) for css, text in entries), class_="legend")


def _swatch(css: str) -> Markup:
    area = tag("rect", x=1, y=1, width=22, height=10, rx=2, class_=css)
    shape = _line(1, 6, 23, 6, f"curve {css}") if css.startswith("l") else area
    return tag("svg", shape, viewBox="0 0 24 12", class_="swatch", aria_hidden="true")


def facts(entries: Iterable[tuple[str, object]]) -> Markup:
    """Names and values; entries without a value are left out."""
    pairs = (join([tag("dt", name), tag("dd", value)]) for name, value in entries if value not in (None, "", "–"))
    return tag("dl", *pairs, class_="facts")


def lines(parts: Iterable[object]) -> Markup:
    """Parts under each other."""
    return join(piece for index, part in enumerate(parts) for piece in (tag("br") if index else None, part))


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css)


def _text(x: float, y: float, text: object, css: str | None = None, anchor: str | None = None) -> Markup:
    return tag("text", text, x=x, y=y, class_=css, text_anchor=anchor)


def _vertical_grid(scale: Scale, values: Sequence[float], top: float, bottom: float) -> list[Markup]:
    """Grid lines with their labels below."""
    parts = []
    for value, label in zip(values, tick_texts(values), strict=True):
        parts.append(_line(scale(value), top, scale(value), bottom, "axis" if value == 0 else "grid"))
        parts.append(_text(scale(value), bottom + 14, label, "tick", "middle"))
    return parts


@dataclass(frozen=True)
class Line:
    """One curve: (x, y) points, all finite. css: class that gives colour and dashes."""

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
    parts = [_text(0, 12, y_label, "label"), _text((left + right) / 2, height - 6, x_label, "label", "middle")]
    for value, label in zip(y_ticks, tick_texts(y_ticks), strict=True):
        parts.append(_line(left, y(value), right, y(value), "axis" if value == y_ticks[0] else "grid"))
        parts.append(_text(left - 7, y(value) + 4, label, "tick", "end"))
    whole = [v for v in ticks(x.low, x.high, 9) if x.low <= v <= x.high and v == round(v)]
    parts += [_text(x(value), bottom + 16, fixed(value), "tick", "middle") for value in whole]
    for line in lines:
        path = " ".join(f"{_number(x(a))},{_number(y(b))}" for a, b in line.points)
        parts.append(tag("polyline", points=path, class_=f"curve {line.css}"))
        if len(line.points) == 1:
            parts.append(tag("circle", cx=x(line.points[0][0]), cy=y(line.points[0][1]), r=4, class_=f"dot {line.css}"))
    band = (right - left) / max(1, len(hints))
    for at, text in hints:
        area = {"x": x(at) - band / 2, "y": top, "width": band, "height": bottom - top}
        parts.append(tag("rect", tag("title", text), class_="hover", **area))
    if mark:
        at_x, at_y = x(mark[0]), y(mark[1])
        anchor, shift = ("end", -9) if at_x > (left + right) / 2 else ("start", 9)
        # At the end of the marker that is far from the point: curves are usually near the point.
        text_y = top + 12 if at_y > (top + bottom) / 2 else bottom - 10
        parts.append(_line(at_x, top, at_x, bottom, "marker"))
        parts.append(tag("circle", cx=at_x, cy=at_y, r=4.5, class_="best"))
        parts.append(_text(at_x + shift, text_y, mark[2], "strong halo", anchor))
    return drawing(key, title, description, height, parts)


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
    parts.append(_text(4, bottom + 32, label, "label"))
    for index, row in enumerate(rows):
        y = pitch * index + 18
        parts.append(_text(9, y - 5, short(row.name, 52), "halo"))
        if row.value is None:
            parts.append(_text(9, y + 11, row.text, "tick halo"))
            continue
        tip = tag("title", row.said)
        width = max(1.0, scale(row.value) - 4)
        parts.append(tag("rect", tip, x=4, y=y, width=width, height=bar, rx=2, class_=row.css))
        reach = scale(row.value)
        if row.low is not None and row.high is not None:
            low, high, middle = scale(row.low), scale(row.high), y + bar / 2
            parts += [_line(a, middle + b, c, middle + d, css) for css in ("whisker under", "whisker")
                      for a, b, c, d in ((low, 0, high, 0), (low, -4, low, 4), (high, -4, high, 4))]  # fmt: skip
            reach = max(reach, high)
        parts.append(_text(reach + 6, y + 11, row.text, "strong halo"))
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
    parts += [_text(scale(v), top - 8, t, "tick", "middle") for v, t in zip(axis, tick_texts(axis), strict=True)]
    parts.append(_text((left + right) / 2, bottom + 30, "SQNR (dB)", "label", "middle"))
    for index, (site, levels) in enumerate(sites):
        y = top + pitch * index + 3
        head, dot, leaf = short(site, 25).rpartition(".")
        label = join([tag("tspan", head + dot, class_="mute"), leaf])
        parts.append(_text(left - 7, y + bar * len(names) / 2 + 3.5, label, "site", "end"))
        reach, notes = 0.0, []
        for run, level in enumerate(levels):
            if level is None:
                continue
            a, b = sorted((scale(0.0), scale(min(level, axis[-1]))))
            tip = "exact" if level >= EXACT_DB else fixed(level, 1, " dB")
            area = {"x": a, "y": y + bar * run, "width": max(1.0, b - a), "height": bar - 1, "rx": 1}
            parts.append(tag("rect", tag("title", f"{site}, {names[run]}: {tip}"), class_=f"s{run % 4 + 1}", **area))
            reach = max(reach, b)
            notes += [f"{names[run]} {tip}"] if lowest[run] == site else []
        if notes:
            text, middle = f"lowest: {', '.join(notes)}", y + bar * len(names) / 2 + 3
            fits = reach + 5.9 * len(text) < WIDTH
            place = (reach + 5, "start") if fits else (WIDTH - 2.0, "end")
            parts.append(_text(place[0], middle, text, "note halo", place[1]))
    said = f"Bars for {', '.join(names)}, site by site from {sites[0][0]} to {sites[-1][0]}."
    return drawing(key, title, said, bottom + 36, parts)


def split_sites(order: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(block, role) of every site, such as ('blocks.3', 'attn.qkv'), so that the grid of both is smallest.

    Sites that lie in no numbered block have the block ''.
    """

    def split(name: str, depth: int) -> tuple[str, str]:
        parts = name.split(".")
        numbered = [i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()][:depth]
        cut = numbered[-1] if numbered else 0
        return ".".join(parts[:cut]), ".".join(parts[cut:])

    candidates = [{name: split(name, depth) for name in order} for depth in (4, 3, 2, 1)]
    return min(candidates, key=lambda c: len({b for b, _ in c.values()}) * len({r for _, r in c.values()}))


def bit_grid(title: str, order: Sequence[str], plan: dict[str, tuple[int, int]]) -> Markup:
    """A table, role by block, of (weight bits, activation bits); sites of `order` outside `plan` show F for float."""
    places = split_sites(order)
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    at = {place: site for site, place in places.items()}
    spans: list[tuple[str, int]] = []
    for block in blocks:
        prefix = re.sub(r"\.?\d+$", "", block) if block else "other"
        count = spans.pop()[1] if spans and spans[-1][0] == prefix else 0
        spans.append((prefix, count + 1))
    above = (tag("th", prefix, colspan=count, scope="colgroup", class_="span") for prefix, count in spans)
    below = (tag("th", block.rpartition(".")[2], scope="col") for block in blocks)
    body = []
    for role in dict.fromkeys(role for _, role in places.values()):
        sites = [at.get((block, role)) for block in blocks]
        cells = (tag("td", _bit_pair(site, plan.get(site)) if site else None) for site in sites)
        body.append(tag("tr", tag("th", role, scope="row"), *cells))
    head = tag("thead", tag("tr", tag("td", rowspan=2), *above), tag("tr", *below))
    css = "bits many" if len(blocks) > MANY_BLOCKS else "bits"
    return scroll(tag("table", head, tag("tbody", *body), class_=css, aria_label=title), title)


def _bit_pair(site: str, bits: tuple[int, int] | None) -> Markup:
    tip = f"{site}: weights {bits[0]}, activations {bits[1]} bits" if bits else f"{site}: float"
    return tag("span", *(bit(b) for b in bits or (None, None)), class_="pair", title=tip)


def bit(bits: int | None) -> Markup:
    """One cell of a bit grid, None for float."""
    return tag("span", "F" if bits is None else bits, class_="bit float" if bits is None else f"bit b{bits}")


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (height, width, 3) uint8 RGB as a PNG inside a data URI."""
    height, width, _ = pixels.shape
    rows = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, 3 * width)], axis=1)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows.tobytes(), 9)), chunk(b"IEND", b""))
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(parts)).decode()


def heat(values: NDArray[np.float64], top: float) -> NDArray[np.uint8]:
    """Values (height, width) as viridis colours (height, width, 3) uint8: 0 dark blue, `top` and above yellow."""
    at = np.nan_to_num(np.clip(values / top, 0.0, 1.0)) * (len(_VIRIDIS) - 1)
    steps = np.arange(len(_VIRIDIS))
    return np.stack([np.interp(at, steps, channel) for channel in _VIRIDIS.T], axis=-1).round().astype(np.uint8)
