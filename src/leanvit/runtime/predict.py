"""leanvit predict: what a bundle of any task finds in files, folders, patterns and lists, however many; torch-free.

Images flow: paths are found while images before them are decoded by a few threads and the network runs on images
before those. In memory are two batches of decoded images ahead and the one at work.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from leanvit.config import PredictConfig
from leanvit.errors import ConfigError, ImageError
from leanvit.image_paths import find_images
from leanvit.imaging import Pixels
from leanvit.progress import Bar, note
from leanvit.runtime.known_boxes import KnownBoxes, boxes_of, read_boxes
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.result_files import nothing_left, open_results, settings_of
from leanvit.runtime.result_lines import Drawings, header, lines
from leanvit.runtime.sources import Image, is_for_parts
from leanvit.runtime.task import Inputs, Options, Task
from leanvit.runtime.vector_files import Known, converter_for, read_vectors

DECODERS = min(4, os.cpu_count() or 1)

MOST_INPUTS = 32
"""Images a step where a user does not say, or fewer where the task asks for it: more are no faster on a CPU."""

NEAREST = 5
"""Images that --against returns where a user does not say."""

VECTOR_ENDINGS = (".npy", ".parquet")
"""Of files that hold vectors and no lines."""

OPTIONS = ("top_k", "against", "score_threshold", "boxes", "draw")
"""Of PredictConfig, those that only some tasks have: `Task.options` names them."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Picture:
    """One image of a run.

    path: where it is, or what names it and reads its bytes. found: what the network found in it. problem: why it could
    not be read, else empty. pixels: (height, width, 3) uint8, where they were to be kept.
    """

    path: Image
    found: Any = None
    problem: str = ""
    pixels: Pixels | None = None


def run(config: PredictConfig) -> int:
    """Write what the network finds in every image; returns how many images were taken.

    Raises DataError where no image could be read, PartialError where some could not: the others are written.
    """
    if not config.images:
        raise ConfigError("no images given. Run: leanvit predict BUNDLE IMAGE...")
    for source in config.images:
        if is_for_parts(source):
            raise ConfigError(f"{source} is read into parts of results in a folder. Give --output FOLDER/")
    if nothing_left(config):
        return 0
    paths = find_images(config.images)
    predictor = Predictor(config.bundle, threads=config.threads, runtime=config.runtime)
    config = settled(config, predictor.task)
    above = header(predictor.task, str(config.format))
    convert = converter_for(config.output) if predictor.task.returns == "vector" else None
    known = read_vectors(config.against) if config.against else None
    boxes = read_boxes(config.boxes) if config.boxes else None
    drawings = Drawings(Path(config.draw), predictor.task.drawn) if config.draw else None
    if drawings:
        paths = drawings.follow(paths)
    settings = settings_of(config, predictor.manifest.sha256)
    with open_results(config, settings, paths, above, convert) as results, Bar("predicting", None) as bar:
        bar.go_on_from(results.images)
        if drawings:
            drawings.pass_over()
        options = Options(top_k=config.top_k or 1, score_threshold=config.score_threshold)
        size = config.batch_size or 1
        with contextlib.closing(find(predictor, paths, size, options, boxes, keep=bool(drawings))) as batches:
            for batch in batches:
                for picture in near_to(batch, known, config.top_k or NEAREST) if known else batch:
                    drawn = _draw(predictor, picture, drawings) if drawings else {}
                    if picture.problem:
                        results.skip(picture.path, picture.problem)
                    else:
                        results.write(picture.path, _lines(predictor, config, picture, drawn))
                results.flush()
                bar.advance(len(batch))
        results.require_one()
    results.require_all()
    return results.images


def near_to(batch: list[Picture], known: Known, count: int) -> list[Picture]:
    """The same pictures with the images that are nearest to their embeddings."""
    vectors = [picture.found for picture in batch if not picture.problem]
    near = iter(known.near(np.stack(vectors), count) if vectors else [])
    return [picture if picture.problem else replace(picture, found=next(near)) for picture in batch]


def require_vectors_fit(config: PredictConfig, task: Task) -> None:
    """Raise ConfigError for options of embeddings that contradict each other."""
    ending = Path(config.output).suffix.lower() if config.output else ""
    if ending not in VECTOR_ENDINGS:
        return
    if config.against:
        raise ConfigError(
            f"output {config.output} is for vectors, but --against returns the nearest images, expected a text file. "
            "Give --output near.jsonl"
        )
    if config.format not in (None, "jsonl"):
        raise ConfigError(f"format {config.format} does not fit output {config.output}. Leave --format out.")


def settled(config: PredictConfig, task: Task) -> PredictConfig:
    """The configuration with what the task takes where nothing is said.

    Raises ConfigError that names an option that does not fit the task.
    """
    searched = ("top_k",) if config.against and "against" in task.options else ()
    for name in OPTIONS:
        if getattr(config, name) is not None and name not in (*task.options, *searched):
            fitting = ", ".join(task.options) or "none"
            raise ConfigError(
                f"{name} does not fit task {task.name} of {config.bundle}, which takes {fitting}. Leave it out."
            )
    if task.returns == "vector":
        require_vectors_fit(config, task)
        config = replace(config, top_k=config.top_k or NEAREST, format=config.format or _vectors_format(config))
    return replace(
        config,
        format=config.format or task.format,
        batch_size=config.batch_size or min(MOST_INPUTS, task.batch_size),
        top_k=config.top_k or 1,
    )


def _vectors_format(config: PredictConfig) -> Literal["text", "jsonl"]:
    """Nearest images are read by people, unless a file for programs is asked for."""
    return "text" if config.against and not str(config.output).endswith(".jsonl") else "jsonl"


def _draw(predictor: Predictor, picture: Picture, drawings: Drawings) -> dict[str, str]:
    name, draw = drawings.next_name(), predictor.task.draw
    if picture.pixels is None or draw is None:
        return {}
    return drawings.write(name, draw(picture.pixels, picture.found, predictor.manifest))


def _lines(predictor: Predictor, config: PredictConfig, picture: Picture, drawn: dict[str, str]) -> str:
    return lines(predictor.task, predictor.manifest, str(config.format), picture.path, picture.found, drawn)


def find(
    predictor: Predictor,
    paths: Iterable[Image],
    batch_size: int,
    options: Options,
    boxes: KnownBoxes | None = None,
    *,
    keep: bool = False,
    decoders: int = DECODERS,
) -> Generator[list[Picture], None, None]:
    """Every image with what the network finds in it, `batch_size` at a time in the order of `paths`.

    boxes: of the objects that are looked at, by picture. keep: hand over the pixels as well. decoders: threads that
    read images.
    """
    pool = ThreadPoolExecutor(decoders, "decode")
    try:
        prepared = in_order(pool, lambda path: _prepare(predictor, path, options, boxes, keep), paths, 2 * batch_size)
        while batch := list(islice(prepared, batch_size)):
            for one in batch:
                for sentence in one.notes:
                    note(sentence)
            found = iter(predictor.results([one.inputs for one in batch if one.inputs], options, batch_size))
            yield [replace(one.picture, found=next(found)) if one.inputs is not None else one.picture for one in batch]
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class _Prepared:
    """One image as the network sees it, or the problem that it has, and what is to be said of it."""

    picture: Picture
    inputs: Inputs | None
    notes: list[str]


def _prepare(predictor: Predictor, path: Image, options: Options, boxes: KnownBoxes | None, keep: bool) -> _Prepared:
    own = boxes_of(boxes, Path(str(path))) if boxes is not None else None
    if boxes is not None:
        options = replace(options, boxes=own or [])
    try:
        if isinstance(path, Path):
            inputs, sentences, pixels = predictor.read(path, options, keep=keep)
        else:
            inputs, sentences, pixels = predictor.read(path.read(), options, path.name, keep=keep)
    except ImageError as error:
        return _Prepared(Picture(path, problem=str(error)), None, [f"skipped {error}"])
    notes = [f"{path}: {sentence}" for sentence in sentences]
    if boxes is not None and own is None:
        notes.append(f"{path}: not among the pictures of --boxes, so nothing is looked for")
    return _Prepared(Picture(path, pixels=pixels), inputs, notes)


def in_order(
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
