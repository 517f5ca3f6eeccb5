"""Where predictions go: standard output, a device, or a file that is whole or absent and outlives a killed run.

A run writes OUTPUT.partial. Once a second what it wrote is brought to the disk, and then a line is added to
OUTPUT.partial.progress: how many images were taken, how many of them skipped, how many bytes of results there are.
A run that goes on cuts OUTPUT.partial to the bytes of the last line and passes over the images that it counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from leanvit._version import __version__
from leanvit.config import PredictConfig, to_dict
from leanvit.errors import ConfigError, DataError, PartialError, RunLockedError
from leanvit.files import explain_os_error
from leanvit.progress import note
from leanvit.runtime.sources import Image

SAVE_SECONDS = 1.0

NO_MATTER = ("output", "resume", "ray", "ray_workers", "version")
"""Of PredictConfig, what results do not depend on."""


@dataclass(frozen=True)
class Checkpoint:
    """How far a run had come.

    images: taken from the inputs. skipped: those of them that could not be read. problem: what the first of these had.
    paths: SHA-256 of the paths of all images taken. bytes: of results.
    """

    images: int = 0
    skipped: int = 0
    problem: str = ""
    paths: str = hashlib.sha256().hexdigest()
    bytes: int = 0


class Results:
    """Lines about images in the order of the inputs, and the count of all images."""

    def __init__(self, file: TextIO, header: str = "") -> None:
        """Write to `file` from its start. header: what stands before the first image, with the end of its line."""
        self.images = self.skipped = 0
        self.problem = ""
        self._file = file
        self._header = header
        self._empty = True
        self._paths = hashlib.sha256()

    def write(self, image: Image, lines: str) -> None:
        """Count an image and write its lines, which end with the end of a line."""
        self._take(image)
        if self._empty:
            self._file.write(self._header)
        self._empty = False
        self._file.write(lines)

    def skip(self, image: Image, problem: str) -> None:
        """Count an image that could not be read."""
        self._take(image)
        self.skipped += 1
        self.problem = self.problem or problem

    def _take(self, image: Image) -> None:
        self.images += 1
        self._paths.update(os.fsencode(str(image)) + b"\0")

    def flush(self) -> None:
        """Let a reader see what was written; to be called where a batch ends."""
        self._file.flush()

    def require_one(self) -> None:
        """Raise DataError where none of the images could be read."""
        if self.skipped == self.images:
            alone = self.images == 1
            raise DataError(self.problem if alone else f"none of {self.images} images could be read: {self.problem}")

    def require_all(self) -> None:
        """Raise PartialError where some of the images could not be read."""
        if self.skipped:
            raise PartialError(
                f"{self.skipped} of {self.images} images could not be read and were skipped (see above)."
            )


class _Draft(Results):
    """OUTPUT.partial, and beside it how far it goes."""

    def __init__(self, path: Path, file: TextIO, header: str) -> None:
        """Write to `file`, which is open at `path`."""
        super().__init__(file, header)
        self._path = path
        self._journal = _journal_of(path)
        self._saved = time.monotonic()

    def start(self, settings: dict[str, Any]) -> None:
        """Forget what is there."""
        # In this order: results of this run must never stand beside the progress of another.
        self._journal.unlink(missing_ok=True)
        self._file.truncate(0)
        self._note({"settings": settings})

    def go_on(self, settings: dict[str, Any], paths: Iterator[Path]) -> bool:
        """Keep what is there and take its images from `paths`; False where nothing was noted yet.

        Raises ConfigError where it comes from other settings or images, DataError where it was cut.
        """
        before, found = self._read()
        if before is None or found is None:
            return False
        changed = [name for name in settings | before if settings.get(name) != before.get(name)]
        if changed:
            raise ConfigError(
                f"{self._path} was written with {_told(before, changed)}; found {_told(settings, changed)}. "
                "Go on with the command that wrote it, or start over without --resume."
            )
        size = self._path.stat().st_size
        if size < found.bytes:
            raise DataError(
                f"{self._path}: {size} bytes, expected at least {found.bytes}: the file was cut or replaced. "
                "Start over without --resume."
            )
        for path in islice(paths, found.images):
            self._take(path)
        if self._paths.hexdigest() != found.paths:
            raise ConfigError(
                f"{self._path} was written for {found.images} images that are not the first ones now: files were "
                "added, removed or renamed. Start over without --resume."
            )
        self.skipped, self.problem, self._empty = found.skipped, found.problem, found.bytes == 0
        self._file.truncate(found.bytes)
        self._file.seek(0, os.SEEK_END)
        note(f"{self._path}: going on after {found.images} images")
        return True

    def _read(self) -> tuple[dict[str, Any] | None, Checkpoint | None]:
        settings = last = None
        if self._journal.is_file():
            with open(self._journal, encoding="utf-8") as file:
                for entry in map(_parse, file):
                    settings = entry.get("settings", settings)
                    last = entry if "images" in entry else last
        return settings, Checkpoint(**last) if last else None

    def flush(self) -> None:
        """Let a reader see what was written and, once a second, note how far it goes."""
        super().flush()
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            # In this order: what is noted must be on the disk.
            os.fsync(self._file.fileno())
            size = os.fstat(self._file.fileno()).st_size
            self._note(asdict(Checkpoint(self.images, self.skipped, self.problem, self._paths.hexdigest(), size)))
            self._saved = time.monotonic()

    def _note(self, entry: dict[str, Any]) -> None:
        with open(self._journal, "a", encoding="utf-8") as file:
            # The line before may lack its end where a run was killed.
            file.write(f"\n{json.dumps(entry)}")

    def finish(self, target: Path, convert: Callable[[Path, Path], None] | None = None) -> None:
        """Put the whole file in its place, or what `convert`(lines, target) makes of it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if convert is None:
            os.replace(self._path, target)
        else:
            convert(self._path, target)
            self._path.unlink()
        self._journal.unlink(missing_ok=True)

    def keep(self) -> None:
        """Say where the results up to here are; where there are none, remove the file."""
        with contextlib.suppress(OSError):
            self._file.flush()
        if self._path.exists() and self._path.stat().st_size:
            note(f"{self._path}: the results up to here; the same command with --resume goes on")
        else:
            self._path.unlink(missing_ok=True)
            self._journal.unlink(missing_ok=True)


def _parse(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:  # cut by a kill
        return {}


def _told(settings: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {str(settings.get(name))[:60]}" for name in names)


def _draft_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.partial")


def nothing_left(config: PredictConfig) -> bool:
    """Whether `config.resume` finds whole results and no newer run, and says so.

    Raises ConfigError where there is no file to go on with.
    """
    if not config.resume:
        return False
    if not config.output:
        raise ConfigError("resume without output, expected the file of the run to go on with. Give --output FILE.")
    draft = _draft_of(Path(config.output))
    if not Path(config.output).is_file() or draft.exists():
        return False
    # A kill after the last rename leaves it.
    _journal_of(draft).unlink(missing_ok=True)
    note(f"{config.output}: already there and whole, nothing to go on with; without --resume it is made again")
    return True


def settings_of(config: PredictConfig, bundle: str) -> dict[str, Any]:
    """All that the bytes of the results depend on, but for what the files hold. bundle: SHA-256 of its manifest."""
    given = {key: value for key, value in to_dict(config).items() if key not in NO_MATTER}
    # The bundle may have moved; rounding may differ between versions, batch sizes and threads.
    return given | {"bundle": bundle, "leanvit": __version__}


def _journal_of(draft: Path) -> Path:
    return draft.with_name(f"{draft.name}.progress")


@contextlib.contextmanager
def open_results(
    config: PredictConfig,
    settings: dict[str, Any],
    paths: Iterator[Path],
    header: str = "",
    convert: Callable[[Path, Path], None] | None = None,
) -> Iterator[Results]:
    """Where results go. A file is whole or as it was before; what was finished before a failure is in PATH.partial.

    settings: what results depend on. paths: the images; with `config.resume` those that are done are taken from it.
    header: what stands before the first image, with the end of its line. convert: makes the file that was asked for of
    the whole one that was written.
    Raises ConfigError and DataError where the run before can't be gone on with, RunLockedError where it still runs,
    EnvironmentProblem where the file can't be written.
    """
    if config.output is None:
        yield Results(sys.stdout, header)
        return
    target = Path(config.output)
    try:
        # A device or a pipe, such as /dev/stdout, can't be renamed to.
        if target.exists() and not target.is_file():
            if config.resume:
                raise ConfigError(f"resume with output {target}, expected a file: a device keeps no results.")
            with open(target, "w", encoding="utf-8", newline="") as file:
                yield Results(file, header)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with _only_writer(_draft_of(target)) as file:
            draft = _Draft(_draft_of(target), file, header)
            if not (config.resume and draft.go_on(settings, paths)):
                draft.start(settings)
            try:
                yield draft
                draft.finish(target, convert)
            except BaseException:
                draft.keep()
                raise
    except OSError as error:
        raise explain_os_error(error, target) from error


@contextlib.contextmanager
def _only_writer(path: Path) -> Iterator[TextIO]:
    """A file opened for one process, with what it holds."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with open(descriptor, "w", encoding="utf-8", newline="") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            mine = False
        if not mine:  # locked, or finished and renamed just now
            raise RunLockedError(f"{path}: another process is writing here. Wait for it or choose another --output.")
        yield file
