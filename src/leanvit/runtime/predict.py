"""leanvit predict: classify files, folders, patterns and lists with a bundle, however many they are; torch-free.

Images flow: paths are found while images before them are decoded by a few threads and images before those are
classified. In memory are two batches of decoded images ahead and the one at work.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from leanvit.config import PredictConfig
from leanvit.errors import ConfigError, ImageError
from leanvit.imaging import Pixels, decode, find_images, resize
from leanvit.progress import Bar, note
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.result_files import nothing_left, open_results, settings_of

DECODERS = min(4, os.cpu_count() or 1)

Item = TypeVar("Item")
Result = TypeVar("Result")
Answer = tuple[Path, list[tuple[str, float]] | str]


def run(config: PredictConfig) -> int:
    """Print the best labels of every image; returns how many images were classified.

    Raises DataError where no image could be read, PartialError where some could not: the others are printed.
    """
    if not config.images:
        raise ConfigError("no images given. Run: leanvit predict BUNDLE IMAGE...")
    if config.draw or config.boxes:
        name = "draw" if config.draw else "boxes"
        raise ConfigError(f"{name} is for bundles of other tasks (docs/tasks.md), {config.bundle} is a classifier")
    if nothing_left(config):
        return 0
    paths = find_images(config.images)
    predictor = Predictor(config.bundle, threads=config.threads, runtime=config.runtime)
    settings = settings_of(config, predictor.manifest.sha256)
    with open_results(config, settings, paths) as results, Bar("predicting", None) as bar:
        bar.advance(results.images)
        with contextlib.closing(classify(predictor, paths, config.batch_size, config.top_k)) as batches:
            for batch in batches:
                for path, answer in batch:
                    if isinstance(answer, str):
                        results.skip(path, answer)
                    else:
                        results.write(path, answer)
                results.flush()
                bar.advance(len(batch))
        results.require_one()
    results.require_all()
    return results.images


def classify(
    predictor: Predictor, paths: Iterable[Path], batch_size: int, top_k: int
) -> Generator[list[Answer], None, None]:
    """The `top_k` labels of every image, or why it can't be read, a batch at a time in the order of `paths`."""
    pool = ThreadPoolExecutor(DECODERS, "decode")
    try:
        prepared = _in_order(pool, lambda path: _prepare(predictor, path), paths, 2 * batch_size)
        while batch := list(islice(prepared, batch_size)):
            for image in batch:
                for sentence in image.notes:
                    note(sentence)
            pixels = [image.pixels for image in batch if image.pixels is not None]
            rows = iter(predictor.top(np.stack(pixels), top_k) if pixels else [])
            yield [(image.path, image.problem or next(rows)) for image in batch]
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Prepared:
    """One image: pixels (*input_size, 3) uint8 or the problem that it has, and what is to be said of it."""

    path: Path
    pixels: Pixels | None
    problem: str
    notes: list[str]


def _prepare(predictor: Predictor, path: Path) -> _Prepared:
    try:
        decoded = decode(path)
    except ImageError as error:
        return _Prepared(path, None, str(error), [f"skipped {error}"])
    pixels = resize(decoded.pixels, predictor.manifest.preprocess)
    return _Prepared(path, pixels, "", [f"{path}: {sentence}" for sentence in decoded.notes])


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Result], items: Iterable[Item], ahead: int
) -> Iterator[Result]:
    """work(item) of every item, in order; at most `ahead` are done or taken before they are asked for."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
