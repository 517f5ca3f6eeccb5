"""What is written of one picture: text, a JSON line or rows of a table, whatever the task; and drawn pictures."""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leanvit.errors import ConfigError
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.sources import Image as Source
from leanvit.runtime.task import Task


def header(task: Task, format: str) -> str:
    """What stands above all pictures: the columns of csv, else nothing. Raises ConfigError for a task without rows."""
    if format != "csv":
        return ""
    if task.rows is None:
        raise ConfigError(f"format csv does not fit task {task.name}, expected text or jsonl. Leave it out.")
    return _csv([["path", *task.columns]])


def lines(task: Task, manifest: Manifest, format: str, path: Source, found: Any, drawn: dict[str, str]) -> str:
    """One picture in `format`, with the ends of its lines. drawn: names of the pictures that were drawn, by key."""
    name = printed(path)
    if format == "jsonl":
        return json.dumps({"path": name, **task.line(found, manifest), **drawn}) + "\n"
    if format == "csv" and task.rows is not None:
        return _csv([[name, *row] for row in task.rows(found, manifest)])
    return f"{name}: {task.text(found, manifest)}\n"


def printed(path: Source) -> str:
    """The name of a picture as results have it. It need not be UTF-8, they are: bytes that are not become \\xNN."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _csv(rows: list[list[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


@dataclass
class Drawings:
    """Where drawn pictures go: by stem, numbered where pictures of other folders have the same.

    keys: of the pictures that the task draws; `drawn` is STEM.png, another one STEM.KEY.png.
    """

    folder: Path
    keys: tuple[str, ...]
    _used: set[str] = field(default_factory=set)
    _names: deque[str] = field(default_factory=deque)

    def follow(self, paths: Iterator[Path]) -> Iterator[Path]:
        """The same paths, each with its name from when it is taken: also where a run that goes on passes it over."""
        for path in paths:
            numbered = (path.stem if number == 1 else f"{path.stem}-{number}" for number in itertools.count(1))
            name = next(name for name in numbered if not self._files(name) & self._used)
            self._used |= self._files(name)
            self._names.append(name)
            yield path

    def _files(self, name: str) -> set[str]:
        return {name if key == "drawn" else f"{name}.{key}" for key in self.keys}

    def pass_over(self) -> None:
        """Forget the names of the pictures that were taken up to here."""
        self._names.clear()

    def next_name(self) -> str:
        """The name of the next picture, in the order in which they were taken."""
        return self._names.popleft()

    def write(self, name: str, pictures: dict[str, NDArray[np.uint8]]) -> dict[str, str]:
        """Write pictures (height, width, 3) and maps (height, width); returns their paths by key."""
        self.folder.mkdir(parents=True, exist_ok=True)
        written = {}
        for key, pixels in pictures.items():
            path = self.folder / (f"{name}.png" if key == "drawn" else f"{name}.{key}.png")
            Image.fromarray(pixels).save(path)
            written[key] = str(path)
        return written
