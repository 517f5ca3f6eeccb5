"""What a run of a sweep reached: the numbers of its own JSON result that do not depend on the machine's mood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from leanvit.errors import BundleError
from leanvit.files import read_json

Json = dict[str, Any]

RESULTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "train": ("train.json", ("best",)),
    "quantize": ("quantize.json", ("float_metrics", "metrics", "average_bits", "quantized_bytes")),
    "val": ("val.json", ("top1", "top5", "loss", "correct", "images", "balanced_accuracy", "metrics")),
    "optimize": ("optimize.json", ("best", "drop", "size")),
    "export": ("bundle.json", ("accuracy",)),
    "data inspect": ("inspect.json", ("duplicates",)),
}
"""Verb: its result, and the keys whose numbers are shown; those of a dict by their own names. Times are in the runs'
own results: they are others on every day."""


def numbers_of(verb: str, folder: Path) -> Json:
    """Numbers (and short words) of a finished run by name; empty where the verb has none or its result is not there."""
    name, keys = RESULTS.get(verb, ("", ()))
    try:
        result = read_json(folder / name) if keys else {}
    except BundleError:
        return {}
    if verb == "train" and "best" not in result:
        result = {"best": _best_of(result)}
    return {name: value for key in keys if key in result for name, value in _named(key, result[key])}


def _named(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The numbers of a value: of metrics under their own names, those of the float network told apart."""
    if isinstance(value, Mapping):
        before = "float " if key.startswith("float") else ""
        yield from ((before + name, number) for name, number in value.items() if _is_number(number))
    elif isinstance(value, str) or _is_number(value):
        yield key, value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _best_of(result: Json) -> Json:
    """The best metrics of a training of annotated pictures, which are in its history."""
    from leanvit.runtime.task import TASKS

    task = TASKS.get(str(result.get("task")))
    found = [row["metrics"] for row in result.get("history", []) if "metrics" in row]
    if task is None or not found:
        return {}
    sign = 1.0 if task.higher_is_better else -1.0
    best: Json = max(found, key=lambda metrics: sign * metrics.get(task.metric, -sign * float("inf")))
    return best
