"""Metrics of a task: what each says, and those of every class or keypoint as bars."""

from __future__ import annotations

from typing import Any

from leanvit.report import svg
from leanvit.report.run import Json, Run
from leanvit.report.svg import Markup, fixed, join
from leanvit.report.task_words import TASKS, Names, counts_of, meaning_of, names_of, numbers_of, tables_of

BARS = 30


def task_evaluation_section(run: Run) -> Markup | None:
    """The metrics that `leanvit val` measured."""
    values = run.get("val")
    metrics = values.get("metrics") or {}
    folder = run.files["val.json"].parent
    facts = svg.facts(
        [
            ("Task", TASKS.get(str(values.get("task")), values.get("task"))),
            ("Model", values.get("model")),
            ("Data", values.get("data")),
        ]
    )
    return join([facts, metrics_of("val", metrics, values.get("metric"), names_of(folder))])


def metrics_of(key: str, metrics: Json, main: Any, names: Names, of: str = "") -> Markup:
    """Table and bars of a set of metrics. key: begins the names of charts. main: metric to point out.

    of: what the metrics are of, ends the captions.
    """
    numbers = numbers_of(metrics)
    rows = [[name, meaning_of(name), fixed(value, 4)] for name, value in numbers.items()]
    counts = counts_of(metrics)
    caption = f"Metrics{of}, from 0 to 1{f', over {counts}' if counts else ''}. A dash: there was none of this kind."
    pick = list(numbers).index(main) if main in numbers else -1
    table = svg.table(caption, ("Metric", "What it is", "Value"), rows, "llr", pick)
    return join([table if rows else None, _each(key, metrics, names, of)])


def _each(key: str, metrics: Json, names: Names, of: str) -> Markup | None:
    tables = tables_of(metrics, names)
    if not tables:
        return None
    charts, told = [], []
    for number, (title, values) in enumerate(tables.items()):
        shown = list(values)
        if len(shown) > BARS:
            ordered = sorted(values, key=lambda name: -(values[name] or 0.0))
            shown = [*ordered[: BARS // 2], *ordered[-BARS // 2 :]]
        bars = [svg.Row(name, values[name], _text(values[name])) for name in shown]
        charts.append(svg.tag("div", svg.tag("h4", title), svg.bar_chart(f"{key}-each-{number}", title, bars, title)))
        told += [[title, name, fixed(value, 4)] for name, value in values.items()]
    cut = any(len(values) > BARS for values in tables.values())
    ends = f"; where there are many, the {BARS // 2} best and {BARS // 2} worst" if cut else ""
    caption = f"Each class or keypoint{of}, longer is better{ends}."
    table = svg.table("Numbers of every class and keypoint.", ("Metric", "Of", "Value"), told, "llr")
    return join([svg.figure(caption, svg.panels(*charts)), svg.details("Numbers of this figure", table)])


def _text(value: float | None) -> str:
    return "not measured" if value is None else fixed(value, 3)
