"""Boxes, arrows and stacks of them as standalone SVG files: what docs/figures.py draws with."""

from __future__ import annotations

import html
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from leanvit.report.svg import element

WIDTH = 860
ROW, GAP = 46, 30
INK, FAINT = "#1f2937", "#6b7280"
FILLS = {"plain": "#f3f4f6", "conv": "#dbeafe", "attention": "#ffedd5", "carried": "#dcfce7"}
EDGES = {"plain": "#9ca3af", "conv": "#3b82f6", "attention": "#ea580c", "carried": "#16a34a"}
PALETTE = ("#bfdbfe", "#fed7aa", "#bbf7d0", "#fecaca", "#ddd6fe", "#fef08a", "#a5f3fc", "#fbcfe8", "#e5e7eb")


def text(x: float, y: float, words: object, *, size: int = 12, anchor: str = "middle", **attributes: object) -> Markup:
    """One line of text, its baseline at y."""
    style = {"fill": INK, **attributes}
    return element("text", words, x=x, y=y, font_size=size, text_anchor=anchor, **style)


def quoted(words: str) -> Markup:
    """Words escaped as the files of docs/models have them: &#x27; for a quote, where MarkupSafe writes &#39;."""
    return Markup(html.escape(words))


def box(x: float, y: float, width: float, height: float, kind: str, lines: Sequence[object]) -> Markup:
    """A rounded box with lines of text in its middle, the first one bold."""
    first = y + height / 2 - 7.5 * (len(lines) - 1) + 4
    words = [
        text(x + width / 2, first + 15 * i, line, font_weight="600" if i == 0 else None) for i, line in enumerate(lines)
    ]
    frame = element("rect", x=x, y=y, width=width, height=height, rx=5, fill=FILLS[kind], stroke=EDGES[kind])
    return element("g", frame, *words)


def arrow(*points: tuple[float, float], colour: str = FAINT, both: bool = False) -> Markup:
    """A line through points, with a head at its end, or at both ends."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    head = f"url(#head-{'carried' if colour == EDGES['carried'] else 'plain'})"
    return element(
        "polyline",
        points=path,
        fill="none",
        stroke=colour,
        stroke_width=1.5,
        marker_end=head,
        marker_start=head if both else None,
    )


def picture(title: str, height: float, parts: Iterable[object], width: float = WIDTH) -> str:
    """A standalone SVG on white; the title is what a screen reader says."""
    heads = [
        element(
            "marker",
            element("path", d="M0,0 L8,4 L0,8 z", fill=colour),
            id=f"head-{name}",
            viewBox="0 0 8 8",
            refX=7,
            refY=4,
            markerWidth=6,
            markerHeight=6,
            orient="auto-start-reverse",
        )
        for name, colour in (("plain", FAINT), ("carried", EDGES["carried"]))
    ]
    drawing = element(
        "svg",
        element("title", quoted(title)),
        element("defs", *heads),
        element("rect", width=width, height=height, fill="#ffffff"),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:g} {height:g}",
        font_family=quoted("system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif"),
        role="img",
    )
    return f"{drawing}\n".replace("><", ">\n<")


@dataclass(frozen=True)
class Row:
    """One box of a stack.

    out: shape on the arrow below. side: shape in a box beside it, called `side_name`, which the box hands to
    (or, with `from_side`, takes from); link, back: words on the way there and back; down: words on the way from
    the side box above; without words nothing is drawn there, and a row with `from_side` is reached from all
    side boxes that stand alone like this. count: how many equal rows it stands for.
    """

    name: str
    detail: str
    out: str
    kind: str = "plain"
    side: str = ""
    side_name: str = ""
    from_side: bool = False
    link: str = ""
    back: str = ""
    down: str = ""
    count: int = 1

    @property
    def same(self) -> tuple[str, ...]:
        """What is equal in rows that may be drawn as one."""
        return (self.detail, self.out, self.kind, self.side, self.link, self.down)


def merged(rows: Iterable[Row]) -> list[Row]:
    """Runs of equal rows as one, "blocks.2 to 11"."""
    out = []
    for _, group in itertools.groupby(rows, key=lambda row: row.same):
        first, *rest = group
        if rest:
            last = rest[-1]
            name = f"{first.name} to {last.name.split('.')[-1]}"
            side_name = f"{first.side_name} to {last.side_name}" if first.side_name else ""
            first = replace(first, name=name, side_name=side_name, count=1 + len(rest))
        out.append(first)
    return out


LEFT, BOX = 20, 340
RIGHT, SIDE_BOX = 520, 300


def stack(title: str, image: str, rows: Sequence[Row]) -> str:
    """Boxes from the image down to the classes, what is carried past them at the right."""
    middle = LEFT + BOX / 2
    parts = [box(LEFT, 20, BOX, 28, "plain", [f"image {image}"])]
    y, above = 48.0, None
    alone: list[float] = []
    for row in rows:
        if not row.from_side:
            parts.append(arrow((middle, y), (middle, y + GAP)))
        y += GAP
        times = f"{row.name}, {row.count} times" if row.count > 1 else row.name
        parts.append(box(LEFT, y, BOX, ROW, row.kind, [times, row.detail]))
        parts.append(text(middle + 8, y + ROW + 19, row.out, anchor="start", fill=FAINT))
        if row.side:
            parts += beside(row, y, above)
            above = y + ROW
            alone = [] if row.down else [*alone, y + ROW / 2]
        if row.from_side:
            parts += [rail(start, y + ROW / 2) for start in alone[:-1]]
        y += ROW
    width = WIDTH if above is not None else LEFT * 2 + BOX + 20
    return picture(title, y + 30, parts, width)


def rail(start: float, end: float) -> Markup:
    """From the right edge of a side box down to that of another."""
    edge = RIGHT + SIDE_BOX
    return arrow((edge, start), (edge + 18, start), (edge + 18, end), (edge, end), colour=EDGES["carried"])


def beside(row: Row, y: float, above: float | None) -> list[Markup]:
    """The side box of a row and its arrows; `above` is the bottom of the side box before."""
    green, between = EDGES["carried"], (LEFT + BOX + RIGHT) / 2
    there, here = (RIGHT, y + ROW / 2), (LEFT + BOX, y + ROW / 2)
    parts = [
        box(RIGHT, y, SIDE_BOX, ROW, "carried", [row.side_name, row.side]),
        arrow(*((there, here) if row.from_side else (here, there)), colour=green, both=bool(row.back)),
        text(between, y + ROW / 2 - 7, row.link),
        text(between, y + ROW / 2 + 16, row.back),
    ]
    if above is not None and row.down:
        x = RIGHT + 20
        parts.append(arrow((x, above), (x, y), colour=green))
        parts.append(text(x + 8, y - GAP / 2 + 4, row.down, anchor="start", fill=FAINT))
    return parts
