"""Batches of annotated pictures. Order and augmentation are pure functions of (seed, epoch), however they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from leanvit.annotations import SceneSet
from leanvit.config import BadImages
from leanvit.data.loader import TO_SKIP, epoch_order
from leanvit.data.scene_augment import Augmentation
from leanvit.data.scene_samples import Pictures, Sample, SampleKind, Size, read_sample
from leanvit.errors import ConfigError, DataError, ImageError, LeanvitError
from leanvit.passed_over import left_out
from leanvit.progress import track
from leanvit.runtime.inputs import Place

MEMORY_LIMIT_BYTES = 2 * 2**30

Key = tuple[int, int]
Batch = tuple[Tensor, list[dict[str, Tensor]]]


class SceneDataset(Dataset[Sample]):
    """Samples of one kind by (epoch, index)."""

    def __init__(
        self,
        scene_set: SceneSet,
        kind: SampleKind,
        size: Size,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        *,
        keep: bool = False,
    ) -> None:
        """size: (height, width) of the images. augmentation: None for none. keep: hold what was decoded.

        Raises DataError where the scenes have nothing of this kind.
        """
        self.pictures = Pictures(scene_set, keep)
        self.scene_set, self.kind, self.size = scene_set, kind, size
        self.augmentation, self.seed = augmentation, seed
        if not scene_set.scenes:
            raise DataError(f"{scene_set.name}: no pictures, expected at least one. Add some, or check the split.")
        kind.check(self.pictures)
        self.scenes = kind.scenes(self.pictures)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.scenes)

    def __getitem__(self, key: Key) -> Sample:
        """Sample of (epoch, index). Raises ImageError, DataError."""
        epoch, index = key
        return read_sample(
            self.scene_set,
            index,
            self.kind,
            self.size,
            self.augmentation,
            self.seed,
            epoch=epoch,
            pictures=self.pictures,
        )

    def scene_of(self, index: int) -> int:
        """Index of the scene that a sample shows."""
        return self.scenes[index]

    def place_of(self, index: int) -> Place:
        """Where the image of a sample lies in its picture, where nothing is changed at random."""
        return self.kind.place(self.pictures, index, self.size)


def memory_needed(scene_set: SceneSet, kind: SampleKind) -> int:
    """Bytes of all decoded pictures, masks and class maps."""
    return sum(3 * scene.size[0] * scene.size[1] + kind.extra_bytes(scene) for scene in scene_set.scenes)


@dataclass
class _Keys:
    """What worker processes read in an epoch, batch by batch."""

    batches: list[list[Key]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@dataclass(frozen=True)
class _Caught(Dataset[Any]):
    """Samples by key, errors as values: raised in a worker process they would lose their one line."""

    dataset: SceneDataset

    def __getitem__(self, key: Key) -> Sample | tuple[Key, LeanvitError]:
        try:
            return self.dataset[key]
        except LeanvitError as error:
            return key, error


@dataclass(frozen=True)
class _Packed:
    """A batch with one tensor a field: each tensor that comes from a worker costs it an open file."""

    images: Tensor
    fields: dict[str, tuple[Tensor, list[torch.Size]]]
    failed: list[tuple[Key, LeanvitError]]


def _pack(items: list[Sample | tuple[Key, LeanvitError]]) -> _Packed:
    samples = [item for item in items if isinstance(item, Sample)]
    failed = [item for item in items if not isinstance(item, Sample)]
    if not samples:
        return _Packed(torch.empty(0), {}, failed)
    fields = {}
    for name in samples[0].target:
        values = [sample.target[name] for sample in samples]
        fields[name] = torch.cat([value.reshape(-1) for value in values]), [value.shape for value in values]
    return _Packed(torch.stack([sample.image for sample in samples]), fields, failed)


def _unpack(packed: _Packed) -> Batch:
    targets: list[dict[str, Tensor]] = [{} for _ in packed.images]
    for name, (flat, shapes) in packed.fields.items():
        parts = torch.split(flat, [shape.numel() for shape in shapes])
        for target, part, shape in zip(targets, parts, shapes, strict=True):
            target[name] = part.view(shape)
    return packed.images, targets


class SceneLoader:
    """Batches of one kind of samples: images (B, 3, H, W) uint8 and B targets as in `Sample`.

    In training samples come in the order of (seed, epoch), augmented, and the last incomplete batch is left out;
    else all in stored order as they are. bad: pictures that could not be read and were left out, each once.
    """

    def __init__(
        self,
        scene_set: SceneSet,
        kind: SampleKind,
        size: Size,
        batch_size: int,
        *,
        train: bool,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        workers: int = 0,
        on_bad: BadImages = "fail",
    ) -> None:
        """Decode all pictures where they need no more than 2 GiB.

        size: (height, width) of the images. augmentation: used in training only. workers: processes that read; 0:
        this one, with a thread. on_bad: what a picture that can't be read does.
        Raises ConfigError, DataError where the scenes have nothing of this kind, ImageError for a bad picture.
        """
        if batch_size < 1 or workers < 0:
            raise ConfigError(f"batch_size {batch_size} and workers {workers}, expected at least 1 and 0")
        fits = memory_needed(scene_set, kind) <= MEMORY_LIMIT_BYTES
        self.dataset = SceneDataset(scene_set, kind, size, augmentation if train else None, seed, keep=fits)
        self.batch_size, self.train, self.workers, self.on_bad = batch_size, train, workers, on_bad
        self.epoch = 0
        self.bad: list[str] = []
        self._indices = np.arange(len(self.dataset))
        self._keys = _Keys()
        self._pool: Any = None
        if fits:
            self._read_all()

    def _read_all(self) -> None:
        scene_set = self.dataset.scene_set
        used = sorted({self.dataset.scene_of(index) for index in self._indices.tolist()})
        with ThreadPoolExecutor() as pool:
            errors = list(track(pool.map(self._try_scene, used), f"reading {scene_set.name}", len(used)))
        bad = {scene for scene, error in zip(used, errors, strict=True) if error is not None}
        for error in filter(None, errors):
            self._judge(error)
        good = [index for index in self._indices.tolist() if self.dataset.scene_of(index) not in bad]
        if not good:
            raise DataError(f"{scene_set.name}: none of {len(used)} pictures can be read. Replace the files.")
        self._leave_out(bad)
        self._indices = np.asarray(good, np.int64)

    def _try_scene(self, scene: int) -> ImageError | None:
        try:
            self.dataset.pictures.pixels(scene)
        except ImageError as error:
            return error
        return None

    def _judge(self, error: LeanvitError) -> None:
        """Raise an error that is not to be skipped."""
        if not isinstance(error, ImageError):
            # A new one: this one is held by frames that it would hold, and workers end late in such a cycle.
            raise type(error)(str(error)) from error
        if self.on_bad == "fail":
            raise ImageError(f"{error} {TO_SKIP}") from error

    def _leave_out(self, scenes: set[int]) -> None:
        names = [str(self.dataset.scene_set.scenes[scene].path) for scene in sorted(scenes)]
        news = [name for name in names if name not in self.bad]
        self.bad += news
        left_out(news, f"pictures of {self.dataset.scene_set.name} that can't be read")

    def set_epoch(self, epoch: int) -> None:
        """Which epoch comes next: its order and its augmentation. It stays until it is set again."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch; fewer come where every picture of one is bad and they are read on the way."""
        count = len(self._indices)
        return max(1, count // self.batch_size) if self.train else math.ceil(count / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """All batches of the epoch."""
        return self.batches()

    def batches(self, first: int = 0) -> Iterator[Batch]:
        """The epoch's batches from number `first` on. Raises ImageError for a bad picture, DataError."""
        for images, targets, _ in self.read(self.plan()[first:]):
            if targets:
                yield images, targets

    def read(self, keys: list[list[Key]]) -> Iterator[tuple[Tensor, list[dict[str, Tensor]], list[int]]]:
        """Images, targets and places of those samples of each list of keys that could be read; there may be none.

        Raises ImageError for a bad picture, DataError.
        """
        for wanted, packed in zip(
            keys, self._from_workers(keys) if self.workers else self._from_thread(keys), strict=True
        ):
            failed = {key for key, _ in packed.failed}
            for _, error in packed.failed:
                self._judge(error)
            self._leave_out({self.dataset.scene_of(index) for _, index in failed})
            places = [place for place, key in enumerate(wanted) if key not in failed]
            yield *_unpack(packed), places

    def any_sample(self) -> tuple[Tensor, dict[str, Tensor]]:
        """An image (3, H, W) and its target, the first that can be read. Raises DataError where none can."""
        for index in self._indices.tolist():
            try:
                sample = self.dataset[(0, index)]
            except ImageError:
                continue
            return sample.image, sample.target
        raise DataError(f"{self.dataset.scene_set.name}: no picture can be read. Replace the files.")

    def plan(self) -> list[list[Key]]:
        """The keys of every batch of the epoch."""
        indices = self._indices
        if self.train:
            indices = indices[epoch_order(len(indices), self.dataset.seed, self.epoch)]
        chunks = [indices[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]
        return [self._keyed(chunk) for chunk in chunks]

    def _keyed(self, indices: NDArray[np.int64]) -> list[Key]:
        return [(self.epoch, index) for index in indices.tolist()]

    def _from_thread(self, keys: list[list[Key]]) -> Iterator[_Packed]:
        """Read here, the next batch while one is used."""
        caught = _Caught(self.dataset)

        def fetch(batch: list[Key]) -> _Packed:
            return _pack([caught[key] for key in batch])

        with ThreadPoolExecutor(1) as ahead:
            pending = ahead.submit(fetch, keys[0]) if keys else None
            for following in [*keys[1:], None]:
                if pending is None:
                    return
                packed = pending.result()
                pending = ahead.submit(fetch, following) if following is not None else None
                yield packed

    def _from_workers(self, keys: list[list[Key]]) -> Iterator[_Packed]:
        self._keys.batches = keys
        if self._pool is None:
            self._pool = DataLoader(
                _Caught(self.dataset),
                batch_sampler=self._keys,
                num_workers=self.workers,
                collate_fn=_pack,
                persistent_workers=True,
            )
        yield from self._pool
