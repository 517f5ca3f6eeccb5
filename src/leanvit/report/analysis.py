"""Sections of an analysis: curves and tables over the layers of one model, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.analysis_pictures import field_pictures, head_pictures, map_pictures, read_arrays, rollout_pictures
from leanvit.report.html import Section, join
from leanvit.report.run import Run
from leanvit.report.words import Json, finite, fixed, megabytes, significant

Points = list[tuple[float, float]]


def analysis_sections(run: Run) -> list[Section]:
    """Every section; without content where no model has it."""
    values = run.get("analysis")
    models: list[Json] = values.get("models") or []
    if not models:
        return []
    arrays = read_arrays(run)
    return [
        Section("models", "Models", _models(values, models, arrays is not None)),
        Section("maps", "Attention maps", map_pictures(values, models, arrays)),
        Section("heads", "Attention of every head", head_pictures(values, models, arrays)),
        Section("rollout", "Attention rollout", rollout_pictures(values, models, arrays)),
        Section("distance", "Attention distance", _distance(models)),
        Section("diversity", "Token diversity", _diversity(models)),
        Section("norms", "Token norms", _norms(models)),
        Section("alpha", "Residual weight of attention", _alpha(models)),
        Section("shortcut", "What each scale contributes to the classifier", _shortcut(models)),
        Section("field", "Effective receptive field", field_pictures(models, arrays)),
        Section("cost", "Cost against resolution", _cost(models)),
    ]


def _models(values: Json, models: Sequence[Json], pictures: bool) -> Markup:
    rows = []
    for model in models:
        left_out = [f"{part}: {reason}" for part, reason in (model.get("left_out") or {}).items()]
        size = " × ".join(fixed(side) for side in model.get("input_size") or ())
        done = ", ".join(map(str, model.get("done") or [])) or "–"
        rows.append(
            [model["name"], fixed(model.get("parameters")), size, done, html.lines(left_out) if left_out else "–"]
        )
    caption = (
        f"What was looked at, on {fixed(values.get('images'))} images of {values.get('data')}. Distances are in pixels "
        "of each model's own input."
    )
    table = html.table(caption, ("Model", "Parameters", "Input, pixels", "Done", "Left out"), rows, "lrlll")
    missing = html.paragraph("Pictures are drawn from analysis.npz, which is not in this folder.", css="mute")
    return join([table, None if pictures else missing])


def _legend(models: Sequence[Json], part: str) -> Markup | None:
    names = [(f"l{i}", str(model["name"])) for i, model in enumerate(models, 1) if model.get(part)]
    return html.legend(names) if names else None


def _curves(models: Sequence[Json], part: str, key: str) -> list[svg.Line]:
    """One curve a model over its layers, counted from 1."""
    lines = []
    for number, model in enumerate(models, start=1):
        layers = (model.get(part) or {}).get("layers") or []
        numbers = [(float(depth), finite(layer.get(key))) for depth, layer in enumerate(layers, start=1)]
        points = [(x, y) for x, y in numbers if y is not None]
        lines += [svg.Line(points, f"l{number}")] if points else []
    return lines


def _chart(key: str, title: str, lines: Sequence[svg.Line], x_label: str, y_label: str) -> Markup | None:
    if not lines:
        return None
    said = f"{y_label} against {x_label}: {len(lines)} curves and points."
    return html.titled(title, svg.line_chart(key, title, said, lines, x_label=x_label, y_label=y_label))


def _distance(models: Sequence[Json]) -> Markup | None:
    means = _curves(models, "distance", "mean")
    if not means:
        return None
    dots = []
    for number, model in enumerate(models, start=1):
        for depth, layer in enumerate((model.get("distance") or {}).get("layers") or [], start=1):
            heads = [finite(value) for value in layer.get("heads") or []]
            dots += [svg.Line([(float(depth), value)], f"l{number}") for value in heads if value is not None]
    caption = (
        "How far attention looks: distance between the centres of the patch that looks and the one looked at, weighted "
        "by attention, class tokens left out (Dosovitskiy et al. 2021, figure 7). A dot is a head, the line their mean."
    )
    rows = [
        [f"{model['name']}, {depth}", layer.get("name"), fixed(layer.get("mean"), 2), fixed(layer.get("uniform"), 2),
         ", ".join(fixed(value, 1) for value in layer.get("heads") or [])]
        for model in models
        for depth, layer in enumerate((model.get("distance") or {}).get("layers") or [], start=1)
    ]  # fmt: skip
    note = "Attention distance in pixels. Even: of a head that looks alike at all that this layer lets it see."
    table = html.table(note, ("Layer", "Module", "Mean", "Even", "Heads"), rows, "llrrl")
    chart = _chart("distance-chart", "Distance", [*means, *dots], "layer", "attention distance (pixels)")
    figure = html.figure(caption, _legend(models, "distance"), html.panels(chart))
    return join([figure, html.details("Numbers of this figure", table)])


def _diversity(models: Sequence[Json]) -> Markup | None:
    charts = [
        _chart(f"{key}-chart", title, _curves(models, "diversity", key), "layer", label)
        for key, title, label in (
            ("diversity", "One minus mean cosine similarity", "1 − mean cosine of pairs of tokens"),
            ("residual", "Residual to equal tokens", "‖X − 1mᵀ‖ / ‖X‖"),
        )
    ]
    if not any(charts):
        return None
    caption = (
        "Do the tokens after a block still differ? 0 in both: all tokens are one. Left as in ReViT (Diko et al. 2024), "
        "right after Dong et al. 2021. Class tokens are left out; mean over the images."
    )
    rows = [
        [
            f"{model['name']}, {depth}",
            layer.get("name"),
            fixed(layer.get("diversity"), 3),
            fixed(layer.get("residual"), 3),
        ]
        for model in models
        for depth, layer in enumerate((model.get("diversity") or {}).get("layers") or [], start=1)
    ]
    table = html.table("Token diversity.", ("Layer", "Block", "1 − cosine", "Residual"), rows, "llrr")
    figure = html.figure(caption, _legend(models, "diversity"), html.panels(*charts))
    return join([figure, html.details("Numbers of this figure", table)])


def _norms(models: Sequence[Json]) -> Markup | None:
    charts = [
        _chart(f"{key}-chart", title, _curves(models, "norms", key), "layer", label)
        for key, title, label in (
            ("times", "The largest norm beside the median", "largest / median norm of an image's tokens"),
            ("sinks", "Sinks", "tokens an image far above the median"),
        )
    ]
    if not any(charts):
        return None
    beyond = next(fixed(model["norms"].get("sink_times"), 0) for model in models if model.get("norms"))
    caption = (
        f"Do a few patches stand far above the others? A sink is a token of more than {beyond} times the median norm "
        "of its image (Darcet et al. 2024): it sets the range of what is quantized behind this layer. Class tokens are "
        "left out; mean over the images."
    )
    rows = [
        [f"{model['name']}, {depth}", layer.get("name"), significant(layer.get("median")),
         significant(layer.get("largest")), fixed(layer.get("times"), 2), fixed(layer.get("sinks"), 2)]
        for model in models
        for depth, layer in enumerate((model.get("norms") or {}).get("layers") or [], start=1)
    ]  # fmt: skip
    heads = ("Layer", "Block", "Median", "Largest", "Largest / median", "Sinks an image")
    table = html.table("Norms of tokens after each block.", heads, rows, "llrrrr")
    figure = html.figure(caption, _legend(models, "norms"), html.panels(*charts))
    return join([figure, html.details("Numbers of this figure", table)])


def _alpha(models: Sequence[Json]) -> Markup | None:
    rows = []
    for model in models:
        values = model.get("alpha") or {}
        for depth, (own, first) in enumerate(zip(values.get("alpha") or [], values.get("first") or [], strict=True), 2):
            rows.append([f"{model['name']}, {depth}", values.get("mode"), fixed(own, 4), significant(first)])
    if not rows:
        return None
    caption = (
        "alpha: weight of a layer's own attention logits; 1 − alpha is that of the logits from below. First: how much "
        "the logits of the first layer still count. Where alpha is learned once, all layers share it."
    )
    return html.table(caption, ("Layer", "alpha is", "alpha", "First"), rows, "llrr")


def _shortcut(models: Sequence[Json]) -> Markup | None:
    rows = []
    for model in models:
        values = model.get("shortcut") or {}
        full = finite((values.get("rows") or [{}])[0].get("top1"))
        for row in values.get("rows") or []:
            without = ", ".join(fixed(stride) for stride in row.get("without") or []) or "none: as it is"
            top1 = finite(row.get("top1"))
            lost = None if top1 is None or full is None else top1 - full
            counts = f"{fixed(row.get('correct'))} / {fixed(values.get('images'))}"
            rows.append([model["name"], without, fixed(row.get("channels")), fixed(top1, 2), counts, fixed(lost, 2)])
    if not rows:
        return None
    caption = (
        "Accuracy of the same weights with the channels of some scales at zero in the classifier's input: what this "
        "classifier relies on, not what a network trained without them would reach."
    )
    heads = ("Model", "Strides left out", "Channels", "Top-1, %", "Correct", "Points")
    return html.table(caption, heads, rows, "lrrrrr")


def _cost(models: Sequence[Json]) -> Markup | None:
    rows, macs, memory, latency = [], list[svg.Line](), list[svg.Line](), list[svg.Line]()
    for number, model in enumerate(models, start=1):
        found = (model.get("cost") or {}).get("rows") or []
        for lines, key, scale in ((macs, "macs", 1e9), (memory, "activation_bytes", 1e6), (latency, "latency_ms", 1.0)):
            points = _points(found, key, scale)
            lines += [svg.Line(points, f"l{number}")] if points else []
        rows += [_cost_row(str(model["name"]), row) for row in found]
    if not rows:
        return None
    charts = [
        _chart("macs-chart", "Multiply-adds", macs, "side of the image (pixels)", "10⁹ multiply-adds"),
        _chart("memory-chart", "Activations", memory, "side of the image (pixels)", "activations (MB)"),
        _chart("latency-chart", "Latency", latency, "side of the image (pixels)", "milliseconds an image"),
    ]
    caption = (
        "Cost of one square image. Multiply-adds of linears, convolutions and both attention products; activations: "
        "the most bytes of results alive at once in float32, attention in one kernel where the model allows it."
    )
    note = "Cost against resolution. Latency is measured where it was asked for: median and interquartile range."
    heads = ("Model", "Side", "10⁹ multiply-adds", "Activations, MB", "Latency, ms", "Range, ms", "Problem")
    figure = html.figure(caption, _legend(models, "cost"), html.panels(*charts)) if any(charts) else None
    return join([figure, html.table(note, heads, rows, "lrrrrrl")])


def _points(rows: Sequence[Json], key: str, scale: float) -> Points:
    pairs = [(finite(row.get("side")), finite(row.get(key))) for row in rows]
    return sorted((x, y / scale) for x, y in pairs if x is not None and y is not None)


def _cost_row(name: str, row: Json) -> list[Any]:
    macs = finite(row.get("macs"))
    return [
        name,
        fixed(row.get("side")),
        significant(None if macs is None else macs / 1e9),
        megabytes(row.get("activation_bytes")),
        significant(row.get("latency_ms")),
        significant(row.get("latency_iqr_ms")),
        row.get("error") or "",
    ]
