"""Drawings of an evaluation: the confusion matrix and the reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from leanvit.report import svg
from leanvit.report.svg import Scale
from leanvit.report.words import Json, finite, fixed, percent, short

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
        parts.append(svg.text_at(middle, TOP - 7, str(index + 1), "tick", "middle"))
        label = f"{short(name, LONGEST_NAME)} {index + 1}"
        parts.append(svg.text_at(LEFT - 6, TOP + side * (index + 0.5) + 3.5, label, "site", "end"))
    parts.append(
        svg.element("rect", x=LEFT, y=TOP, width=side * count, height=side * count, fill="none", class_="grid")
    )
    for true, called, images in cells:
        share = percent(images, totals[true]) or 0.0
        tip = svg.element("title", f"{names[true]} called {names[called]}: {images} of {totals[true]}")
        area = {"x": LEFT + side * called, "y": TOP + side * true, "width": side - 1, "height": side - 1}
        css = "s1" if true == called else "s2"
        parts.append(svg.element("rect", tip, **area, class_=css, fill_opacity=0.12 + 0.68 * share / 100))
        if share >= 0.5:
            at = (area["x"] + side / 2, area["y"] + side / 2 + 3)
            parts.append(svg.text_at(*at, f"{share:.0f}", "note", "middle"))
    said = f"Confusion matrix of {count} classes; the table below lists the most frequent mistakes."
    return svg.drawing("confusion-chart", "Confusion matrix", said, TOP + side * count + 6, parts)


def reliability_chart(bins: Sequence[Json]) -> Markup:
    """Accuracy of every bin of confidence beside the line where both are equal, over the share of images in each."""
    x, y = Scale(0.0, 1.0, 44.0, svg.WIDTH - 12.0), Scale(0.0, 1.0, 286.0, 20.0)
    floor, lowest = 336.0, 298.0
    total = sum(finite(row.get("images")) or 0.0 for row in bins) or 1.0
    parts = [svg.text_at(0, 10, "accuracy", "label"), svg.text_at(svg.WIDTH / 2, 368, "confidence", "label", "middle")]
    for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        parts.append(svg.line_at(x(0), y(value), x(1), y(value), "grid"))
        parts.append(svg.text_at(x(0) - 7, y(value) + 4, f"{value:.1f}", "tick", "end"))
        parts.append(svg.text_at(x(value), floor + 14, f"{value:.1f}", "tick", "middle"))
    for row in bins:
        parts += _reliability_bar(row, x, y, floor, (floor - lowest) / total)
    parts.append(svg.line_at(x(0), y(0), x(1), y(1), "marker"))
    parts.append(svg.line_at(x(0), floor, x(1), floor, "axis"))
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
    parts = [svg.element("rect", y=floor - share, height=share, **area, class_="s0")]
    accuracy, confidence = finite(row.get("accuracy")), finite(row.get("confidence"))
    if accuracy is None or confidence is None:
        return parts
    words = f"confidence {fixed(confidence, 3)}, accuracy {fixed(accuracy, 3)}, {fixed(images)} images"
    bar = svg.element(
        "rect",
        svg.element("title", words),
        y=y(accuracy),
        height=y(0) - y(accuracy),
        **area,
        class_="s1",
        fill_opacity=0.55,
    )
    return [*parts, bar, svg.element("circle", cx=x(confidence), cy=y(confidence), r=2.5, class_="s2")]
