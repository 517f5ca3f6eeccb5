"""Embeddings as .npy, .parquet or JSON lines: made of the lines of a run, and read to be searched. No torch.

A .npy file holds numbers alone, so the names of the images are beside it, in STEM.paths.jsonl: a line an image, in the
order of the rows. Rows pass through one by one; nothing is held but a block of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.errors import ConfigError, DataError, require
from leanvit.runtime.neighbours import nearest
from leanvit.runtime.tasks.embed import Near

ROWS = 4096
"""Vectors that are held at a time, and a row group of a .parquet file: 6 MB of 384 numbers each."""

Vectors = NDArray[np.float32]


def converter_for(output: str | None) -> Callable[[Path, Path], None] | None:
    """What makes OUTPUT of a file of JSON lines: by its ending; None where the lines themselves are wanted.

    Raises MissingDependencyError where a package is needed for it.
    """
    ending = Path(output).suffix.lower() if output else ""
    if ending == ".parquet":
        require("pyarrow")
    return {".npy": write_npy, ".parquet": write_parquet}.get(ending)


def paths_beside(file: Path) -> Path:
    """Where the names of the images of a .npy file are."""
    return file.with_suffix(".paths.jsonl")


def write_npy(lines: Path, target: Path) -> None:
    """From JSON lines with `path` and `embedding` to (N, D) float32, and the paths beside it."""
    count = sum(1 for _ in _read_lines(lines))
    staged = [path.with_name(f"{path.name}.partial-{target.suffix[1:]}") for path in (target, paths_beside(target))]
    rows: Any = None
    with staged[1].open("w", encoding="utf-8") as names:
        for number, (path, vector) in enumerate(_read_lines(lines)):
            if rows is None:
                shape = (count, len(vector))
                rows = np.lib.format.open_memmap(staged[0], mode="w+", dtype=np.float32, shape=shape)
            rows[number] = vector
            names.write(json.dumps({"path": path}) + "\n")
    if rows is not None:
        rows.flush()
    # Names first: vectors are there only with theirs.
    staged[1].replace(paths_beside(target))
    staged[0].replace(target)


def write_parquet(lines: Path, target: Path) -> None:
    """From JSON lines with `path` and `embedding` to columns path (string) and embedding (fixed list of float32)."""
    arrow, parquet = require("pyarrow"), require("pyarrow.parquet")
    staged = target.with_name(f"{target.name}.partial-parquet")
    found = _read_lines(lines)
    with ExitStack() as stack:
        writer: Any = None
        while rows := list(islice(found, ROWS)):
            values = np.stack([vector for _, vector in rows])
            flat = arrow.array(values.reshape(-1), arrow.float32())
            columns = {
                "path": arrow.array([path for path, _ in rows], arrow.string()),
                "embedding": arrow.FixedSizeListArray.from_arrays(flat, values.shape[1]),
            }
            table = arrow.table(columns)
            writer = writer or stack.enter_context(parquet.ParquetWriter(staged, table.schema))
            writer.write_table(table)
    staged.replace(target)


def _read_lines(path: Path) -> Iterator[tuple[str, Vectors]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                yield str(values["path"]), np.asarray(values["embedding"], np.float32)
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: no JSON with path and embedding, expected a line of leanvit predict. "
                    "Make the file again: leanvit predict BUNDLE IMAGES --output FILE"
                ) from error


# --- reading ---


@dataclass(frozen=True)
class Known:
    """Vectors of images that are searched. file: where they are. rows: (N, D). names: how each image is called."""

    file: Path
    rows: NDArray[Any]
    names: tuple[str, ...]

    @cached_property
    def width(self) -> int:
        """Numbers a vector."""
        return int(self.rows.shape[1])

    def near(self, queries: Vectors, count: int) -> list[list[Near]]:
        """The `count` nearest images to each of some vectors (Q, D), nearest first.

        Raises ConfigError where these have another length.
        """
        if queries.shape[1] != self.width:
            raise ConfigError(
                f"{self.file} holds vectors of {self.width} numbers, the bundle returns {queries.shape[1]}, expected "
                "vectors of the same network. Make them with this bundle: leanvit predict BUNDLE IMAGES --output FILE"
            )
        places, cosines = nearest(queries, self.rows, count)
        return [
            [Near(self.names[place], float(cosine)) for place, cosine in zip(*row, strict=True)]
            for row in zip(places.tolist(), cosines.tolist(), strict=True)
        ]


def read_vectors(path: str) -> Known:
    """Vectors of a .npy, .parquet or .jsonl file of leanvit predict, with the names of their images.

    A .npy file is mapped, not read. Where no names are beside it, images are called by their row.
    Raises DataError where the file is missing or is none of them, MissingDependencyError.
    """
    file = Path(path)
    readers = {".npy": _read_npy, ".parquet": _read_parquet, ".jsonl": _read_jsonl}
    if not file.is_file() or file.suffix.lower() not in readers:
        what = "ends in none of them" if file.is_file() else "is no file"
        raise DataError(
            f"{path} {what}, expected vectors as .npy, .parquet or .jsonl. Make them: leanvit predict BUNDLE IMAGES "
            "--output vectors.npy"
        )
    try:
        rows, names = readers[file.suffix.lower()](file)
    except (OSError, ValueError, KeyError) as error:  # ArrowInvalid is a ValueError
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"{path}: no vectors can be read ({reason}). Make the file again: leanvit predict") from error
    if rows.ndim != 2 or not rows.size or len(rows) != len(names):
        raise DataError(
            f"{path}: an array {rows.shape} and {len(names)} names of images, expected (images, D) and a name each. "
            "Make both again: leanvit predict BUNDLE IMAGES --output FILE"
        )
    return Known(file, rows, names)


def _read_npy(file: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    rows: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    beside = paths_beside(file)
    if not beside.is_file():
        return rows, tuple(f"row {number}" for number in range(len(rows)))
    with beside.open(encoding="utf-8") as names:
        return rows, tuple(str(json.loads(line)["path"]) for line in names)


def _read_parquet(file: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    require("pyarrow")
    table = require("pyarrow.parquet").read_table(file, columns=["path", "embedding"]).combine_chunks()
    names = tuple(table.column("path").to_pylist())
    flat = table.column("embedding").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float32).reshape(len(names), -1), names


def _read_jsonl(file: Path) -> tuple[NDArray[Any], tuple[str, ...]]:
    found = list(_read_lines(file))
    return np.stack([vector for _, vector in found]), tuple(path for path, _ in found)
