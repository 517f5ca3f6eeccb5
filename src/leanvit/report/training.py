"""Section Training: loss and accuracy over the epochs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from leanvit.report import svg
from leanvit.report.run import Json, Run
from leanvit.report.svg import Markup, finite, fixed, join
from leanvit.report.words import accuracy_text, duration


def training_section(run: Run) -> Markup | None:
    """Loss and accuracy over the epochs."""
    train = run.get("train")
    if not train:
        return None
    history = [row for row in train.get("history") or [] if finite(row.get("epoch")) is not None]
    best, sizes = train.get("best") or {}, [fixed(train.get(f"{split}_images")) for split in ("train", "val")]
    left_out = sum(len(names) for names in (train.get("left_out") or {}).values())
    seconds = sum(finite(row.get("seconds")) or 0.0 for row in history)
    facts = svg.facts(
        [
            ("Architecture", f"{train.get('architecture')}, {fixed(train.get('parameters'))} parameters"),
            ("Data", f"{train.get('data')}: {sizes[0]} images to train on, {sizes[1]} to validate"),
            ("Left out", f"{left_out} images that could not be read" if left_out else None),
            ("Best weights", f"{accuracy_text(best)}, loss {fixed(best.get('loss'), 3)}" if best else None),
            ("Training time", f"{duration(seconds)} for {len(history)} epochs" if history else None),
            ("Computed on", f"{train.get('device')}, autocast {train.get('autocast')}, seed {train.get('seed')}"),
        ]
    )
    if not history:
        return facts
    top = max(history, key=lambda row: (finite(row.get("val_top1")) or 0.0, -(finite(row.get("val_loss")) or math.inf)))
    caption = (
        f"Loss and accuracy over the epochs; the ring marks epoch {fixed(top['epoch'])}, whose weights are kept. "
        "Training values are of augmented images, with label smoothing where it is set, and so may be the worse ones."
    )
    curves = (
        _curve("Loss over the epochs", history, top, "loss", "cross-entropy loss (nats)", 3),
        _curve("Accuracy over the epochs", history, top, "top1", "accuracy (%)", 2, "%"),
    )
    keys = {"epoch": 0, "train_loss": 4, "val_loss": 4, "train_top1": 2, "val_top1": 2, "lr": 6, "seconds": 1}
    heads = ("Epoch", "Training loss", "Validation loss", "Training %", "Validation %", "Learning rate", "Seconds")
    rows = [[fixed(row.get(key), digits) for key, digits in keys.items()] for row in history]
    return join(
        [
            facts,
            svg.figure(caption, svg.legend((("l1", "validation"), ("l2", "training"))), svg.panels(*curves)),
            svg.details("Numbers of this figure", svg.table("History of the training.", heads, rows, "rrrrrrr")),
        ]
    )


def _curve(
    title: str, history: Sequence[Json], top: Json, key: str, label: str, digits: int, unit: str = ""
) -> Markup | None:
    curves = []
    for part, css in (("train", "l2"), ("val", "l1")):
        pairs = [(finite(row["epoch"]), finite(row.get(f"{part}_{key}"))) for row in history]
        points = [(x, y) for x, y in pairs if x is not None and y is not None]
        curves += [svg.Line(points, css)] if points else []
    if not curves:
        return None
    hints = []
    for row in history if len(history) <= 300 else ():
        values = [fixed(row.get(f"{part}_{key}"), digits, unit) for part in ("train", "val")]
        hints.append(
            (float(row["epoch"]), f"epoch {fixed(row['epoch'])}: training {values[0]}, validation {values[1]}")
        )
    best = finite(top.get(f"val_{key}"))
    text = f"{fixed(best, digits, unit)} at epoch {fixed(top['epoch'])}"
    mark = None if best is None else (float(top["epoch"]), best, text)
    said = f"{label} of training and validation over {len(history)} epochs; the kept weights have {text}."
    return svg.line_chart(f"curve-{key}", title, said, curves, x_label="epoch", y_label=label, mark=mark, hints=hints)
