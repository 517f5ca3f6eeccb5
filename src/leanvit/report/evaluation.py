"""Sections of an evaluation of any task: metrics, classes and confusion, calibration, corrupted and shifted images."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.evaluation_charts import confusion_chart, reliability_chart
from leanvit.report.html import Section, join
from leanvit.report.metrics import Metric, metric_of, metrics_tables, names_of, title_of
from leanvit.report.run import Run
from leanvit.report.words import Json, accuracy_text, finite, fixed, interval, percent, significant

CLASSES_DRAWN = 20
CONFUSIONS_SHOWN = 20


def evaluation_sections(run: Run) -> list[Section]:
    """Every section, for every task; without content where it was not measured."""
    values = run.get("val")
    if not values:
        return []
    metric = metric_of(values)
    whole = (
        Section("evaluation", "Evaluation", _metrics(values, run))
        if "metrics" in values
        else Section("accuracy", "Accuracy", _accuracy(values))
    )
    return [
        whole,
        Section("classes", "Each class", _classes(values.get("classes") or [])),
        Section("confusion", "Confusion", _confusion(values)),
        Section("calibration", "Calibration", _calibration(values)),
        Section("corruptions", "Corrupted images", _corruptions(values, metric)),
        Section("shifts", "Shifted images", _shifts(values.get("shifts") or {})),
    ]


def _metrics(values: Json, run: Run) -> Markup:
    """All metrics of a task that has several."""
    names = names_of(run.files["val.json"].parent)
    facts = html.facts(
        [("Task", title_of(values.get("task"))), ("Model", values.get("model")), ("Data", values.get("data"))]
    )
    return join([facts, metrics_tables("val", values.get("metrics") or {}, values.get("metric"), names)])


def _accuracy(values: Json) -> Markup:
    speed = values.get("throughput") or {}
    bounds = interval(values.get("correct"), values.get("images"))
    threads = finite(speed.get("threads"))
    rate = significant(speed.get("images_per_second"), " images/s")
    told = [f"{rate} in this process, batch {fixed(speed.get('batch_size'))}"]
    told += [f"{fixed(threads)} thread{'s' * (threads != 1)}"] if threads is not None else []
    told += ["simulated, so it says nothing of the speed of low bits"] if speed.get("simulated") else []
    left_out = len(values.get("left_out") or [])
    limit = finite(values.get("limit"))
    drawn = "" if limit is None else f", {fixed(limit)} images drawn by seed {fixed(values.get('seed'))}"
    unfinished = values.get("complete") is False
    return html.facts(
        [
            ("Model", f"{values.get('model')}: {values.get('kind')}, {values.get('architecture')}"),
            ("Data", f"{values.get('data')}, {values.get('split')}{drawn}"),
            ("Left out", f"{left_out} images that could not be read" if left_out else None),
            ("Top-1", accuracy_text(values)),
            ("95% interval", None if bounds is None else f"{bounds[0]:.1f}% to {bounds[1]:.1f}%"),
            ("Top-5", fixed(values.get("top5"), 2, "%")),
            ("Mean over classes", fixed(values.get("balanced_accuracy"), 2, "%")),
            ("Cross-entropy", fixed(values.get("loss"), 4, " nats")),
            ("Computed in", values.get("runtime")),
            ("Throughput", ", ".join(told) if speed else None),
            ("State", "interrupted: not all that was asked for is measured" if unfinished else None),
        ]
    )


def _classes(classes: Sequence[Json]) -> Markup | None:
    if not classes:
        return None
    known = [entry for entry in classes if finite(entry.get("recall")) is not None]
    worst = sorted(known, key=lambda entry: finite(entry.get("recall")) or 0.0)[:CLASSES_DRAWN]
    drawn = classes if len(classes) <= CLASSES_DRAWN else worst
    bars = [_recall_bar(entry) for entry in drawn]
    which = "" if drawn is classes else f" The {len(drawn)} worst of {len(classes)} classes; the table has all."
    caption = f"Recall: share of a class's images that are called by its name.{which}"
    rows = [
        [entry["name"], fixed(entry.get("images")), fixed(entry.get("predicted")), fixed(entry.get("correct")),
         fixed(entry.get("recall"), 2), fixed(entry.get("precision"), 2)]
        for entry in classes
    ]  # fmt: skip
    heads = ("Class", "Images", "Predicted", "Correct", "Recall, %", "Precision, %")
    note = (
        "Each class. Precision: share of the images called so that are of it. A dash where there is nothing to count."
    )
    chart = svg.bar_chart("recall", "Recall of each class", bars, "recall (%)")
    table = html.table(note, heads, rows, "lrrrrr")
    return join([html.figure(caption, html.panels(html.titled("Recall", chart))), html.details("Numbers", table)])


def _recall_bar(entry: Json) -> svg.Row:
    name = f"{entry['name']}, {fixed(entry.get('images'))} images"
    return svg.Row(name, finite(entry.get("recall")), fixed(entry.get("recall"), 1, "%"))


def _confusion(values: Json) -> Markup | None:
    cells = [(int(true), int(called), int(images)) for true, called, images in values.get("confusion") or []]
    names = [str(entry["name"]) for entry in values.get("classes") or []]
    if not cells or len(names) < 2:
        return None
    parts = []
    if len(names) <= CLASSES_DRAWN:
        caption = (
            "Rows are true classes, columns what they are called, by number. Cells say how many percent of the row; "
            "blue is right, orange wrong."
        )
        parts.append(html.figure(caption, html.panels(confusion_chart(names, cells))))
    totals = [finite(entry.get("images")) for entry in values["classes"]]
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])
    rows = [
        [names[true], names[called], fixed(images), fixed(percent(images, totals[true]), 1)]
        for true, called, images in wrong[:CONFUSIONS_SHOWN]
    ]
    if rows:
        note = f"The most frequent mistakes, {len(rows)} of {len(wrong)} pairs of classes that are confused."
        parts.append(html.table(note, ("True class", "Called", "Images", "Of its class, %"), rows, "llrr"))
    else:
        parts.append(html.paragraph("No image is called by a wrong name."))
    return join(parts)


def _calibration(values: Json) -> Markup | None:
    found = values.get("calibration") or {}
    bins = found.get("bins") or []
    if not bins:
        return None
    caption = (
        f"Reliability diagram of {len(bins)} bins of equal width: bars are the accuracy of the images in a bin, dots "
        "their mean confidence; on the dashed line both are equal, below it the model is too sure. Grey bars: share of "
        f"all images in the bin. Expected calibration error {fixed(found.get('ece'), 4)} (Guo et al. 2017)."
    )
    rows = [
        [f"{fixed(row.get('low'), 3)} to {fixed(row.get('high'), 3)}", fixed(row.get("images")),
         fixed(row.get("confidence"), 4), fixed(row.get("accuracy"), 4)]
        for row in bins
    ]  # fmt: skip
    table = html.table("Bins of confidence.", ("Confidence", "Images", "Mean confidence", "Accuracy"), rows, "lrrr")
    figure = html.figure(caption, html.panels(reliability_chart(bins)))
    return join([figure, html.details("Numbers of this figure", table)])


Levels = dict[tuple[str, int], float | None]


def _corruptions(values: Json, metric: Metric) -> Markup | None:
    found = values.get("corruptions") or {}
    rows: list[Json] = found.get("rows") or []
    if not rows:
        return None
    names = list(dict.fromkeys(str(row["name"]) for row in rows))
    severities = sorted({int(row["severity"]) for row in rows})
    levels = {(str(row["name"]), int(row["severity"])): finite(row.get(metric.key)) for row in rows}
    clean = finite(values.get(metric.key, (values.get("metrics") or {}).get(metric.key)))
    caption = (
        f"Accuracy on images corrupted as in {found.get('parameters')} (Hendrycks and Dietterich 2019), seed "
        f"{fixed(found.get('seed'))}; {metric.text(clean)} where they are as they are."
    )
    digits = metric.digits
    cells = [[_plain(name), *(fixed(levels.get((name, level)), digits) for level in severities)] for name in names]
    heads = ("Corruption", *(f"Severity {level}" for level in severities))
    note = f"{metric.title}{' in percent' * (metric.unit == '%')} on corrupted images."
    table = html.table(note, heads, cells, "l" + "r" * len(severities))
    legend = html.legend((("l1", "mean over the corruptions"), ("l2", "worst corruption")))
    panels = html.panels(
        _severity_curve(names, severities, levels, clean, metric), _corruption_bars(names, severities, levels, metric)
    )
    return join([html.figure(caption, legend, panels), table])


def _severity_curve(
    names: Sequence[str], severities: Sequence[int], levels: Levels, clean: float | None, metric: Metric
) -> Markup | None:
    columns = {level: [v for name in names if (v := levels.get((name, level))) is not None] for level in severities}
    # A severity that an interruption left half done would have the mean of other corruptions.
    whole = [(float(level), column) for level, column in columns.items() if len(column) == len(names)]
    whole = [*([] if clean is None else [(0.0, [clean])]), *whole]
    if not whole:
        return None
    worst = min if metric.higher_is_better else max
    lines = [
        svg.Line([(level, sum(column) / len(column)) for level, column in whole], "l1"),
        svg.Line([(level, worst(column)) for level, column in whole], "l2"),
    ]
    said = f"{metric.title} against severity for {len(names)} corruptions: mean and worst."
    title = f"{metric.title} against severity"
    chart = svg.line_chart("severity", title, said, lines, x_label="severity, 0: as it is", y_label=metric.label)
    return html.titled(title, chart)


def _corruption_bars(names: Sequence[str], severities: Sequence[int], levels: Levels, metric: Metric) -> Markup:
    bars = []
    for name in names:
        own = [v for level in severities if (v := levels.get((name, level))) is not None]
        average = sum(own) / len(own) if own else None
        bars.append(svg.Row(_plain(name), average, fixed(average, max(1, metric.digits - 1), metric.unit)))
    title = "Each corruption"
    chart = svg.bar_chart("corruption-bars", title, bars, f"{metric.label}, mean over its severities")
    return html.titled(title, chart)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _shifts(values: Json) -> Markup | None:
    rows = values.get("rows") or []
    if not rows:
        return None
    lines = []
    for key, css in (("consistency", "l1"), ("top1", "l2")):
        pairs = [(finite(row.get("distance")), finite(row.get(key))) for row in rows]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        lines += [svg.Line(points, css)] if points else []
    caption = (
        f"Images moved by whole pixels in eight directions, padding '{values.get('padding')}'. Consistency: share of "
        "pairs of shifts up to a distance whose predictions are equal (after Zhang 2019); top-1: at that distance."
    )
    title = "Consistency and accuracy against the shift"
    chart = None
    if lines:
        said = f"{title}: {len(rows)} distances."
        chart = svg.line_chart("shift", title, said, lines, x_label="shift (pixels)", y_label="percent")
    digits = {"distance": 0, "shifts": 0, "top1": 2, "agreement": 2, "consistency": 2}
    cells = [[fixed(row.get(key), count) for key, count in digits.items()] for row in rows]
    heads = ("Pixels", "Shifts", "Top-1, %", "As unshifted, %", "Consistency, %")
    legend = html.legend((("l1", "consistency"), ("l2", "top-1")))
    figure = html.figure(caption, legend, html.panels(html.titled(title, chart)))
    return join([figure, html.table("Shifted images.", heads, cells, "rrrrr")])
