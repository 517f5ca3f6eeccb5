"""leanvit predict --output FOLDER/: results in parts, each of which is whole or absent, whoever makes them. No torch.

    FOLDER/run.json                     what the results depend on
    FOLDER/part-000007-1f3a90bc.jsonl   rows of the images of piece 7, in their order; .parquet where that is asked for
    FOLDER/manifest.json                written last: all parts, how many images, how many could not be read

The number of a part is that of its piece (leanvit.runtime.sources), and its digits say what that read: a run that goes
on makes the parts that are not there, whatever was killed, and no row is there twice. An image that can't be read is a
row with the reason in `error`. `run` is given what makes parts of pieces: this process, or many on Ray.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from leanvit.config import PredictConfig
from leanvit.errors import ConfigError, DataError, LeanvitError, PartialError
from leanvit.passed_over import few
from leanvit.progress import Bar, note
from leanvit.runtime.bundle import load_golden
from leanvit.runtime.known_boxes import KnownBoxes, read_boxes
from leanvit.runtime.part_tables import columns_of, rows_as_parquet, rows_in_parquet
from leanvit.runtime.places import Folder, is_url
from leanvit.runtime.predict import NEAREST, Picture, find, near_to, settled
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.result_files import settings_of
from leanvit.runtime.result_lines import lines, printed
from leanvit.runtime.sources import Piece, images_of, pieces_of
from leanvit.runtime.task import Options
from leanvit.runtime.vector_files import Known, read_vectors

RUN, MANIFEST = "run.json", "manifest.json"

NOTES = 20
"""Lines of one part that are said: a folder full of odd files would say as many as it has images."""


@dataclass(frozen=True)
class Job:
    """What every part of a run is made by, wherever that is.

    config: settled (leanvit.runtime.predict.settled). boxes, known: what its options name, read. columns: of Parquet
    files, by the bundle's first golden image.
    """

    config: PredictConfig
    boxes: KnownBoxes | None
    known: Known | None
    columns: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """What became of one piece.

    data: the file. images: rows of images; skipped: those of them that could not be read. notes: to be said.
    failure: why there is no file, else empty.
    """

    data: bytes = b""
    images: int = 0
    skipped: int = 0
    notes: tuple[str, ...] = ()
    failure: str = ""


Numbered = tuple[int, Piece]
Work = Callable[[Job, Iterator[Numbered]], Iterator[tuple[int, Piece, Part]]]
"""Makes the part of every piece, in any order."""


def run(config: PredictConfig, work: Work | None = None) -> int:
    """Write what the network finds in every image into a folder; returns how many images were taken.

    work: what makes the parts; None: this process.
    Raises ConfigError for options that don't fit and for a folder that holds another run, DataError where no image
    could be read, PartialError where some could not or a piece failed: all else is written.
    """
    _require_fitting(config)
    predictor = Predictor(config.bundle, threads=config.threads, runtime=config.runtime)
    config = settled(replace(config, format="jsonl") if config.format is None else config, predictor.task)
    boxes = read_boxes(config.boxes) if config.boxes else None
    known = read_vectors(config.against) if config.against else None
    job = Job(config, boxes, known, _columns(predictor, known) if config.format == "parquet" else {})
    folder = Folder(str(config.output))
    there = _begin(folder, config, predictor.manifest.sha256)
    if there is None:
        found = json.loads(folder.read(MANIFEST))
        return _told(folder, found["images"], found["skipped"])
    tally = _Tally(folder, there, config)
    todo = tally.missing(enumerate(pieces_of(config.images, config.part_images)))
    with Bar("predicting", None) as bar:
        _expect(bar, config)
        bar.go_on_from(tally.images)
        started, before = time.monotonic(), tally.images
        for number, piece, part in (work or alone(predictor))(job, todo):
            tally.add(number, piece, part)
            speed = (tally.images - before) / (time.monotonic() - started)
            bar.advance(part.images, f"{speed:.0f} images/s")
    return tally.finish()


def alone(predictor: Predictor) -> Work:
    """The work of this process, one piece after the other."""
    return lambda job, todo: ((number, piece, make_part(predictor, job, piece)) for number, piece in todo)


def make_part(predictor: Predictor, job: Job, piece: Piece) -> Part:
    """The part of one piece. What a piece holds can't end a run: a shard that can't be read is a failure by name."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            pictures = list(_pictures(predictor, job, piece))
    except (DataError, OSError) as error:  # of a store that breaks off
        return Part(failure=f"{piece}: {error}" if isinstance(error, OSError) else str(error))
    rows = [_row(predictor, picture) for picture in pictures]
    data = rows_as_parquet(rows, job.columns) if job.config.format == "parquet" else "".join(rows).encode()
    skipped = sum(1 for picture in pictures if picture.problem)
    notes = said.getvalue().splitlines()
    more = [f"... and {len(notes) - NOTES} more lines of {piece}"] if len(notes) > NOTES else []
    return Part(data, len(pictures), skipped, (*notes[:NOTES], *more))


def _pictures(predictor: Predictor, job: Job, piece: Piece) -> Iterator[Picture]:
    config = job.config
    options = Options(top_k=config.top_k or 1, score_threshold=config.score_threshold)
    decoders = config.threads or 1
    batches = find(predictor, images_of(piece), config.batch_size or 1, options, job.boxes, decoders=decoders)
    with contextlib.closing(batches):
        for batch in batches:
            yield from near_to(batch, job.known, config.top_k or NEAREST) if job.known else batch


def _row(predictor: Predictor, picture: Picture) -> str:
    if picture.problem:
        return json.dumps({"path": printed(picture.path), "error": picture.problem}) + "\n"
    return lines(predictor.task, predictor.manifest, "jsonl", picture.path, picture.found, {})


def wants_parts(config: PredictConfig) -> bool:
    """Whether results go to a folder, by what a user says: FOLDER/, one that is there, a URL, Parquet parts, Ray."""
    output = config.output or ""
    is_folder = output.endswith("/") or is_url(output) or Path(output).is_dir() if output else False
    return is_folder or config.ray is not None or config.format == "parquet"


def _require_fitting(config: PredictConfig) -> None:
    if not config.images:
        raise ConfigError("no images given. Run: leanvit predict BUNDLE IMAGE... --output FOLDER/")
    if not config.output:
        raise ConfigError("results of many processes go to a folder. Give --output FOLDER/")
    if config.draw:
        raise ConfigError("draw does not fit results in a folder. Leave --draw out, or give a file as --output.")
    if config.format not in (None, "jsonl", "parquet"):
        raise ConfigError(f"format {config.format} does not fit a folder, expected jsonl or parquet. Leave it out.")


def _columns(predictor: Predictor, known: Known | None) -> dict[str, bool]:
    options = Options()
    found = predictor.results([predictor.read(load_golden(predictor.folder)[0][0], options)[0]], options)[0]
    return columns_of(predictor.task.line(known.near(found[None], 1)[0] if known else found, predictor.manifest))


def _begin(folder: Folder, config: PredictConfig, bundle: str) -> dict[int, str] | None:
    """Names of the parts that are there, by number; None where the run is whole.

    Raises ConfigError where the folder holds another run, or this one without `config.resume`.
    """
    settings = settings_of(config, bundle)
    names = folder.names()
    if RUN not in names:
        if config.resume:
            raise ConfigError(f"{folder.place} holds no run to go on with. Leave --resume out.")
        if any(name.startswith("part-") for name in names):
            raise ConfigError(f"{folder.place} holds parts of something else. Choose another --output.")
        folder.write(RUN, json.dumps(settings, indent=2).encode())
        return {}
    before = json.loads(folder.read(RUN))
    changed = [name for name in settings | before if json.dumps(settings.get(name)) != json.dumps(before.get(name))]
    if changed:
        told = "; ".join(f"{name} was {before.get(name)}, is {settings.get(name)}" for name in changed)
        raise ConfigError(f"{folder.place} holds another run ({told[:300]}). Choose another --output.")
    if not config.resume:
        raise ConfigError(f"{folder.place} holds this run already. Go on with --resume, or choose another --output.")
    if MANIFEST in names:
        note(f"{folder.place}: already there and whole, nothing to go on with")
        return None
    return {int(name.split("-")[1]): name for name in names if name.startswith("part-")}


class _Tally:
    """The parts of a run as they come.

    images, skipped: of all parts that are there. parts: what the manifest says of each, by number.
    """

    def __init__(self, folder: Folder, there: dict[int, str], config: PredictConfig) -> None:
        self.folder, self.there, self.config = folder, there, config
        self.images = self.skipped = 0
        self.parts: dict[int, dict[str, Any]] = {}
        self.failures: list[str] = []
        for number, name in sorted(there.items()):
            data = folder.read(name)
            self._count(number, name, data, *_counted(name, data))

    def missing(self, pieces: Iterable[Numbered]) -> Iterator[Numbered]:
        """The pieces that have no part. Raises ConfigError where a part is of other images."""
        left = dict(self.there)
        for number, piece in pieces:
            name = left.pop(number, None)
            if name is None:
                yield number, piece
            elif name.split(".")[0] != self.name_of(number, piece):
                raise ConfigError(
                    f"{self.folder.place}/{name} is of other images than {piece} now: files were added, removed or "
                    "renamed. Choose another --output."
                )
        if left:
            gone = few(sorted(left.values()))
            raise ConfigError(f"{self.folder.place}: {gone} are of images that are gone. Choose another --output.")

    @staticmethod
    def name_of(number: int, piece: Piece) -> str:
        """Of a part, without its ending."""
        return f"part-{number:06d}-{piece.digest}"

    def add(self, number: int, piece: Piece, part: Part) -> None:
        """Write a part, and say what is to be said of it."""
        for line in part.notes:
            note(line)
        if part.failure:
            note(f"failed: {part.failure}")
            self.failures.append(part.failure)
            return
        name = f"{self.name_of(number, piece)}.{self.config.format}"
        self.folder.write(name, part.data)
        self._count(number, name, part.data, part.images, part.skipped)

    def _count(self, number: int, name: str, data: bytes, images: int, skipped: int) -> None:
        self.images += images
        self.skipped += skipped
        digest = hashlib.sha256(data).hexdigest()
        self.parts[number] = {"file": name, "images": images, "skipped": skipped, "sha256": digest}

    def finish(self) -> int:
        """Write the manifest, unless something failed. Raises PartialError and DataError as `run` says."""
        if self.failures:
            raise PartialError(
                f"{len(self.failures)} parts could not be made: {few(self.failures)}. The others are kept; "
                "the same command with --resume tries these again."
            )
        parts = [self.parts[number] for number in sorted(self.parts)]
        found = {"images": self.images, "skipped": self.skipped, "parts": parts, "settings": _plain(self.config)}
        self.folder.write(MANIFEST, (json.dumps(found, indent=2) + "\n").encode())
        return _told(self.folder, self.images, self.skipped)


def _told(folder: Folder, images: int, skipped: int) -> int:
    """How many images a whole run has. Raises PartialError where some could not be read, DataError where none could."""
    where = f"{folder.place}/part-*"
    if images and skipped == images:
        raise DataError(f"none of {images} images could be read: see `error` in {where}.")
    if skipped:
        raise PartialError(f"{skipped} of {images} images could not be read: see `error` of their rows in {where}.")
    return images


def _plain(config: PredictConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if name not in ("ray", "ray_workers", "resume")}


def _counted(name: str, data: bytes) -> tuple[int, int]:
    """Images of a part, and those that could not be read. Raises DataError for a part that is damaged."""
    try:
        rows = rows_in_parquet(data) if name.endswith("parquet") else [json.loads(row) for row in data.splitlines()]
    except ValueError as error:
        raise DataError(f"{name}: damaged ({error}). Remove it; it is made again.") from error
    return len(rows), sum(1 for row in rows if row.get("error"))


def _expect(bar: Bar, config: PredictConfig) -> None:
    """Let the bar know how many images there are, as soon as they are counted beside the work."""

    def count() -> None:
        total = 0
        with contextlib.suppress(LeanvitError):  # the run itself says what is wrong
            for piece in pieces_of(config.images, config.part_images):
                if piece.file:
                    return
                total += len(piece.paths)
            bar.expect(total)

    threading.Thread(target=count, name="count", daemon=True).start()
