"""Metrics of every task: how each is written, what it says, tables and bars of a set of them.

The tasks are the rows of leanvit.runtime.task.TASKS; a metric that is not known here is shown by its key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from leanvit.report import html, svg
from leanvit.report.html import join
from leanvit.report.words import Json, finite, fixed
from leanvit.runtime.task_of import CLASSIFY, description_of

if TYPE_CHECKING:
    from leanvit.runtime.task import Task

BARS_SHOWN = 30
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
    "mAP": "average precision, mean over the labels",
    "f1": "harmonic mean of precision and recall over all decisions at a probability of 0.5",
    "knn_top1": "images that a vote of their 10 nearest others calls by their label",
    "nearest_top1": "images whose nearest other one has their label",
    "pixel_accuracy": "share of pixels with the right class",
    "mean_accuracy": "share of pixels with the right class, mean over the true classes",
    "pck@0.1": "keypoints at most 0.1 of the object's longer side away from the truth",
}
_COUNTS = ("pictures", "images", "objects")


@dataclass(frozen=True)
class Names:
    """labels: of the classes. keypoints: of the keypoints. Both empty where no file tells them."""

    labels: tuple[str, ...] = ()
    keypoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Metric:
    """How the metric of a file is written. key: in the file. name: in words. digits, unit: of its values.

    higher_is_better: whether more of it is better.
    """

    key: str
    name: str
    digits: int
    unit: str = ""
    higher_is_better: bool = True

    def text(self, value: Any) -> str:
        """A value from JSON, a dash where there is none."""
        return fixed(value, self.digits, self.unit)

    @property
    def title(self) -> str:
        """The name as a sentence begins with it; keys stay as they are."""
        return self.name.capitalize() if self.name != self.key else self.key

    @property
    def label(self) -> str:
        """Name of an axis."""
        return f"{self.name} (%)" if self.unit == "%" else self.name


def _task(name: object) -> Task | None:
    from leanvit.runtime.task import TASKS  # here, because it loads Pillow, which most pages need not

    return TASKS.get(str(name))


def metric_of(values: Json) -> Metric:
    """The metric by which a file's task is judged: top-1 in percent, all others as shares."""
    task = _task(values.get("task", CLASSIFY))
    key = str(values.get("metric") or (task.metric if task else "metric"))
    percent = task is not None and task.points == 1
    better = task is None or task.higher_is_better
    return Metric(key, {"top1": "top-1"}.get(key, key), 2 if percent else 4, "%" if percent else "", better)


def is_task(values: Json) -> bool:
    """Whether a file is of another task than classification, whose files hold counts of right images beside it."""
    return str(values.get("task", CLASSIFY)) != CLASSIFY


def title_of(task: object) -> str:
    """A task in words: "instance segmentation"."""
    row = _task(task)
    return row.title if row is not None and row.title else str(task)


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


def bundle_metric_text(accuracy: Json) -> str:
    """'mask_AP50 0.5391 on data, float 0.5420' of a bundle."""
    text = f"{accuracy.get('metric')} {fixed(accuracy.get('value'), 4)} on {accuracy.get('data')}"
    before = finite(accuracy.get("float"))
    return text if before is None else f"{text}, float {before:.4f}"


def change_in_points(before: Any, after: Any) -> str:
    """How much a share changed, in points with a sign."""
    a, b = finite(before), finite(after)
    return "–" if a is None or b is None else f"{100 * (b - a):+.2f}".replace("-", "−")


def metrics_tables(key: str, metrics: Json, main: Any, names: Names, of: str = "") -> Markup:
    """Table and bars of a set of metrics. key: begins the names of charts. main: metric to point out.

    of: what the metrics are of, ends the captions.
    """
    numbers = numbers_of(metrics)
    rows = [[name, meaning_of(name), fixed(value, 4)] for name, value in numbers.items()]
    counts = counts_of(metrics)
    caption = f"Metrics{of}, from 0 to 1{f', over {counts}' if counts else ''}. A dash: there was none of this kind."
    pick = list(numbers).index(main) if main in numbers else -1
    table = html.table(caption, ("Metric", "What it is", "Value"), rows, "llr", pick)
    return join([table if rows else None, _each(key, metrics, names, of)])


def _each(key: str, metrics: Json, names: Names, of: str) -> Markup | None:
    """Metrics that have a value for each class or keypoint."""
    tables = _tables(metrics, names)
    if not tables:
        return None
    charts, told = [], []
    for number, (title, values) in enumerate(tables.items()):
        ordered = sorted(values, key=lambda name: -(values[name] or 0.0)) if len(values) > BARS_SHOWN else values
        bars = [svg.Row(name, values[name], _text(values[name])) for name in both_ends(list(ordered))]
        charts.append(html.titled(title, svg.bar_chart(f"{key}-each-{number}", title, bars, title)))
        told += [[title, name, fixed(value, 4)] for name, value in values.items()]
    cut = any(len(values) > BARS_SHOWN for values in tables.values())
    ends = f"; where there are many, the {BARS_SHOWN // 2} best and {BARS_SHOWN // 2} worst" if cut else ""
    caption = f"Each class or keypoint{of}, longer is better{ends}."
    table = html.table("Numbers of every class and keypoint.", ("Metric", "Of", "Value"), told, "llr")
    return join([html.figure(caption, html.panels(*charts)), html.details("Numbers of this figure", table)])


def both_ends(names: Sequence[str]) -> list[str]:
    """All of an ordered list of names, or the first and the last of it where it is too long for a chart."""
    half = BARS_SHOWN // 2
    return list(names) if len(names) <= BARS_SHOWN else [*names[:half], *names[-half:]]


def _text(value: float | None) -> str:
    return "not measured" if value is None else fixed(value, 3)


def _tables(metrics: Json, names: Names) -> dict[str, dict[str, float | None]]:
    """{what it is: {class or keypoint: value}} of every metric that has a value for each."""
    titles = {
        "box_per_class": ("AP50 of boxes", names.labels),
        "mask_per_class": ("AP50 of masks", names.labels),
        "per_class": ("Intersection over union", names.labels),
        "ap_per_class": ("Average precision", names.labels),
        "pck_per_keypoint": ("Share of correct keypoints (PCK@0.1)", names.keypoints),
        "oks_per_class": ("AP50 of keypoints (OKS)", names.labels),
    }
    return {title: _named(metrics[key], known) for key, (title, known) in titles.items() if metrics.get(key)}


def _named(values: Any, names: tuple[str, ...]) -> dict[str, float | None]:
    if isinstance(values, Mapping):
        return {str(name): finite(value) for name, value in values.items()}
    known = names if len(names) == len(values) else tuple(str(i) for i in range(len(values)))
    return {name: finite(value) for name, value in zip(known, values, strict=True)}
