"""Section Training of a task: loss and metric over the epochs, and the metrics of the weights that are kept."""

from __future__ import annotations

from collections.abc import Sequence

from leanvit.report import svg
from leanvit.report.run import Json, Run
from leanvit.report.svg import Markup, finite, fixed, join
from leanvit.report.task_evaluation import metrics_of
from leanvit.report.task_words import TASKS, best_row, names_of
from leanvit.report.words import duration, ratio


def task_training_section(run: Run) -> Markup | None:
    """Loss and metric over the epochs, and every metric of the best one."""
    train = run.get("train")
    history = [row for row in train.get("history") or [] if finite(row.get("epoch")) is not None]
    best, name = best_row(history), str(train.get("metric"))
    folder = next(path.parent for path in run.files.values() if path.name == "train.json")
    parts = [_facts(train, history, best)]
    if history:
        parts.append(_curves(history, best, name))
    if best:
        of = f" of epoch {fixed(best['epoch'])}, whose weights are kept"
        parts.append(metrics_of("train", best.get("metrics") or {}, name, names_of(folder), of))
    return join([*parts, _problems(train.get("problems") or [])])


def _facts(train: Json, history: Sequence[Json], best: Json) -> Markup:
    seconds = sum(finite(row.get("seconds")) or 0.0 for row in history)
    spent = fixed(ratio(train.get("cpu_seconds"), 60), 1)
    pictures = [fixed(train.get(f"{split}_pictures")) for split in ("train", "val")]
    reached = f"{train.get('metric')} {fixed(best.get('metric'), 4)} at epoch {fixed(best.get('epoch'))}"
    return svg.facts(
        [
            ("Task", TASKS.get(str(train.get("task")), train.get("task"))),
            ("Architecture", f"{train.get('architecture')}, {fixed(train.get('parameters'))} parameters with the head"),
            ("Data", f"{train.get('data')}: {pictures[0]} pictures to train on, {pictures[1]} to validate"),
            ("Best weights", reached if best else "no epoch was validated"),
            ("CPU time", f"{spent} minutes of all threads, training and validation" if spent != "–" else None),
            ("Time", f"{duration(seconds)} for {len(history)} epochs" if history else None),
            ("Computed on", f"{train.get('device')}, autocast {train.get('autocast')}, seed {train.get('seed')}"),
        ]
    )


def _curves(history: Sequence[Json], best: Json, name: str) -> Markup:
    caption = "Training loss (of augmented pictures, summed over its parts) and metric of the validation pictures."
    caption += f" The ring marks epoch {fixed(best['epoch'])}, whose weights are kept." if best else ""
    text = f"{fixed(best.get('metric'), 4)} at epoch {fixed(best.get('epoch'))}"
    mark = (float(best["epoch"]), float(best["metric"]), text) if best else None
    charts = (
        _curve(history, "train_loss", "Training loss over the epochs", "training loss", "l2", None),
        _curve(history, "metric", f"{name} over the epochs", f"{name}, validation", "l1", mark),
    )
    losses = list(dict.fromkeys(key for row in history for key in row if key.startswith("loss_")))
    heads = ["Epoch", "Training loss", *(key.removeprefix("loss_") for key in losses), name, "Learning rate", "Seconds"]
    digits = {"epoch": 0, "train_loss": 4, **dict.fromkeys(losses, 4), "metric": 4, "lr": 6, "seconds": 1}
    digits["cpu_seconds"] = 1
    rows = [[fixed(row.get(key), places) for key, places in digits.items()] for row in history]
    table = svg.table("History of the training.", [*heads, "CPU seconds"], rows, "r" * len(digits))
    figure = svg.figure(caption, svg.panels(*charts))
    return join([figure, svg.details("Numbers of this figure, with the parts of the loss", table)])


def _curve(
    history: Sequence[Json], key: str, title: str, label: str, css: str, mark: tuple[float, float, str] | None
) -> Markup | None:
    pairs = [(finite(row["epoch"]), finite(row.get(key))) for row in history]
    points = [(x, y) for x, y in pairs if x is not None and y is not None]
    if not points:
        return None
    hints = [(x, f"epoch {fixed(x)}: {fixed(y, 4)}") for x, y in points] if len(points) <= 300 else []
    said = f"{label} over {len(points)} epochs, from {fixed(points[0][1], 4)} to {fixed(points[-1][1], 4)}."
    return svg.line_chart(
        f"curve-{key}", title, said, [svg.Line(points, css)], x_label="epoch", y_label=label, mark=mark, hints=hints
    )


def _problems(problems: Sequence[object]) -> Markup | None:
    if not problems:
        return None
    words = svg.tag("ul", *(svg.tag("li", problem) for problem in problems))
    return svg.details(f"Annotations that were left out: {len(problems)} are named here", words)
