"""The images of each step: which ones, in which process, loaded by threads or by worker processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from leanvit.config import TrainConfig
from leanvit.data.loader import Loader, epoch_order
from leanvit.data.sets import ImageSet
from leanvit.errors import ImageError
from leanvit.passed_over import left_out
from leanvit.train.augment import CROPPING, POLICY, make_policy, seed_of
from leanvit.train.processes import Processes


@dataclass(frozen=True)
class Part:
    """What one process works on at once: a part of an optimizer step.

    images: (B, H, W, 3) uint8. labels: (B,) int64, of several an image (B, classes). indices: (B,) of the images in
    their set. position: of the first image within the step. total: images of the step over all processes.
    last: whether it is this process' last part of the step. unreadable: what was wrong with images that
        are left out and were not before.
    """

    step: int
    images: Tensor
    labels: Tensor
    indices: NDArray[np.int64]
    position: int
    total: int
    last: bool
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Images that could be read."""
        return len(self.labels)

    @property
    def positions(self) -> range:
        """Of the images within the step."""
        return range(self.position, self.position + len(self.labels))


def split_step(total: int, parts: int) -> list[slice]:
    """A step's images in `parts` runs of nearly equal length; neighbours 2i and 2i + 1, which may be mixed, stay."""
    edges = [2 * round(part * total / parts / 2) for part in range(parts)] + [total]
    edges = [min(edge, total) for edge in edges]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


class ImageReader:
    """Prepared images by (epoch, index): a map-style data set that a worker process can hold."""

    def __init__(self, loader: Loader, config: TrainConfig) -> None:
        self.images: ImageSet = loader.images
        self.memory = loader.memory
        self.config = config
        self.preprocess = loader.preprocess
        self.policy = make_policy(config, loader.preprocess)

    def __getitem__(self, key: tuple[int, int]) -> tuple[NDArray[np.uint8] | None, str]:
        """Pixels (*input_size, 3), or None and why not."""
        epoch, index = key
        seed = self.config.seed
        try:
            if self.memory is not None:
                pixels = self.memory[index]
            else:
                pixels = self._crop(index, np.random.default_rng(seed_of(CROPPING, seed, epoch, index)))
        except ImageError as error:
            return None, str(error)
        return (self.policy(pixels, seed_of(POLICY, seed, epoch, index)) if self.policy else pixels), ""

    def _crop(self, index: int, generator: np.random.Generator) -> NDArray[np.uint8]:
        """A random crop out of the original image, which is finer than one out of the prepared image."""
        size, config = self.preprocess.input_size, self.config
        scale = (min(config.crop_scale[0], 1.0), min(config.crop_scale[1], 1.0))
        interpolation = self.preprocess.interpolation
        return self.images.cropped(index, generator, size, scale, config.crop_ratio, interpolation).pixels


def _stack(items: list[tuple[NDArray[np.uint8] | None, str]]) -> tuple[Tensor, list[int], tuple[str, ...]]:
    """Images (B, H, W, 3), places of those that could be read, and what was wrong with the others."""
    good = [place for place, (pixels, _) in enumerate(items) if pixels is not None]
    arrays = [pixels for pixels, _ in items if pixels is not None]
    stacked = torch.from_numpy(np.stack(arrays)) if arrays else torch.empty(0)
    return stacked, good, tuple(reason for pixels, reason in items if pixels is None)


@dataclass
class _Keys:
    """What worker processes read in an epoch, part by part."""

    parts: list[list[tuple[int, int]]] = field(default_factory=list)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)


class Batches:
    """All parts of an epoch that one process works on, in order."""

    def __init__(self, loader: Loader, config: TrainConfig, processes: Processes) -> None:
        self.loader = loader
        self.config = config
        self.processes = processes
        self.reader = ImageReader(loader, config)
        self.keys = _Keys()
        self.pool: Any = None

    @property
    def crops_files(self) -> bool:
        """Whether images come as random crops; else whole, to be cropped as a batch."""
        return self.reader.memory is None

    def __len__(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.loader)

    def _plan(self, epoch: int, first_step: int) -> Iterator[tuple[int, NDArray[np.int64], int, int, bool]]:
        """(step, indices, position, total, last) of every part from `first_step` on."""
        config, processes = self.config, self.processes
        order = epoch_order(len(self.loader.images), config.seed, epoch)
        parts = processes.world * config.grad_accum_steps
        mine = range(processes.rank * config.grad_accum_steps, (processes.rank + 1) * config.grad_accum_steps)
        for step in range(first_step, len(self)):
            indices = order[step * config.batch_size : (step + 1) * config.batch_size]
            pieces = split_step(len(indices), parts)
            for number in mine:
                piece = pieces[number]
                yield step, indices[piece], piece.start, len(indices), number == mine[-1]

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Part]:
        """The parts of an epoch. Raises ImageError for a corrupt image where bad_images is "fail"."""
        plan = list(self._plan(epoch, first_step))
        read = self._from_workers if self.config.workers else self._from_threads
        for (step, indices, position, total, last), (images, good, reasons) in zip(
            plan, read(epoch, [indices for _, indices, *_ in plan]), strict=True
        ):
            if reasons and self.config.bad_images == "fail":
                raise ImageError(f"{reasons[0]} To leave such images out: --bad-images skip")
            news = self._remember(np.delete(indices, good))
            kept = indices[good]
            labels = torch.from_numpy(self.loader.images.labels[kept])
            yield Part(step, images, labels, kept, position, total, last, reasons if news else ())

    def _remember(self, unreadable: NDArray[np.int64]) -> bool:
        """List images that could not be read with the loader's; whether any of them is new."""
        names = {self.loader.images.name_of(int(index)) for index in unreadable} - set(self.loader.bad)
        self.loader.bad += sorted(names)
        left_out(sorted(names), "images", said=True)  # by the trainer, with the reason
        return bool(names)

    def _from_threads(self, epoch: int, parts: list[NDArray[np.int64]]) -> Iterator[Any]:
        """Read here, the next part while one is used."""
        reader = self.reader

        def fetch(indices: NDArray[np.int64], pool: ThreadPoolExecutor) -> Any:
            if reader.memory is not None and reader.policy is None:
                return torch.from_numpy(reader.memory[indices]), list(range(len(indices))), ()
            keys = [(epoch, index) for index in indices.tolist()]
            # A policy draws from generators that all threads share; decoding draws from none.
            return _stack([reader[key] for key in keys] if reader.policy else list(pool.map(reader.__getitem__, keys)))

        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor() as pool:
            pending = ahead.submit(fetch, parts[0], pool) if parts else None
            for following in [*parts[1:], None]:
                if pending is None:
                    return
                part = pending.result()
                pending = ahead.submit(fetch, following, pool) if following is not None else None
                yield part

    def _from_workers(self, epoch: int, parts: list[NDArray[np.int64]]) -> Iterator[Any]:
        """Read in worker processes; what they return does not depend on how many there are."""
        self.keys.parts = [[(epoch, index) for index in indices.tolist()] for indices in parts]
        if self.pool is None:
            self.pool = torch.utils.data.DataLoader(
                self.reader,  # type: ignore[arg-type]
                batch_sampler=self.keys,
                num_workers=self.config.workers,
                collate_fn=_stack,
                pin_memory=torch.cuda.is_available(),
                # They would read and unpack all that they need anew in every epoch.
                persistent_workers=True,
            )
        yield from self.pool
