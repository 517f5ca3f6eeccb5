"""Sections of `leanvit optimize`: all that was tried, where each file lost, why, and what to try next."""

from __future__ import annotations

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.html import Card, Section, join
from leanvit.report.run import Run
from leanvit.report.why import why_part
from leanvit.report.words import Json, finite, fixed, megabytes, ratio, significant


def optimize_sections(run: Run) -> list[Section]:
    """What was tried, why, and what to try next; nothing where a run is of another verb."""
    result = run.get("optimize")
    if not result:
        return []
    return [
        Section("tried", "What was tried", join([_charts(result), _table(result)])),
        Section("why", "Why", join(_why(result))),
        Section("next", "What to try next", html.bullets(result["next"]) if result["next"] else None),
    ]


def optimize_lead(result: Json) -> Markup:
    """What came of it, in one sentence."""
    what = "points of accuracy" if result["labelled"] else "points of agreement with the float network"
    text = f"{result['best']} in {result['runtime']}: {fixed(result['drop'], 2)} {what} lost"
    if result["best"] == "float":
        text = "The float file stays: nothing that was tried is faster and holds the accuracy"
    else:
        text += f", {significant(result['speed'])} times as fast as float, {100 * result['size']:.0f}% of its size"
    counted = f"{fixed(result['images'])} validation images that calibration has not seen"
    return html.paragraph(f"{text}. Measured on {counted}, on {result['machine']['cpu']}.", css="lead")


def optimize_cards(result: Json) -> list[Card]:
    """The best file against the float one."""
    best, first = _row(result, result["best"]), _row(result, "float")
    unit = "%" if result["points"] == 1 else ""
    places = 2 if result["points"] == 1 else 4
    batch = "one image" if result["batch_size"] == 1 else f"batch of {fixed(result['batch_size'])}"
    name = str(result["metric"]).capitalize()
    return [
        Card(name, fixed(best["metric"], places), unit, f"float: {fixed(first['metric'], places)}"),
        Card(f"Time, {batch}", significant(_time(best)), "ms", f"float: {significant(_time(first), ' ms')}"),
        Card("Size", megabytes(best["bytes"]), "MB", f"float: {megabytes(first['bytes'], ' MB')}"),
    ]


def _row(result: Json, name: str) -> Json:
    return next(row for row in result["files"] if row["name"] == name)


def _made(result: Json) -> list[Json]:
    return [row for row in result["files"] if row["state"] == "made"]


def _time(row: Json) -> float | None:
    """Milliseconds in the fastest runtime."""
    return min((finite(value) or 0.0 for value in (row.get("milliseconds") or {}).values()), default=None)


def _charts(result: Json) -> Markup:
    first = _row(result, "float")
    metric = f"{result['metric']}{', %' if result['points'] == 1 else ''}"
    batch = "an image" if result["batch_size"] == 1 else f"a batch of {fixed(result['batch_size'])}"
    least, rows = float(result["least"]), _made(result)
    charts = []
    for key, label, value_of in (
        ("time", f"milliseconds {batch}", _time),
        ("size", "megabytes", lambda row: ratio(row.get("bytes"), 1e6)),
    ):
        dots = [_dot(row, value_of(row) or 0.0, label, result) for row in rows]
        title = f"{metric} over {label}"
        limits = (value_of(first) or 0.0, least)
        chart = svg.scatter_chart(f"pareto-{key}", title, dots, x_label=label, y_label=metric, limits=limits)
        charts.append(html.titled(title, chart))
    caption = (
        "Every file that was made: further left is faster (smaller), higher is more exact. Dashed: the float file's "
        f"time or size, and the least {result['metric']} that --max-drop {result['options']['max_drop']:g} allows. "
        "Blue is the best one, grey the float file."
    )
    return html.figure(caption, html.panels(*charts))


def _dot(row: Json, x: float, label: str, result: Json) -> svg.Dot:
    css = "s1" if row["name"] == result["best"] else "s0" if row["name"] == "float" else "s2"
    places = 2 if result["points"] == 1 else 4
    said = f"{fixed(row['metric'], places)} at {significant(x)} {label}"
    return svg.Dot(x, float(row["metric"]), str(row["name"]), css, said)


def _table(result: Json) -> Markup:
    rows, first = result["files"], _time(_row(result, "float"))
    pick = next(index for index, row in enumerate(rows) if row["name"] == result["best"])
    batch = "an image" if result["batch_size"] == 1 else f"a batch of {fixed(result['batch_size'])}"
    heads = (
        "File", "What it is", "Profile", str(result["metric"]), "Points lost", "Near float", "Sites in float", "MB",
        f"ms {batch}", "Speed", "Where it lost",
    )  # fmt: skip
    note = (
        "All that was tried, in the order of promise. Speed: time of the float file over that of this one, in the "
        "fastest runtime that the gate has proved. Near float: how far outputs are from those of the float file."
    )
    if result["one_image"]:
        note += f" One validation image is {fixed(result['one_image'], 2)} points."
    return html.table(note, heads, [_cells(row, result, first) for row in rows], "lllrrlrrrrl", pick)


def _cells(row: Json, result: Json, first: float | None) -> list[object]:
    end = "best" if row["name"] == result["best"] else row["lost"]
    if row["state"] != "made":
        return [row["name"], row["said"], row["profile"], *["–"] * 7, end]
    own = _time(row)
    return [
        row["name"], row["said"], row["profile"], fixed(row["metric"], 2 if result["points"] == 1 else 4),
        fixed(row["drop"], 2), _near(row.get("near") or {}), fixed(len(row["lifted"])), megabytes(row["bytes"]),
        significant(own), significant(ratio(first, own), "×"), end,
    ]  # fmt: skip


def _near(values: Json) -> str:
    if "agreement" in values:
        return f"{fixed(values['agreement'], 2, '%')} same, KL {significant(values['kl'])} nats"
    return fixed(values.get("sqnr_db"), 1, " dB")


def _why(result: Json) -> list[Markup | None]:
    told = [row for row in result["files"] if row.get("explain")]
    best = [row for row in told if row["name"] == result["best"]]
    others = [html.details(f"{row['name']}", why_part(row["explain"])) for row in told if row not in best]
    return [*(why_part(row["explain"], str(row["name"])) for row in best), *others]
