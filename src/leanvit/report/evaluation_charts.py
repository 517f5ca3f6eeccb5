"""Drawings of an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence

from leanvit.report import svg
from leanvit.report.run import Json
from leanvit.report.svg import Markup, Scale, finite, fixed, tag
from leanvit.report.words import percent

LEFT, TOP = 128.0, 22.0
LONGEST_NAME = 18


def confusion_chart(names: Sequence[str], cells: Sequence[tuple[int, int, int]]) -> Markup:
    """A square of (true class, called class) cells, each as strong as its share of the row.

    names: of the classes, up to about 20. cells: (true, called, images), those above zero.
    """
    count = len(names)
    side = (svg.WIDTH - 4 - LEFT) / count
    totals = [sum(images for true, _, images in cells if true == index) for index in range(count)]
    parts = []
    for index, name in enumerate(names):
        middle = LEFT + side * (index + 0.5)
        parts.append(_text(middle, TOP - 7, str(index + 1), "tick", "middle"))
        label = f"{svg.short(name, LONGEST_NAME)} {index + 1}"
        parts.append(_text(LEFT - 6, TOP + side * (index + 0.5) + 3.5, label, "site", "end"))
    parts.append(tag("rect", x=LEFT, y=TOP, width=side * count, height=side * count, fill="none", class_="grid"))
    for true, called, images in cells:
        share = percent(images, totals[true]) or 0.0
        tip = tag("title", f"{names[true]} called {names[called]}: {images} of {totals[true]}")
        area = {"x": LEFT + side * called, "y": TOP + side * true, "width": side - 1, "height": side - 1}
        css = "s1" if true == called else "s2"
        parts.append(tag("rect", tip, **area, class_=css, fill_opacity=0.12 + 0.68 * share / 100))
        if share >= 0.5:
            at = (area["x"] + side / 2, area["y"] + side / 2 + 3)
            parts.append(_text(*at, f"{share:.0f}", "note", "middle"))
    said = f"Confusion matrix of {count} classes; the table below lists the most frequent mistakes."
    return svg.drawing("confusion-chart", "Confusion matrix", said, TOP + side * count + 6, parts)


def reliability_chart(bins: Sequence[Json]) -> Markup:
    """Accuracy of every bin of confidence beside the line where both are equal, over the share of images in each."""
    x, y = Scale(0.0, 1.0, 44.0, svg.WIDTH - 12.0), Scale(0.0, 1.0, 286.0, 20.0)
    floor, lowest = 336.0, 298.0
    total = sum(finite(row.get("images")) or 0.0 for row in bins) or 1.0
    parts = [_text(0, 10, "accuracy", "label"), _text(svg.WIDTH / 2, 368, "confidence", "label", "middle")]
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(_line(x(0), y(value), x(1), y(value), "grid"))
        parts.append(_text(x(0) - 7, y(value) + 4, f"{value:.1f}", "tick", "end"))
        parts.append(_text(x(value), floor + 14, f"{value:.1f}", "tick", "middle"))
    for row in bins:
        parts += _reliability_bar(row, x, y, floor, (floor - lowest) / total)
    parts.append(_line(x(0), y(0), x(1), y(1), "marker"))
    parts.append(_line(x(0), floor, x(1), floor, "axis"))
    said = (
        "Bars of accuracy over bins of confidence, with the diagonal of perfect calibration and the images of each bin."
    )
    return svg.drawing("reliability", "Reliability diagram", said, 374, parts)


def _reliability_bar(row: Json, x: Scale, y: Scale, floor: float, height_of_image: float) -> list[Markup]:
    low, high, images = (finite(row.get(key)) for key in ("low", "high", "images"))
    if low is None or high is None or not images:
        return []
    area = {"x": x(low) + 1, "width": x(high) - x(low) - 2}
    share = images * height_of_image
    parts = [tag("rect", y=floor - share, height=share, **area, class_="s0")]
    accuracy, confidence = finite(row.get("accuracy")), finite(row.get("confidence"))
    if accuracy is None or confidence is None:
        return parts
    words = f"confidence {fixed(confidence, 3)}, accuracy {fixed(accuracy, 3)}, {fixed(images)} images"
    bar = tag(
        "rect", tag("title", words), y=y(accuracy), height=y(0) - y(accuracy), **area, class_="s1", fill_opacity=0.55
    )
    return [*parts, bar, tag("circle", cx=x(confidence), cy=y(confidence), r=2.5, class_="s2")]


def _text(x: float, y: float, text: str, css: str, anchor: str | None = None) -> Markup:
    return tag("text", text, x=x, y=y, class_=css, text_anchor=anchor)


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=css)
