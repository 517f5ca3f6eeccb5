"""Images of a run that may be spread over machines: what each piece of work reads, and its images one by one. No torch.

A piece is what one process does in one go and what becomes one part of the results: some paths or URLs, a row group of
a Parquet file, or a shard of WebDataset. It holds no pixels, and its images have the same names wherever it is read.
"""

from __future__ import annotations

import glob
import hashlib
import posixpath
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

from leanvit.errors import DataError, ImageError, require
from leanvit.image_paths import find_images, is_hidden, is_wild, read_lines
from leanvit.imaging import SUFFIXES
from leanvit.runtime.places import images_at, is_url, opened, store_of

PARQUET, TAR = ".parquet", ".tar"
IMAGE_COLUMNS = ("image", "jpg", "png", "bytes", "content")
"""Of Parquet files: encoded images, alone or as the field `bytes` of Hugging Face's struct."""
NAME_COLUMNS = ("path", "name", "file_name", "id", "key", "url")


@dataclass(frozen=True)
class Encoded:
    """An image that is no local file: its name, and what reads its bytes."""

    name: str
    load: Callable[[], bytes]

    def __str__(self) -> str:
        """Its name."""
        return self.name

    def read(self) -> bytes:
        """The encoded image. Raises ImageError where there is none, DataError where its store can't be read."""
        return self.load()


Image = Path | Encoded


@dataclass(frozen=True)
class Piece:
    """What one process reads in one go.

    paths: of images, by path or URL; else `file`, a shard or Parquet file, of which `group` is the row group.
    """

    paths: tuple[str, ...] = ()
    file: str = ""
    group: int = 0

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of what it reads."""
        named = "\0".join((*self.paths, self.file, str(self.group)))
        return hashlib.blake2b(named.encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()

    def __str__(self) -> str:
        """In words, for errors."""
        if self.file:
            return f"row group {self.group} of {self.file}" if self.file.endswith(PARQUET) else self.file
        return f"{self.paths[0]} to {self.paths[-1]}"


def pieces_of(sources: Sequence[str], images: int) -> Iterator[Piece]:
    """All pieces of some sources, in a fixed order: paths and URLs of images, folders, @lists, patterns, Parquet files
    and WebDataset shards (.tar), also as patterns.

    images: how many a piece has at most, where it has paths. Raises as `find_images`; DataError for a shard.
    """
    plain: list[str] = []
    for source in sources:
        shards = _shards(source)
        if shards:
            yield from _of_paths(plain, images)
            plain = []
            for shard in shards:
                yield from _of_shard(shard)
        else:
            plain.append(source)
    yield from _of_paths(plain, images)


def is_for_parts(source: str) -> bool:
    """Whether a source is read by pieces alone: a URL, a list of URLs, a shard or a Parquet file."""
    return is_url(source) or source.endswith((PARQUET, TAR)) or _lists_urls(source)


def images_of(piece: Piece) -> Iterator[Image]:
    """The images of a piece, one by one. Raises DataError where a shard can't be read."""
    if piece.file.endswith(PARQUET):
        yield from _rows(piece)
    elif piece.file:
        yield from _members(piece.file)
    else:
        for path in piece.paths:
            yield Encoded(path, partial(_bytes_at, path)) if is_url(path) else Path(path)


def _of_paths(sources: list[str], images: int) -> Iterator[Piece]:
    paths = _paths(sources)
    while some := tuple(islice(paths, images)):
        yield Piece(some)


def _paths(sources: list[str]) -> Iterator[str]:
    """Paths and URLs of images, those of neighbouring local sources in one search."""
    local: list[str] = []
    for source in sources:
        if is_url(source):
            yield from map(str, find_images(local) if local else ())
            local = []
            yield from _lines_at(source[1:]) if source.startswith("@") else images_at(source)
        elif _lists_urls(source):
            yield from read_lines(Path(source[1:]))
        else:
            local.append(source)
    yield from map(str, find_images(local) if local else ())


def _lists_urls(source: str) -> bool:
    path = Path(source[1:])
    is_list = source.startswith("@") and not Path(source).exists() and path.is_file()
    return is_list and is_url(next(read_lines(path), ""))


def _lines_at(url: str) -> Iterator[str]:
    with opened(url) as file:
        yield from filter(None, (line.decode("utf-8").rstrip("\r\n") for line in file))


def _shards(source: str) -> list[str]:
    """Parquet files or tar shards that a source names; none where it means images."""
    if not source.endswith((PARQUET, TAR)):
        return []
    if is_url(source):
        if not is_wild(source):
            return [source]
        store, path = store_of(source)
        found = [store.unstrip_protocol(name) for name in sorted(store.glob(path))]
    else:
        found = [source] if Path(source).exists() else sorted(glob.glob(source))
    if not found:
        raise DataError(f"{source}: no such file. Check the path.")
    return found


def _of_shard(shard: str) -> Iterator[Piece]:
    if shard.endswith(TAR):
        yield Piece(file=shard)
        return
    with opened(shard) as file:
        groups = _parquet(shard, file).num_row_groups
    yield from (Piece(file=shard, group=group) for group in range(groups))


def _parquet(name: str, file: IO[bytes]) -> Any:
    arrow = require("pyarrow")
    try:
        return require("pyarrow.parquet").ParquetFile(file)
    except (OSError, arrow.ArrowInvalid) as error:
        raise DataError(f"{name}: not a Parquet file ({error}). Write it again.") from error


def _rows(piece: Piece) -> Iterator[Encoded]:
    """Images of one row group, called by the column of names or by the number of their row."""
    with opened(piece.file) as file:
        parquet = _parquet(piece.file, file)
        columns = parquet.schema_arrow.names
        image, name = (next((c for c in known if c in columns), None) for known in (IMAGE_COLUMNS, NAME_COLUMNS))
        if image is None:
            raise DataError(
                f"{piece.file}: columns {', '.join(columns)}, expected encoded images in one called "
                f"{', '.join(IMAGE_COLUMNS)}. Rename it."
            )
        first = sum(parquet.metadata.row_group(i).num_rows for i in range(piece.group))
        table = parquet.read_row_group(piece.group, columns=[c for c in (image, name) if c])
    for number, row in enumerate(table.to_pylist(), first):
        value = row[image]
        data = value.get("bytes") if isinstance(value, dict) else value
        called = str(row[name]) if name and row[name] is not None else f"{piece.file}#{number}"
        yield Encoded(called, partial(_require_bytes, data, called))


def _require_bytes(data: Any, name: str) -> bytes:
    if not isinstance(data, bytes):
        raise ImageError(f"{name}: {type(data).__name__} in the place of an encoded image.")
    return data


def _members(shard: str) -> Iterator[Encoded]:
    """Images of a tar file in its order, read as a stream."""
    with opened(shard) as file:
        try:
            with tarfile.open(fileobj=file, mode="r|") as tar:
                for member in tar:
                    if member.isfile() and _is_image(member.name):
                        held = tar.extractfile(member)
                        name = f"{shard}/{member.name}"
                        yield Encoded(name, partial(_require_bytes, held and held.read(), name))
        except tarfile.TarError as error:
            raise DataError(f"{shard}: damaged shard ({error}). Write it again.") from error


def _is_image(name: str) -> bool:
    base = posixpath.basename(name)
    return not is_hidden(base) and posixpath.splitext(base)[1].lower() in SUFFIXES


def _bytes_at(url: str) -> bytes:
    with opened(url) as file:
        return file.read()
