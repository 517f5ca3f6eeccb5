"""leanvit predict: what a bundle says of images. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.PredictConfig) -> int:
    """Classify images."""
    from leanvit.runtime.task_of import CLASSIFY, task_of

    if task_of(config.bundle) != CLASSIFY:
        return _run_task(config)
    from leanvit.runtime.predict import run as run_it

    run_it(config)
    return errors.EXIT_OK


def _run_task(config: configs.PredictConfig) -> int:
    """Objects, class maps or keypoints of pictures."""
    from leanvit.runtime.predict_task import run as run_it

    run_it(config)
    return errors.EXIT_OK
