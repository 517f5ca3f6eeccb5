"""Section Training: loss and metric over the epochs, and the metrics of the weights that are kept; for every task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.html import join
from leanvit.report.metrics import Metric, is_task, metric_of, metrics_tables, names_of, title_of
from leanvit.report.run import Run
from leanvit.report.words import Json, accuracy_text, duration, finite, fixed, ratio

HINTS_SHOWN = 300
"""More epochs than these have no texts over their points: each would be thinner than a pixel."""

_COLUMNS = {
    "epoch": ("Epoch", 0),
    "train_loss": ("Training loss", 4),
    "val_loss": ("Validation loss", 4),
    "loss_": ("", 4),  # the parts of the loss, by their own names
    "train_top1": ("Training %", 2),
    "val_top1": ("Validation %", 2),
    "metric": ("", 4),  # by its own name
    "lr": ("Learning rate", 6),
    "seconds": ("Seconds", 1),
    "cpu_seconds": ("CPU seconds", 1),
}
"""What a row of the history may hold, in the order of the table: heading, decimals."""


@dataclass(frozen=True)
class _Panel:
    """One chart. lines: (key in the history, class, name) of its curves, the one that is marked last."""

    key: str
    title: str
    label: str
    digits: int
    unit: str
    lines: tuple[tuple[str, str, str], ...]


def training_section(run: Run) -> Markup | None:
    """Loss and metric over the epochs, and every metric of the best one."""
    train = run.get("train")
    if not train:
        return None
    history = [row for row in train.get("history") or [] if finite(row.get("epoch")) is not None]
    best = best_row(history, metric_of(train))
    parts = [_facts(train, history, best)]
    if history:
        parts += [_figure(train, history, best), html.details(*_numbers(train, history))]
    if best.get("metrics"):
        folder = next(path.parent for path in run.files.values() if path.name == "train.json")
        of = f" of epoch {fixed(best['epoch'])}, whose weights are kept"
        parts.append(metrics_tables("train", best["metrics"], train.get("metric"), names_of(folder), of))
    return join([*parts, _problems(train.get("problems") or [])])


def best_row(history: Sequence[Json], metric: Metric) -> Json:
    """The epoch whose weights are kept: that of the best metric, of equal ones the smallest loss, of those the first;
    empty where none was validated."""
    rows = [row for row in history if _value(row) is not None]
    sign = 1.0 if metric.higher_is_better else -1.0
    return max(rows, key=lambda row: (sign * (_value(row) or 0.0), -_loss(row)), default={})


def _value(row: Json) -> float | None:
    return finite(row.get("metric", row.get("val_top1")))


def _loss(row: Json) -> float:
    loss = finite(row.get("val_loss"))
    return math.inf if loss is None else loss


def _facts(train: Json, history: Sequence[Json], best: Json) -> Markup:
    seconds = sum(finite(row.get("seconds")) or 0.0 for row in history)
    spent = fixed(ratio(train.get("cpu_seconds"), 60), 1)
    noun = "images" if "train_images" in train else "pictures"
    sizes = [fixed(train.get(f"{split}_{noun}")) for split in ("train", "val")]
    left_out = sum(len(names) for names in (train.get("left_out") or {}).values())
    head = " with the head" if is_task(train) else ""
    return html.facts(
        [
            ("Task", title_of(train["task"]) if is_task(train) else None),
            ("Architecture", f"{train.get('architecture')}, {fixed(train.get('parameters'))} parameters{head}"),
            ("Data", f"{train.get('data')}: {sizes[0]} {noun} to train on, {sizes[1]} to validate"),
            ("Left out", f"{left_out} images that could not be read" if left_out else None),
            ("Best weights", _reached(train, best)),
            ("CPU time", f"{spent} minutes of all threads, training and validation" if spent != "–" else None),
            ("Training time", f"{duration(seconds)} for {len(history)} epochs" if history else None),
            ("Computed on", f"{train.get('device')}, autocast {train.get('autocast')}, seed {train.get('seed')}"),
        ]
    )


def _reached(train: Json, best: Json) -> str | None:
    counted = train.get("best")
    if isinstance(counted, dict) and counted:
        return f"{accuracy_text(counted)}, loss {fixed(counted.get('loss'), 3)}"
    if not is_task(train):
        return None
    if not best:
        return "no epoch was validated"
    return f"{train.get('metric')} {fixed(best.get('metric'), 4)} at epoch {fixed(best.get('epoch'))}"


def _panels(train: Json, history: Sequence[Json]) -> tuple[_Panel, _Panel]:
    both = any("val_loss" in row for row in history)
    name = "cross-entropy loss (nats)" if both else "training loss"
    loss = _Panel("loss", "Loss over the epochs", name, 3 if both else 4, "", _curves("loss"))
    metric = metric_of(train)
    if any("metric" in row for row in history):
        lines = (("metric", "l1", "validation"),)
        return loss, _Panel("metric", f"{metric.name} over the epochs", f"{metric.name}, validation", 4, "", lines)
    return loss, _Panel("top1", "Accuracy over the epochs", "accuracy (%)", 2, "%", _curves("top1"))


def _curves(key: str) -> tuple[tuple[str, str, str], ...]:
    return ((f"train_{key}", "l2", "training"), (f"val_{key}", "l1", "validation"))


def _figure(train: Json, history: Sequence[Json], best: Json) -> Markup:
    parts = any(key.startswith("loss_") for row in history for key in row)
    smoothed = any("val_loss" in row for row in history)
    what = "accuracy" if metric_of(train).unit == "%" else "metric"
    caption = f"Loss and {what} over the epochs"
    caption += f"; the ring marks epoch {fixed(best['epoch'])}, whose weights are kept. " if best else ". "
    caption += "Training values are of augmented images"
    caption += ", with label smoothing where it is set, and so may be the worse ones" if smoothed else ""
    caption += ", the loss is summed over its parts" if parts else ""
    charts = [_chart(panel, history, best) for panel in _panels(train, history)]
    return html.figure(f"{caption}.", html.legend((("l1", "validation"), ("l2", "training"))), html.panels(*charts))


def _chart(panel: _Panel, history: Sequence[Json], best: Json) -> Markup | None:
    curves = []
    for key, css, _ in panel.lines:
        pairs = [(finite(row["epoch"]), finite(row.get(key))) for row in history]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        curves += [svg.Line(points, css)] if points else []
    if not curves:
        return None
    kept = finite(best.get(panel.lines[-1][0]))
    text = f"{fixed(kept, panel.digits, panel.unit)} at epoch {fixed(best.get('epoch'))}"
    mark = None if kept is None else (float(best["epoch"]), kept, text)
    hints = [_hint(panel, row) for row in history] if len(history) <= HINTS_SHOWN else []
    of = " of training and validation" if len(curves) > 1 else ""
    said = f"{panel.label}{of} over {len(history)} epochs"
    said += "." if mark is None else f"; the kept weights have {text}."
    return svg.line_chart(
        f"curve-{panel.key}", panel.title, said, curves, x_label="epoch", y_label=panel.label, mark=mark, hints=hints
    )


def _hint(panel: _Panel, row: Json) -> tuple[float, str]:
    values = [f"{name} {fixed(row.get(key), panel.digits, panel.unit)}" for key, _, name in panel.lines if key in row]
    return float(row["epoch"]), f"epoch {fixed(row['epoch'])}: {', '.join(values)}"


def _numbers(train: Json, history: Sequence[Json]) -> tuple[str, Markup]:
    """Name and table of all that the history holds."""
    held = list(dict.fromkeys(key for row in history for key in row))
    heads: list[str] = []
    digits: dict[str, int] = {}
    for column, (head, places) in _COLUMNS.items():
        for key in held:
            if key == column or (column == "loss_" and key.startswith(column)):
                heads.append(head or (metric_of(train).name if key == "metric" else key.removeprefix(column)))
                digits[key] = places
    rows = [[fixed(row.get(key), places) for key, places in digits.items()] for row in history]
    parts = ", with the parts of the loss" if any(key.startswith("loss_") for key in held) else ""
    table = html.table("History of the training.", heads, rows, "r" * len(heads))
    return f"Numbers of this figure{parts}", table


def _problems(problems: Sequence[object]) -> Markup | None:
    if not problems:
        return None
    return html.details(f"Annotations that were left out: {len(problems)} are named here", html.bullets(problems))
