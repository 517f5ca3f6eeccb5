"""leanvit predict: what a bundle says of images. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.PredictConfig) -> int:
    """Labels, objects, class maps or keypoints, whatever the bundle's task finds."""
    from leanvit.runtime.parts import run as run_in_parts
    from leanvit.runtime.parts import wants_parts

    if config.ray:
        from leanvit.scale.predict import run as run_on_ray

        run_on_ray(config)
    elif wants_parts(config):
        run_in_parts(config)
    else:
        from leanvit.runtime.predict import run as run_it

        run_it(config)
    return errors.EXIT_OK
