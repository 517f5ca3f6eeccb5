"""ImageSet: labelled images that are not decoded yet, wherever they lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from leanvit import imaging
from leanvit.config import Preprocess
from leanvit.errors import DataError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Encoded(Protocol):
    """An encoded image that has no file of its own, such as a member of an archive; str() is its name in messages."""

    def read(self) -> bytes:
        """Its bytes. Raises ImageError where they can't be read."""


Source = Path | NDArray[np.uint8] | Encoded


@dataclass(frozen=True)
class ImageSet:
    """Labelled images that are not decoded yet.

    sources: file paths, uint8 arrays (height, width, 3), or other encoded images.
    labels: (N,) int64 class indices. classes: names in the order of the indices.
    """

    name: str
    sources: Sequence[Source]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.sources)

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """The images at `indices`, in that order."""
        return replace(self, sources=[self.sources[i] for i in indices], labels=self.labels[indices])

    def name_of(self, index: int) -> str:
        """What messages call one image."""
        source = self.sources[index]
        return f"image {index} of {self.name}" if isinstance(source, np.ndarray) else str(source)

    def encoded(self, index: int) -> bytes:
        """Encoded bytes of one image: the file's own, or PNG for an embedded array. Raises ImageError."""
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            return imaging.encode_png(source)
        return imaging.read_file(source) if isinstance(source, Path) else source.read()

    def numbered(self) -> ImageSet:
        """The same images, each with its place for a label: so batches tell which of them could be read."""
        return replace(self, labels=np.arange(len(self)), classes=())

    def decoded(self, index: int) -> imaging.Decoded:
        """One image decoded to RGB. Raises ImageError."""
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            return imaging.Decoded(source)
        return imaging.decode(self.encoded(index), str(source))

    def resized(self, index: int, preprocess: Preprocess) -> imaging.Decoded:
        """One image decoded and resized: pixels (*input_size, 3) uint8. Raises ImageError."""
        source = self.sources[index]
        if isinstance(source, np.ndarray):
            return imaging.Decoded(imaging.resize(source, preprocess))
        return imaging.decode_resized(self.encoded(index), preprocess, str(source))

    def pixels(self, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
        """The pixels alone of `resized`."""
        return self.resized(index, preprocess).pixels

    def cropped(
        self,
        index: int,
        box_rng: np.random.Generator,
        size: tuple[int, int],
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        interpolation: str = "bicubic",
    ) -> imaging.Decoded:
        """A random part of one image, for training only: `imaging.crop_resize`. Raises ImageError."""
        source = self.sources[index]
        options = (box_rng, size, scale, ratio, interpolation)
        if isinstance(source, np.ndarray):
            return imaging.crop_resize(source, *options)
        return imaging.crop_resize(self.encoded(index), *options, str(source))


Parts = dict[Split, Callable[[], ImageSet]]
"""The parts that a data set has of itself, each read when it is called. Only 'train': the rest is held out of it."""


def hold_out(images: ImageSet, split: Split, fraction: float, seed: int) -> ImageSet:
    """Hold out `fraction` of every class, at least one image, by `seed`: 'val' is what is held out, 'train' the rest.

    Raises DataError where a class has fewer than two images.
    """
    generator = np.random.default_rng(seed)
    kept: list[NDArray[np.int64]] = []
    for label, name in enumerate(images.classes):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        if len(members) < 2:
            raise DataError(
                f"{images.name}: class '{name}' has {len(members)} image, expected at least two to hold one out. "
                "Add images, or give a part for validation (a folder, shards, or a column 'split')."
            )
        held_out = min(max(1, round(fraction * len(members))), len(members) - 1)
        kept.append(members[:held_out] if split == "val" else members[held_out:])
    return images.subset(np.sort(np.concatenate(kept)))


def require_files(paths: Sequence[Path], where: str, advice: str) -> None:
    """Raise DataError that names the first of those `paths` that are no files."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        named = ", ".join(map(str, missing[:3]))
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(f"{where}: {len(missing)} of {len(paths)} images are missing: {named}{more}. {advice}")
