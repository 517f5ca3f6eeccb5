"""leanvit report: draw a run as one HTML page, with what its bundle finds in the golden pictures. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leanvit import errors, imaging
from leanvit.errors import LeanvitError, how_to_install, is_installed
from leanvit.report.pictures import Pictures, Shot
from leanvit.runtime.bundle import MANIFEST_NAME, load_golden
from leanvit.runtime.draw import fitted
from leanvit.runtime.golden_objects import CLEAR_SCORE
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.task import TASKS, Task
from leanvit.runtime.task_of import task_of

if TYPE_CHECKING:
    from leanvit import config as configs

SHOWN = 8
LONGEST_SIDE = 640
CHARTS = 4
"""Coloured charts among the golden pictures: they are there to catch mistakes, not to be looked at."""


def run(config: configs.ReportConfig) -> int:
    """Draw a run."""
    from leanvit.report import write_report

    print(f"report {write_report(config.run, config.output, golden_findings(config.run))}")
    return errors.EXIT_OK


def golden_findings(run: str | Path) -> Pictures | None:
    """What the bundle of a run folder finds in its golden pictures on this machine; None where nothing is drawn.

    run: a bundle, or a folder with one in bundle/. A bundle that can't be run, or a machine without onnxruntime, has
    the reason in place of pictures: a page about a bundle that fails its gate is drawn as well.
    """
    folder = next((path for path in (Path(run) / "bundle", Path(run)) if (path / MANIFEST_NAME).is_file()), None)
    task = TASKS.get(task_of(folder)) if folder else None
    if folder is None or task is None or task.draw is None:
        return None
    if not is_installed("onnxruntime"):
        reason = f"onnxruntime, which runs the bundle, is not installed. Run: {how_to_install('onnxruntime')}"
        return Pictures((), "", reason)
    try:
        predictor = Predictor(folder, check=False)
        images, _ = load_golden(folder)
        shots = [_shot(predictor, task, images[place], place) for place in photographs(len(images))[:SHOWN]]
    except LeanvitError as error:
        return Pictures((), "", str(error))
    return Pictures(tuple(shots), _caption(predictor, task))


def photographs(count: int) -> list[int]:
    """Places of the golden pictures that are no charts, out of `count` as the exporter orders them."""
    pictures = max(0, count - CHARTS)
    # Charts stand at 1, 3, 5, 7; where pictures run out before, the other charts follow at the end.
    charts = {min(2 * i + 1, pictures + i) for i in range(CHARTS)}
    return [place for place in range(count) if place not in charts]


def _caption(predictor: Predictor, task: Task) -> str:
    scores = f" with a score of at least {CLEAR_SCORE}" if task.matched else ""
    how = f"found in the bundle's golden pictures by {predictor.runtime} when this page was drawn"
    return f"{task.caption}{scores}, {how}."


def _shot(predictor: Predictor, task: Task, image: bytes, place: int) -> Shot:
    pixels = imaging.decode(image, f"golden picture {place}").pixels
    threshold = CLEAR_SCORE if task.matched else None
    found = predictor.predict(pixels, score_threshold=threshold)
    drawn = next(iter(task.draw(pixels, found, predictor.manifest).values())) if task.draw else pixels
    name = f"Picture {place // 2 + 1}"
    return Shot(imaging.encode_png(fitted(drawn, LONGEST_SIDE)), name, task.text(found, predictor.manifest))
