"""Image files of paths, folders, glob patterns and lists, one by one: a folder is never in memory as a whole."""

from __future__ import annotations

import fnmatch
import heapq
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from leanvit.errors import ConfigError, DataError
from leanvit.imaging import SUFFIXES

NAMES_HELD = 65_536
"""Names of one folder in memory at a time: some 10 MB."""

_WILD = "*?["


def find_images(sources: Sequence[str | Path]) -> Iterator[Path]:
    """Image files of paths, folders (searched below), glob patterns and @lists, one by one in a fixed order.

    A path that exists is that path, whatever is in its name. @list is a text file with the path of an image in each
    line; they are taken as they are, for `decode` to check. Hidden files of a folder (".name") are left out.
    Raises at once DataError where a path does not exist or a folder or pattern holds no image, ConfigError where a
    pattern is none; on the way DataError where a list can't be read.
    """
    for source in sources:
        if not _is_list(source) and next(_images_of(source), None) is None:
            endings = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{source}: no images found, expected files ending in {endings}.")
    return itertools.chain.from_iterable(map(_images_of, sources))


def images_below(folder: Path) -> Iterator[Path]:
    """Image files of a folder and all folders below it, in the order of sorted paths; no hidden ones.

    A folder that can't be read is returned itself, so that `decode` says why, and it is counted.
    """
    return (
        path
        for path in _walk(folder, frozenset({0}), ("**", "*"))
        if (path.suffix.lower() in SUFFIXES and not path.name.startswith(".")) or path.is_dir()
    )


def _is_list(source: str | Path) -> bool:
    return str(source).startswith("@") and not Path(source).exists() and Path(str(source)[1:]).exists()


def _images_of(source: str | Path) -> Iterator[Path]:
    path = Path(source)
    if path.is_dir():
        return images_below(path)
    if path.exists():
        return iter([path])
    if _is_list(source):
        return _listed(Path(str(source)[1:]))
    if _is_wild(str(source)):
        return _matching(path)
    raise DataError(f"{source}: no such file or folder. Check the path.")


def _is_wild(text: str) -> bool:
    return any(c in text for c in _WILD)


def _listed(path: Path) -> Iterator[Path]:
    name = ""
    try:
        # A name need not be UTF-8, and may hold any byte but the end of a line. -sig: editors on Windows write a mark.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for name in filter(None, (line.rstrip("\r\n") for line in file)):
                yield Path(name)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a list of images. Check the path.") from error
    if not name:
        raise DataError(f"{path}: an empty list, expected the path of an image in each line.")


def _matching(pattern: Path) -> Iterator[Path]:
    if any("**" in part and part != "**" for part in pattern.parts):
        raise ConfigError(f"{pattern}: not a glob pattern. Use * within a name, ** alone for any number of folders.")
    plain = list(itertools.takewhile(lambda part: not _is_wild(part), pattern.parts))
    parts = pattern.parts[len(plain) :]
    return _walk(Path(*plain), frozenset({0}), (*parts, "*") if parts[-1] == "**" else parts)


def _walk(folder: Path, used: frozenset[int], pattern: tuple[str, ...]) -> Iterator[Path]:
    """Files below `folder` that match the parts of a pattern (** for any number of folders), in the order of
    sorted(paths).

    They are what pathlib.Path.glob finds, links to folders followed except by **; but that holds all names of a folder
    and has no order. used: how many parts of the pattern the path of `folder` may have used up.
    """
    for i, part in enumerate(pattern):
        if i in used and part == "**":
            used |= {i + 1}  # a ** may stand for no folder at all
    deep = frozenset(i for i in used if pattern[i] == "**")
    try:
        for name in _sorted_names(folder):
            path = folder / name
            matched = {i + 1 for i in used - deep if fnmatch.fnmatchcase(name, pattern[i])}
            if len(pattern) in matched and path.is_file():
                yield path
                continue
            below = matched - {len(pattern)} | (frozenset() if path.is_symlink() else deep)
            if below and path.is_dir():
                yield from _walk(path, frozenset(below), pattern)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        yield folder


def _sorted_names(folder: Path) -> Iterator[str]:
    """Names in a folder, sorted. At most NAMES_HELD are in memory: a larger folder is read again for the next ones."""
    last = ""
    while True:
        with os.scandir(folder) as entries:
            names = heapq.nsmallest(NAMES_HELD, (entry.name for entry in entries if entry.name > last))
        yield from names
        if len(names) < NAMES_HELD:
            return
        last = names[-1]
