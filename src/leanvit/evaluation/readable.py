"""Those images of a data set that can be read, for what measures on images that were prepared before."""

from __future__ import annotations

from leanvit.annotations import SceneSet
from leanvit.config import Preprocess
from leanvit.data.loader import Loader
from leanvit.evaluation.scenes import SceneReader
from leanvit.export.data import Data
from leanvit.runtime.task import task_named


def readable(task: str, data: Data, preprocess: Preprocess) -> Data:
    """Those images of a set that can be read; the others are named. Raises DataError where a class has none left."""
    if isinstance(data, SceneSet):
        return SceneReader(data, task_named(task), preprocess, 1, skip=True).scenes
    return Loader(data, preprocess, 64, "skip", in_memory=True).images
