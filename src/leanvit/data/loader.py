"""Batches of labelled images, and how they become the network's input.

Small sets live in memory as uint8 and are augmented in whole batches, which is more than ten times as fast
as image by image; larger ones are decoded on demand. Order and augmentation are pure functions of
(seed, epoch, step), so that a run can be resumed or repeated exactly. Data sets themselves: leanvit.data.sets.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvit import imaging
from leanvit.config import FASHION_MNIST_CLASSES, BadImages, Preprocess
from leanvit.data.sets import FASHION_MNIST_FOLDER, ImageSet, Split, load_split
from leanvit.errors import DataError, ImageError, ShapeError
from leanvit.passed_over import few, left_out
from leanvit.progress import note, track

__all__ = [
    "FASHION_MNIST_CLASSES",
    "FASHION_MNIST_FOLDER",
    "ImageSet",
    "Loader",
    "Split",
    "check_classes",
    "epoch_order",
    "load_split",
    "to_input",
]

TO_SKIP = (
    "To leave such images out: --bad-images skip. To find all of them, so that they can be removed: "
    "leanvit data inspect DATA."
)

MEMORY_LIMIT_BYTES = 4 * 2**30


def check_classes(found: tuple[str, ...], expected: tuple[str, ...], data: str) -> None:
    """Raise DataError where a data set's classes are not the model's, in the same order."""
    if found != expected:
        raise DataError(
            f"{data} has classes {', '.join(found[:4])}... ({len(found)}), the model was trained on "
            f"{', '.join(expected[:4])}... ({len(expected)}), in that order. Use data with the same class folders."
        )


@dataclass
class Loader:
    """Batches of an ImageSet at one preprocessing.

    Iterating yields (images, labels): images (B, H, W, 3) uint8 and labels (B,) int64, in order.
    bad: the images that could not be decoded and were left out, each once.
    """

    images: ImageSet
    preprocess: Preprocess
    batch_size: int
    bad_images: BadImages = "fail"
    memory: NDArray[np.uint8] | None = None
    in_memory: bool | None = None

    def __post_init__(self) -> None:
        """Decode everything once where it fits into memory, or where `in_memory` says so."""
        self.bad: list[str] = []
        self._noted: set[str] = set()
        height, width = self.preprocess.input_size
        fits = len(self.images) * height * width * self.preprocess.channels <= MEMORY_LIMIT_BYTES
        if self.memory is None and (fits if self.in_memory is None else self.in_memory):
            self._fill_memory()

    def _fill_memory(self) -> None:
        memory = self._empty(len(self.images))
        good: list[int] = []
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(self._decode, range(len(self.images)))
            tracked = track(decoded, f"reading {self.images.name}", len(self.images))
            for index, pixels in self._readable(range(len(self.images)), tracked):
                memory[len(good)] = pixels
                good.append(index)
        if len(good) < len(self.images):
            note(f"{self.images.name}: {len(self.bad)} of {len(self.images)} images left out: {few(self.bad)}")
            left_out(self.bad, "images", said=True)
            kept = np.asarray(good, np.int64)
            self._require_all_classes(kept)
            self.images = self.images.subset(kept)
        self.memory = memory[: len(good)]

    def _empty(self, count: int) -> NDArray[np.uint8]:
        return np.empty((count, *self.preprocess.input_size, self.preprocess.channels), np.uint8)

    def _require_all_classes(self, good: NDArray[np.int64]) -> None:
        # A few images drawn from many need not have every class in the first place.
        gone = _labels_in(self.images.labels) - _labels_in(self.images.labels[good])
        lost = [name for i, name in enumerate(self.images.classes) if i in gone]
        if lost:
            raise DataError(f"{self.images.name}: class '{lost[0]}' has no readable image. Replace its files.")

    def _decode(self, index: int) -> imaging.Decoded | None:
        """One image at the input size, or None where it can't be read and is to be skipped."""
        try:
            return self.images.resized(index, self.preprocess)
        except ImageError as error:
            if self.bad_images == "fail":
                raise ImageError(f"{error} {TO_SKIP}") from error
            return None

    def _readable(
        self, indices: Iterable[int], images: Iterable[imaging.Decoded | None]
    ) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Index and pixels of the readable ones; lists the others, and says once what was converted."""
        for index, image in zip(indices, images, strict=True):
            if image is None:
                name = self.images.name_of(index)
                self.bad += [name] if name not in self.bad else []
                continue
            for sentence in set(image.notes) - self._noted:
                note(f"{self.images.name_of(index)}: {sentence} (the first such image; others are treated alike)")
            self._noted |= set(image.notes)
            yield index, image.pixels

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3) uint8 and labels (B,) int64 at `indices`; unreadable ones are left out."""
        if self.memory is not None:
            return torch.from_numpy(self.memory[indices]), torch.from_numpy(self.images.labels[indices])
        with ThreadPoolExecutor() as pool:
            return self._collect(indices, pool.map(self._decode, indices.tolist()))

    def _collect(self, indices: NDArray[np.int64], decoded: Iterable[imaging.Decoded | None]) -> tuple[Tensor, Tensor]:
        batch = self._empty(len(indices))
        good: list[int] = []
        before = len(self.bad)
        for index, pixels in self._readable(indices.tolist(), decoded):
            batch[len(good)] = pixels
            good.append(index)
        left_out(self.bad[before:], f"images of {self.images.name} that can't be read")
        labels = self.images.labels[np.asarray(good, np.int64)]
        return torch.from_numpy(batch[: len(good)]), torch.from_numpy(labels)

    def batches(self, order: NDArray[np.int64] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in `order` (default: as stored), the next ones decoded while one is used; none is empty."""
        order = np.arange(len(self.images)) if order is None else order
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        read = self._from_files if self.memory is None else self._from_memory
        return (batch for batch in read(chunks) if len(batch[1]))

    def _from_memory(self, chunks: list[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        with ThreadPoolExecutor(1) as pool:
            pending = deque(pool.submit(self.fetch, chunk) for chunk in chunks[:1])
            for following in [*chunks[1:], None]:
                if following is not None:
                    pending.append(pool.submit(self.fetch, following))
                if pending:
                    yield pending.popleft().result()

    def _from_files(self, chunks: list[NDArray[np.int64]]) -> Iterator[tuple[Tensor, Tensor]]:
        pool = ThreadPoolExecutor()
        pending: deque[tuple[NDArray[np.int64], Iterator[imaging.Decoded | None]]] = deque()
        try:
            for chunk in chunks:
                pending.append((chunk, pool.map(self._decode, chunk.tolist())))
                # Two batches ahead: with one, cores would wait for its last image and for its copy.
                if len(pending) > 2:
                    yield self._collect(*pending.popleft())
            while pending:
                yield self._collect(*pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches in stored order."""
        return self.batches()

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.images) / self.batch_size)


def _labels_in(labels: NDArray[np.int64]) -> set[int]:
    """Classes that some image has: labels are (N,), or (N, classes) of 0 and 1."""
    return set((labels if labels.ndim == 1 else np.nonzero(labels)[1]).tolist())


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch: a pure function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def to_input(images: Tensor, preprocess: Preprocess, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (N, H, W, 3) to normalised float32 (N, 3, H, W) on `device`; of other channels, where they have others.

    Raises ShapeError where `preprocess` is for another number of channels.
    """
    count, height, width, channels = images.shape
    on_cpu = images.device.type == torch.device(device).type == "cpu"
    # Whole rows instead of three channels at a time: four times as fast on a CPU, and the same numbers.
    rows = images.reshape(count, height, width * channels)
    rows = (
        _normalised_by_numpy(rows, preprocess, channels)
        if on_cpu
        else _normalised(rows.to(device, non_blocking=True), preprocess, channels)
    )
    return rows.view(count, height, width, channels).permute(0, 3, 1, 2)


def _each_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """One value a channel; where all are the same, so many of it."""
    if len(values) == channels:
        return values
    if len(set(values)) == 1:
        return values[:1] * channels
    raise ShapeError(
        f"images have {channels} channels, the preprocessing has {len(values)} ({values}). Give one for as many."
    )


def _normalised(rows: Tensor, preprocess: Preprocess, channels: int) -> Tensor:
    mean, std = (
        torch.tensor(_each_channel(values, channels), device=rows.device).repeat(rows.shape[-1] // channels)
        for values in (preprocess.mean, preprocess.std)
    )
    return rows.float().div_(255.0).sub_(mean).div_(std)


def _normalised_by_numpy(rows: Tensor, preprocess: Preprocess, channels: int) -> Tensor:
    """The same numbers in one thread and in huge pages: torch's threads wait for cores that decode the next batch."""
    mean, std = (
        np.tile(np.asarray(_each_channel(values, channels), np.float32), rows.shape[-1] // channels)
        for values in (preprocess.mean, preprocess.std)
    )
    found = rows.numpy().astype(np.float32)
    found /= np.float32(255)
    found -= mean
    found /= std
    return torch.from_numpy(found)
