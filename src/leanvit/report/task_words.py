"""Tasks beside classification: their metrics in words, the names behind lists, and the numbers above the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanvit.report.run import Json, Run
from leanvit.report.svg import finite, fixed
from leanvit.report.words import ratio
from leanvit.runtime.task_of import CLASSIFY, description_of

TASKS = {
    "detect": "detection",
    "segment": "instance segmentation",
    "semantic": "semantic segmentation",
    "pose": "pose",
}
_KINDS = {"box_": "boxes", "mask_": "masks", "oks_": "keypoints, by their similarity (OKS)"}
# COCO's summary: https://cocodataset.org/#detection-eval.
_MEANINGS = {
    "AP": "average precision, mean over overlaps from 0.50 to 0.95",
    "AP50": "average precision at overlap 0.50",
    "AP75": "average precision at overlap 0.75",
    "APs": "AP of objects below 32² pixels",
    "APm": "AP of objects from 32² to 96² pixels",
    "APl": "AP of objects above 96² pixels",
    "AR100": "recall with at most 100 objects a picture",
    "AR20": "recall with at most 20 objects a picture",
    "miou": "intersection over union, mean over the classes",
    "pixel_accuracy": "share of pixels with the right class",
    "mean_accuracy": "share of pixels with the right class, mean over the true classes",
    "pck@0.1": "keypoints at most 0.1 of the object's longer side away from the truth",
}
_COUNTS = ("pictures", "objects")


@dataclass(frozen=True)
class Names:
    """labels: of the classes. keypoints: of the keypoints. Both empty where no file tells them."""

    labels: tuple[str, ...] = ()
    keypoints: tuple[str, ...] = ()


def is_task(values: Json) -> bool:
    """Whether a file is of another task than classification."""
    return str(values.get("task", CLASSIFY)) != CLASSIFY


def names_of(folder: Path) -> Names:
    """Names of classes and keypoints, as the checkpoint, quantized network or bundle in a folder tells them."""
    found = description_of(folder)
    keypoints = found.get("keypoints") or (found.get("answers") or {}).get("keypoints") or {}
    return Names(tuple(map(str, found.get("labels") or ())), tuple(map(str, keypoints.get("names") or ())))


def numbers_of(metrics: Json) -> dict[str, Any]:
    """The metrics that are one number, None where there was nothing to measure."""
    return {
        key: value for key, value in metrics.items() if not isinstance(value, dict | list) and key not in _COUNTS
    }  # fmt: skip


def counts_of(metrics: Json) -> str:
    """'500 pictures', empty where it is not told."""
    return ", ".join(f"{fixed(metrics[key])} {key}" for key in _COUNTS if key in metrics)


def meaning_of(key: str) -> str:
    """What a metric says, empty for one that is not known."""
    for prefix, kind in _KINDS.items():
        if key.startswith(prefix) and key.removeprefix(prefix) in _MEANINGS:
            return f"{kind}: {_MEANINGS[key.removeprefix(prefix)]}"
    return _MEANINGS.get(key, "")


def tables_of(metrics: Json, names: Names) -> dict[str, dict[str, float | None]]:
    """{what it is: {class or keypoint: value}} of every metric that has a value for each."""
    titles = {
        "box_per_class": ("AP50 of boxes", names.labels),
        "mask_per_class": ("AP50 of masks", names.labels),
        "per_class": ("Intersection over union", names.labels),
        "pck_per_keypoint": ("Share of correct keypoints (PCK@0.1)", names.keypoints),
        "oks_per_class": ("AP50 of keypoints (OKS)", names.labels),
    }
    return {title: _named(metrics[key], known) for key, (title, known) in titles.items() if metrics.get(key)}


def _named(values: Any, names: tuple[str, ...]) -> dict[str, float | None]:
    if isinstance(values, Mapping):
        return {str(name): finite(value) for name, value in values.items()}
    known = names if len(names) == len(values) else tuple(str(i) for i in range(len(values)))
    return {name: finite(value) for name, value in zip(known, values, strict=True)}


def best_row(history: list[Json]) -> Json:
    """The epoch whose weights are kept: the first with the largest metric; empty where none was validated."""
    return max(
        (row for row in history if finite(row.get("metric")) is not None), key=lambda row: row["metric"], default={}
    )


def metric_text(accuracy: Json) -> str:
    """'mask_AP50 0.5391 on data, float 0.5420' of a bundle."""
    text = f"{accuracy.get('metric')} {fixed(accuracy.get('value'), 4)} on {accuracy.get('data')}"
    before = finite(accuracy.get("float"))
    return text if before is None else f"{text}, float {before:.4f}"


def points(before: Any, after: Any) -> str:
    """How much a share changed, in points with a sign."""
    a, b = finite(before), finite(after)
    return "–" if a is None or b is None else f"{100 * (b - a):+.2f}".replace("-", "−")


def task_cards(run: Run) -> list[tuple[str, str, str, str]]:
    """Headline numbers: (name, value, unit, what to compare it with)."""
    cards, train, accuracy, val = [], run.get("train"), run.get("bundle").get("accuracy") or {}, run.get("val")
    if is_task(train):
        best = best_row(train.get("history") or [])
        spent = ratio(train.get("cpu_seconds"), 60)
        told = f"epoch {fixed(best.get('epoch'))}, {counts_of(best.get('metrics') or {})}"
        cards.append((f"Best {train.get('metric')}", fixed(best.get("metric"), 4), "", told))
        cards.append(("Training", fixed(spent, 1), "CPU-minutes", f"{len(train.get('history') or [])} epochs"))
    if is_task(val):
        metrics = val.get("metrics") or {}
        cards.append((str(val.get("metric")), fixed(metrics.get(val.get("metric")), 4), "", counts_of(metrics)))
    for name, report in run.quantized.items():
        if not is_task(report):
            continue
        before, after = ((report.get(key) or {}).get(report.get("metric")) for key in ("float_metrics", "metrics"))
        told = f"float {fixed(before, 4)}, {points(before, after)} points"
        cards.append((f"{report.get('metric')}, {name}, simulated", fixed(after, 4), "", told))
    if is_task(run.get("bundle")):
        told = f"measured in {accuracy.get('runtime')}"
        cards.append((f"{accuracy.get('metric')} in the runtime", fixed(accuracy.get("value"), 4), "", told))
    return cards
