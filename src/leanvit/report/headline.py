"""What stands above the sections: the result in one sentence, and its numbers in large type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leanvit.report import html
from leanvit.report.gate import count_checks
from leanvit.report.html import Card
from leanvit.report.metrics import change_in_points, counts_of, is_task, metric_of
from leanvit.report.optimize import optimize_cards, optimize_lead
from leanvit.report.run import Run
from leanvit.report.training import best_row
from leanvit.report.words import Json, accuracy_text, finite, fixed, megabytes, ratio, significant


def pick(rows: Sequence[Json]) -> int:
    """Index of the row that the page is about: the smallest model that really runs, after the reference."""
    real = [i for i, row in enumerate(rows) if i and not row.get("simulated") and finite(row.get("bytes"))]
    return min(real, key=lambda i: float(rows[i]["bytes"]), default=0)


def lead(run: Run) -> Markup | None:
    """The row that the page is about against the reference, in one sentence."""
    if optimized := run.get("optimize"):
        return optimize_lead(optimized)
    rows = run.get("demo").get("table") or []
    if not rows or not pick(rows):
        return None
    row, first = rows[pick(rows)], rows[0]
    text = f"{row['name']}: {fixed(row.get('accuracy'), 2, '%')} of {fixed(row.get('images'))} images correct"
    a, b = finite(row.get("accuracy")), finite(first.get("accuracy"))
    if a is not None and b is not None:
        text += f", {a - b:+.2f} points".replace("-", "−") + f" against {first['name']}"
    size, speed = (ratio(row.get(key), first.get(key)) for key in ("bytes", "throughput"))
    gains = [f"{100 * size:.0f}% of its size"] if size else []
    gains += [f"{significant(speed)} times its throughput"] if speed else []
    return html.paragraph(text + (f", with {' and '.join(gains)}." if gains else "."), css="lead")


def cards(run: Run) -> Markup | None:
    """Headline numbers."""
    rows = run.get("demo").get("table") or []
    optimized = run.get("optimize")
    found = optimize_cards(optimized) if optimized else _result_cards(rows) if rows else _part_cards(run)
    if checks := run.get("verify").get("checks"):
        state = "passed" if run.get("verify").get("passed") else "failed"
        found.append(Card("Verification gate", state, "", count_checks(checks)))
    return html.cards(found)


def _result_cards(rows: Sequence[Json]) -> list[Card]:
    row, first = rows[pick(rows)], rows[0]

    def card(name: str, key: str, unit: str, show: Any) -> Card:
        return Card(name, show(row.get(key)), unit, f"{first['name']}: {show(first.get(key))} {unit}".rstrip())

    cards = [
        card("Accuracy", "accuracy", "", lambda value: fixed(value, 2, "%")),
        card("Size", "bytes", "MB", megabytes),
        card("Latency, one image", "latency_ms", "ms", significant),
        card("Throughput", "throughput", "images/s", significant),
    ]
    return [card for card in cards if card.value != "–"]


def _part_cards(run: Run) -> list[Card]:
    train, manifest = run.get("train"), run.get("bundle")
    parameters = ratio(train.get("parameters"), 1e6)
    measured = [("Best accuracy", train.get("best")), ("Accuracy in the runtime", manifest.get("accuracy"))]
    measured.append(("Accuracy", run.get("val")))
    measured += [(f"Accuracy, {name}, simulated", report.get("accuracy")) for name, report in run.quantized.items()]
    cards = [Card("Parameters", significant(parameters), "million", str(train.get("architecture")))]
    for name, values in measured:
        number, _, counts = accuracy_text(values or {}).partition(" (")
        cards.append(Card(name, number, "", counts.rstrip(")")))
    cards += _metric_cards(run)
    for name, report in run.quantized.items():
        share = ratio(report.get("quantized_bytes"), report.get("float_bytes"))
        why = "" if share is None else f"{100 * share:.0f}% of float32"
        cards.append(Card(f"Weights, {name}", megabytes(report.get("quantized_bytes")), "MB", why))
    return [card for card in cards if card.value != "–"]


def _metric_cards(run: Run) -> list[Card]:
    """The metric of a task's training, evaluation, quantized networks and bundle."""
    cards, train, accuracy, val = [], run.get("train"), run.get("bundle").get("accuracy") or {}, run.get("val")
    if is_task(train):
        history = train.get("history") or []
        best = best_row(history, metric_of(train))
        spent = ratio(train.get("cpu_seconds"), 60)
        told = f"epoch {fixed(best.get('epoch'))}, {counts_of(best.get('metrics') or {})}"
        cards.append(Card(f"Best {train.get('metric')}", fixed(best.get("metric"), 4), "", told))
        cards.append(Card("Training", fixed(spent, 1), "CPU-minutes", f"{len(history)} epochs"))
    if is_task(val):
        metrics = val.get("metrics") or {}
        cards.append(Card(str(val.get("metric")), fixed(metrics.get(val.get("metric")), 4), "", counts_of(metrics)))
    for name, report in run.quantized.items():
        if not is_task(report):
            continue
        before, after = ((report.get(key) or {}).get(report.get("metric")) for key in ("float_metrics", "metrics"))
        told = f"float {fixed(before, 4)}, {change_in_points(before, after)} points"
        cards.append(Card(f"{report.get('metric')}, {name}, simulated", fixed(after, 4), "", told))
    if is_task(run.get("bundle")):
        told = f"measured in {accuracy.get('runtime')}"
        cards.append(Card(f"{accuracy.get('metric')} in the runtime", fixed(accuracy.get("value"), 4), "", told))
    return cards
