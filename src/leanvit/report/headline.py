"""What stands above the sections: the result in one sentence, and its numbers in large type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanvit.report.gate import count_checks
from leanvit.report.run import Json, Run
from leanvit.report.svg import Markup, finite, fixed, significant, tag
from leanvit.report.task_words import task_cards
from leanvit.report.words import accuracy_text, megabytes, ratio


def pick(rows: Sequence[Json]) -> int:
    """Index of the row that the page is about: the smallest model that really runs, after the reference."""
    real = [i for i, row in enumerate(rows) if i and not row.get("simulated") and finite(row.get("bytes"))]
    return min(real, key=lambda i: float(rows[i]["bytes"]), default=0)


def lead(run: Run) -> Markup | None:
    """The row that the page is about against the reference, in one sentence."""
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
    return tag("p", text + (f", with {' and '.join(gains)}." if gains else "."), class_="lead")


def cards(run: Run) -> Markup | None:
    """Headline numbers: (name, value, unit, what to compare it with)."""
    rows = run.get("demo").get("table") or []
    cards = _result_cards(rows) if rows else _part_cards(run)
    if checks := run.get("verify").get("checks"):
        state = "passed" if run.get("verify").get("passed") else "failed"
        cards.append(("Verification gate", state, "", count_checks(checks)))
    boxes = []
    for name, value, unit, why in cards:
        number = tag("dd", value, tag("small", unit) if unit else None, class_="big")
        boxes.append(tag("div", tag("dt", name), number, tag("dd", why, class_="why"), class_="card"))
    return tag("dl", *boxes, class_="cards") if boxes else None


def _result_cards(rows: Sequence[Json]) -> list[tuple[str, str, str, str]]:
    row, first = rows[pick(rows)], rows[0]

    def card(name: str, key: str, unit: str, show: Any) -> tuple[str, str, str, str]:
        return name, show(row.get(key)), unit, f"{first['name']}: {show(first.get(key))} {unit}".rstrip()

    cards = [
        card("Accuracy", "accuracy", "", lambda value: fixed(value, 2, "%")),
        card("Size", "bytes", "MB", megabytes),
        card("Latency, one image", "latency_ms", "ms", significant),
        card("Throughput", "throughput", "images/s", significant),
    ]
    return [card for card in cards if card[1] != "–"]


def _part_cards(run: Run) -> list[tuple[str, str, str, str]]:
    train, manifest = run.get("train"), run.get("bundle")
    parameters = ratio(train.get("parameters"), 1e6)
    measured = [("Best accuracy", train.get("best")), ("Accuracy in the runtime", manifest.get("accuracy"))]
    measured.append(("Accuracy", run.get("val")))
    measured += [(f"Accuracy, {name}, simulated", report.get("accuracy")) for name, report in run.quantized.items()]
    cards = [("Parameters", significant(parameters), "million", str(train.get("architecture")))]
    for name, values in measured:
        number, _, counts = accuracy_text(values or {}).partition(" (")
        cards.append((name, number, "", counts.rstrip(")")))
    cards += task_cards(run)
    for name, report in run.quantized.items():
        share = ratio(report.get("quantized_bytes"), report.get("float_bytes"))
        why = "" if share is None else f"{100 * share:.0f}% of float32"
        cards.append((f"Weights, {name}", megabytes(report.get("quantized_bytes")), "MB", why))
    return [card for card in cards if card[1] != "–"]
