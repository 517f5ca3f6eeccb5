"""Golden pictures of a task's bundle with what it finds in them now, for `leanvit report`. No torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from leanvit import imaging
from leanvit.errors import LeanvitError, how_to_install, is_installed
from leanvit.report.pictures import Pictures, Shot
from leanvit.runtime.bundle import MANIFEST_NAME, load_golden
from leanvit.runtime.draw import draw_found, draw_map, fitted
from leanvit.runtime.task_golden import CLEAR_SCORE
from leanvit.runtime.task_of import CLASSIFY, task_of
from leanvit.runtime.task_predictor import TaskPredictor

SHOWN = 8
LONGEST_SIDE = 640
CHARTS = 4
"""Coloured charts among the golden pictures: they are there to catch mistakes, not to be looked at."""


def golden_findings(run: str | Path) -> Pictures | None:
    """What the bundle of a run folder finds in its golden pictures on this machine; None where it is of no task.

    run: a bundle, or a folder with one in bundle/. A bundle that can't be run, or a machine without onnxruntime, gives
    the reason in place of pictures: a page about a bundle that fails its gate is drawn as well.
    """
    folder = next((path for path in (Path(run) / "bundle", Path(run)) if (path / MANIFEST_NAME).is_file()), None)
    if folder is None or task_of(folder) == CLASSIFY:
        return None
    if not is_installed("onnxruntime"):
        reason = f"onnxruntime, which runs the bundle, is not installed. Run: {how_to_install('onnxruntime')}"
        return Pictures((), "", reason)
    try:
        predictor = TaskPredictor(folder, check=False)
        images, _ = load_golden(folder)
        shots = [_shot(predictor, images[place], place) for place in photographs(len(images))[:SHOWN]]
    except LeanvitError as error:
        return Pictures((), "", str(error))
    return Pictures(tuple(shots), _caption(predictor))


def photographs(count: int) -> list[int]:
    """Places of the golden pictures that are no charts, out of `count` as leanvit.export.tasks orders them."""
    pictures = max(0, count - CHARTS)
    # Charts stand at 1, 3, 5, 7; where pictures run out before, the other charts follow at the end.
    charts = {min(2 * i + 1, pictures + i) for i in range(CHARTS)}
    return [place for place in range(count) if place not in charts]


def _caption(predictor: TaskPredictor) -> str:
    how = {
        "semantic": "The class of every pixel",
        "pose": "The keypoints of one object that fills the picture, for a bundle holds no boxes of the objects",
    }
    what = how.get(predictor.manifest.task, f"Objects with a score of at least {CLEAR_SCORE}")
    return f"{what}, found in the bundle's golden pictures by {predictor.runtime} when this page was drawn."


def _shot(predictor: TaskPredictor, image: bytes, place: int) -> Shot:
    pixels = imaging.decode(image, f"golden picture {place}").pixels
    if predictor.manifest.task == "semantic":
        found_map = predictor.class_map(pixels)
        drawn = draw_map(pixels, found_map, predictor.labels)
        counts = np.bincount(found_map.ravel(), minlength=len(predictor.labels))[: len(predictor.labels)]
        order = [int(label) for label in np.argsort(-counts, kind="stable") if counts[label]]
        said = ", ".join(f"{predictor.labels[label]} {counts[label] / found_map.size:.0%}" for label in order[:4])
    else:
        found = predictor.objects(pixels, CLEAR_SCORE)
        labels = ("object",) * len(predictor.labels) if predictor.manifest.task == "pose" else predictor.labels
        drawn = draw_found(pixels, found, labels, predictor.keypoints)
        counted = Counter(labels[one.label] for one in found).most_common()
        said = ", ".join(f"{count} {label}" for label, count in counted) or "nothing"
    return Shot(imaging.encode_png(fitted(drawn, LONGEST_SIDE)), f"Picture {place // 2 + 1}", said)
