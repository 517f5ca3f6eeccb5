"""WebDataset shards: tar files whose members KEY.jpg and KEY.cls are one labelled image.

They are read with Python's tarfile, not with the library webdataset: that one streams shards, so a shuffled order is
approximate and can't be resumed, while an index of offsets finds any image at any time and reads files alike.
"""

from __future__ import annotations

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path

import numpy as np

from leanvit import imaging
from leanvit.data.sets.image_set import ImageSet, Parts, Split
from leanvit.data.sets.local import SPLIT_NAMES
from leanvit.errors import DataError, ImageError, require
from leanvit.image_paths import is_wild, literal_folders
from leanvit.progress import track

CLASSES_NAME = "classes.txt"
_BLOCK = 512
_SPLIT_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLIT_NAMES)})(?![a-z])")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar file: `size` bytes from `offset`."""

    archive: Path
    offset: int
    size: int
    name: str

    def read(self) -> bytes:
        """Its bytes. Raises ImageError where the archive is gone or cut."""
        try:
            with open(self.archive, "rb") as file:
                data = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise ImageError(f"{self}: {error.strerror}, expected a shard. Check the path.") from error
        if len(data) < self.size:
            raise ImageError(f"{self}: {len(data)} bytes, expected {self.size}. Copy the shard again.")
        return data

    def __str__(self) -> str:
        """Archive and member."""
        return f"{self.archive}/{self.name}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image of a shard."""

    image: TarMember
    label: int


def shard_parts(pattern: str) -> Parts:
    """WebDataset shards on this machine.

    pattern: paths with braces as in a shell, {train,val}-{0000..0011}.tar, and *, ? or [...]. Shards with the word
        train, val (valid, validation) or test in the name of their file, or else of their folder, are those parts;
        where there is no such word or all have the same, images are held out.
    A sample is an image (jpg, png, webp...) with KEY.cls, its class as a number from 0. Names of classes come from
    classes.txt beside the first shard, one a line; without it, classes are called by their numbers.
    Raises DataError for a missing, compressed or damaged shard, and for a sample without image or class.
    """
    shards = find_shards(pattern)
    parts: dict[Split, list[Path]] = {}
    for shard in shards:
        parts.setdefault(_split_of(shard), []).append(shard)
    if len(parts) == 1 or "train" not in parts:
        parts = {"train": shards}
    samples = {split: [s for shard in track(paths, f"indexing {split} shards", len(paths)) for s in read_index(shard)]
               for split, paths in parts.items()}  # fmt: skip
    highest = max((sample.label for found in samples.values() for sample in found), default=-1)
    if highest < 1:
        raise DataError(f"wds:{pattern}: {highest + 1} classes, expected at least two. Check the .cls members.")
    classes = _classes(shards[0].parent / CLASSES_NAME, highest)
    return {split: partial(_image_set, f"wds:{pattern} {split}", found, classes) for split, found in samples.items()}


def find_shards(pattern: str) -> list[Path]:
    """The shards that a pattern names, in the order of braces and names. Raises DataError for any that is missing."""
    try:
        is_file = Path(pattern).is_file()
        names = require("braceexpand").braceexpand(pattern) if "{" in pattern and not is_file else [pattern]
    except ValueError as error:
        raise DataError(
            f"wds:{pattern}: {error}, expected braces as in {{0000..0011}}. Correct the pattern."
        ) from error
    shards: list[Path] = []
    for name in names:
        found = [name] if Path(name).is_file() or not is_wild(name) else sorted(glob.glob(literal_folders(name)))
        missing = name if not found else next((path for path in found if not Path(path).is_file()), None)
        if missing:
            raise DataError(
                f"wds:{pattern}: no file {missing}, expected WebDataset shards on this machine. "
                "Check the pattern; shards on a server are to be fetched first."
            )
        shards += map(Path, found)
    return shards


def _split_of(shard: Path) -> Split:
    words = _SPLIT_WORD.findall(shard.name.lower()) or _SPLIT_WORD.findall(shard.parent.name.lower())
    return SPLIT_NAMES[words[0]] if words else "train"


def read_index(shard: Path) -> list[Sample]:
    """The samples of one shard, in its order; read once as long as the file stays as it is."""
    state = shard.stat()
    return _read_index(shard, state.st_size, state.st_mtime_ns)


@cache
def _read_index(shard: Path, size: int, changed: int) -> list[Sample]:
    samples: list[Sample] = []
    for key, group in groupby(_members(shard, size), key=lambda pair: _key_and_suffix(pair[1].name)[0]):
        if key is not None:
            samples += _samples_of(f"{shard}/{key}", list(group))
    return samples


def _samples_of(name: str, group: list[tuple[bytes, TarMember]]) -> Iterator[Sample]:
    """The labelled images among the members of one key.

    By WebDataset's rule the key ends at the first dot, so shot.0001.jpg and shot.0001.cls are two fields of 'shot'. An
    image and a class with the same dots in their names are a sample all the same; what has no class of its own
    (000.seg.png beside 000.cls) stays a field. Raises DataError where two members have the same name.
    """
    parts: dict[str, dict[str, tuple[bytes, TarMember]]] = {}
    for text, member in group:
        dotted, _, suffix = _key_and_suffix(member.name)[1].rpartition(".")
        part = parts.setdefault(dotted, {})
        if suffix in part:
            raise DataError(
                f"{member}: this name was there before, expected names of their own. Write the shard again."
            )
        part[suffix] = text, member
    labelled = {dotted: part for dotted, part in parts.items() if not dotted or "cls" in part}
    found = [_sample(f"{name}.{dotted}".rstrip("."), part) for dotted, part in labelled.items()]
    if "cls" not in parts.get("", {}):
        _require_classes(name, parts)
    yield from filter(None, found)


def _require_classes(name: str, parts: dict[str, dict[str, tuple[bytes, TarMember]]]) -> None:
    images = [f"{dotted}.{suffix}" for dotted, part in parts.items() for suffix in part
              if "cls" not in part and f".{suffix}" in imaging.SUFFIXES]  # fmt: skip
    if images:
        raise DataError(
            f"{name}.{images[0]}: an image without a class, expected a cls with the same name. WebDataset's keys end "
            "at the first dot of a name. Write the shard again."
        )


def _key_and_suffix(name: str) -> tuple[str | None, str]:
    """'a/b.c/000.seg.png' as ('a/b.c/000', 'seg.png'): WebDataset's rule; no key where there is no suffix."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return (f"{folder}{slash}{stem}", suffix.lower()) if stem and dot else (None, "")


def _members(shard: Path, size: int) -> Iterator[tuple[bytes, TarMember]]:
    """(content of a class, b'' for others; member) of each file. Raises DataError for a damaged shard."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for info in archive:
                member = TarMember(shard, info.offset_data, info.size, info.name)
                if info.offset_data + info.size > size:
                    raise DataError(f"{member}: ends after the end of the shard, which was cut. Copy the shard again.")
                if info.isreg():
                    yield member.read() if info.name.lower().endswith(".cls") else b"", member
            # tarfile takes a broken header for the end; the real end is a block of zeros.
            end = TarMember(shard, archive.offset, _BLOCK, "end")
            if end.offset + _BLOCK > size or any(end.read()):
                raise DataError(f"{shard}: damaged or cut at byte {archive.offset:,}. Copy the shard again.")
    except (tarfile.TarError, EOFError) as error:
        raise DataError(
            f"{shard}: not an uncompressed tar file ({error}), expected a WebDataset shard. "
            "Unpack compressed shards first (gunzip), so that images can be read in any order."
        ) from error


def _sample(name: str, members: dict[str, tuple[bytes, TarMember]]) -> Sample | None:
    """The labelled image among the members of one key; None where there is neither image nor class."""
    images = [member for suffix, (_, member) in members.items() if f".{suffix}" in imaging.SUFFIXES]
    if not images and "cls" not in members:
        return None
    if len(images) != 1 or "cls" not in members:
        found = ", ".join(members)
        raise DataError(f"{name}: members {found}, expected one image and one cls. Write the shard again.")
    text = members["cls"][0].strip()
    if not text.isdigit():
        raise DataError(f"{name}.cls: {text[:20]!r}, expected the class as a number from 0. Write the shard again.")
    return Sample(images[0], int(text))


def _classes(path: Path, highest: int) -> tuple[str, ...]:
    if not path.is_file():
        return tuple(map(str, range(highest + 1)))
    names = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    if highest >= len(names):
        raise DataError(f"{path}: {len(names)} classes, but a shard has class {highest}. Add the missing names.")
    return names


def _image_set(name: str, samples: list[Sample], classes: tuple[str, ...]) -> ImageSet:
    return ImageSet(name, [s.image for s in samples], np.asarray([s.label for s in samples], np.int64), classes)
