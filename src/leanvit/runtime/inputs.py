"""A picture as what a network sees of it: one input or several, and where each lies in the picture. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from leanvit import imaging
from leanvit.config import Preprocess
from leanvit.errors import DataError
from leanvit.runtime.decode import Box
from leanvit.runtime.letterbox import Placement, place


@dataclass(frozen=True)
class Options:
    """What may be asked of a prediction; a task says in `Task.options` which of these it follows.

    top_k: labels a picture, at least 1. score_threshold: least score of an object or a label, 0 to 1; None: the
    bundle's own for each label, else 0.5. boxes: (x1, y1, x2, y2) in
    pixels of the picture, of the objects that are looked at; None: the whole picture is one.
    """

    top_k: int = 5
    score_threshold: float | None = None
    boxes: Sequence[Box] | None = None

    @property
    def least_score(self) -> float:
        """The threshold where a bundle has none of its own."""
        return 0.5 if self.score_threshold is None else self.score_threshold


@dataclass(frozen=True)
class Place:
    """Where a network input lies in its picture.

    index: of the picture in its data set. placement: of the whole picture in the input; None for a crop, and where
    the input is read as one thing. region: (x1, y1, x2, y2) of the picture that a crop shows; None for a whole
    picture. instance: index of the object that the crop is of. box: (x1, y1, x2, y2) of that object.
    """

    index: int = 0
    placement: Placement | None = None
    region: Box | None = None
    instance: int = 0
    box: Box | None = None


@dataclass(frozen=True)
class Inputs:
    """What a network sees of one picture.

    images: (N, H, W, 3) uint8, prepared. places: of each. size: (height, width) of the picture in pixels.
    """

    images: imaging.Pixels
    places: tuple[Place, ...]
    size: tuple[int, int]


def letterboxed(pixels: imaging.Pixels, preprocess: Preprocess, options: Options) -> Inputs:
    """The whole picture (height, width, 3) uint8 as one input that knows where the picture lies in it."""
    size = pixels.shape[0], pixels.shape[1]
    where = Place(placement=place(size, preprocess.input_size))
    return Inputs(imaging.resize(pixels, preprocess)[None], (where,), size)


def placement_of(where: Place) -> Placement:
    """The placement of a whole picture. Raises DataError for a crop."""
    if where.placement is None:
        raise DataError("a crop among whole pictures, expected the placement of each picture in its input")
    return where.placement


def region_of(where: Place) -> Box:
    """The region of a crop. Raises DataError for a whole picture."""
    if where.region is None:
        raise DataError("a whole picture among crops, expected the region that each crop shows")
    return where.region


def moved(where: Place, down: int, right: int, size: tuple[int, int]) -> Place:
    """The place of a network input whose pixels were moved by whole pixels; size: (height, width) of the input."""
    if where.placement is not None:
        x, y = where.placement.offset
        return replace(where, placement=replace(where.placement, offset=(x + right, y + down)))
    if where.region is None:
        return where
    x1, y1, x2, y2 = where.region
    across, along = right * (x2 - x1) / size[1], down * (y2 - y1) / size[0]
    return replace(where, region=(x1 - across, y1 - along, x2 - across, y2 - along))
