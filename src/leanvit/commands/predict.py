"""leanvit predict: what a bundle says of images. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.PredictConfig) -> int:
    """Labels, objects, class maps or keypoints, whatever the bundle's task finds."""
    from leanvit.runtime.predict import run as run_it

    run_it(config)
    return errors.EXIT_OK
