"""A model measured over labelled images by its task's own metric, as annotated pictures are: all tasks but classify."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from leanvit.config import Preprocess, ValConfig
from leanvit.data.loader import Loader
from leanvit.data.sets import ImageSet
from leanvit.evaluation.plan import Json, batch_size_of, check_shifts
from leanvit.evaluation.scenes import Pixels, measure_read
from leanvit.evaluation.subject import Subject
from leanvit.files import only_writer
from leanvit.runtime.inputs import Place


@dataclass
class ImageReader:
    """Labelled images as prepared network inputs, batch by batch, again for every pass.

    data: all of the images. bad: names of those that can't be read, where they are skipped.
    """

    data: ImageSet
    preprocess: Preprocess
    batch_size: int
    skip: bool = False
    loader: Loader = field(init=False)

    def __post_init__(self) -> None:
        """Number the images, so that a batch tells which of them could be read."""
        self.loader = Loader(self.data.numbered(), self.preprocess, self.batch_size, "skip" if self.skip else "fail")

    @property
    def bad(self) -> list[str]:
        """Names of the images that could not be read."""
        return self.loader.bad

    @property
    def inputs(self) -> int:
        """Images of a pass."""
        return len(self.data) - len(self.bad)

    def __len__(self) -> int:
        """Batches of a pass."""
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Pixels, list[Place]]]:
        """Images (B, H, W, 3) uint8 and their places, in the order of the data."""
        for pixels, numbers in self.loader.batches():
            yield pixels.numpy(), [Place(int(number)) for number in numbers]


def measure_own(config: ValConfig, subject: Subject, images: ImageSet) -> Json:
    """The task's metrics of a model of images, as leanvit.evaluation.scenes.measure_scenes."""
    check_shifts(config, subject)
    with only_writer(config.output) if config.output else contextlib.nullcontext():
        step = batch_size_of(config, subject)
        return measure_read(config, subject, ImageReader(images, subject.preprocess, step, config.bad_images == "skip"))
