"""Image files of paths, folders, glob patterns and lists, one by one: a folder is never in memory as a whole."""

from __future__ import annotations

import codecs
import fnmatch
import glob
import heapq
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leanvit.errors import ConfigError, DataError
from leanvit.imaging import ENDINGS, SUFFIXES, foreign_format, is_readable_format
from leanvit.passed_over import few, left_out, note_once

NAMES_HELD = 65_536
"""Names of one folder in memory at a time: some 10 MB."""

_FOREIGN = (
    ".gif .heic .heif .hif .jxl .jp2 .j2k .jpf .jpx .avif .psd .svg .tga .ico .icns .exr .hdr .dds .eps .pgm .ppm .pbm "
    ".pnm .pcx .xcf .dng .cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .orf .raf .rw2 .pef .raw .dcm .fits"
)
FOREIGN_SUFFIXES = frozenset(_FOREIGN.split()) - SUFFIXES
"""Endings of pictures in formats that are not read: those of cameras, phones, browsers and paint programs."""
PICTURE_FORMATS = frozenset({"GIF", "Photoshop", "JPEG XL", "HEIC"})
"""Of `imaging.foreign_format`, those that hold a picture."""
_BESIDE = (
    ".txt .json .jsonl .xml .csv .tsv .yaml .yml .md .html .htm .py .db .ini .log .pdf .zip .tar .gz .mp4 .mov .avi "
    ".npy .npz .cls .mat .pt .pth .safetensors .onnx .cache .lnk .url .doc .docx .xlsx .xmp .aae .thm"
)
_NO_PICTURES = frozenset(_BESIDE.split())
"""Endings of what lies beside images and is none; such files are not opened."""
_SYSTEM_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)
"""What macOS' zip, network storage and Windows put beside images: companions, thumbnails, what was thrown away."""
_WILD = "*?["


def find_images(sources: Sequence[str | Path]) -> Iterator[Path]:
    """Image files of paths, folders (searched below), glob patterns and @lists, one by one in a fixed order.

    A path that exists is that path, whatever is in its name. @list is a text file with the path of an image in each
    line; they are taken as they are, for `decode` to check. Folders: see `images_below`.
    Raises at once DataError where a path does not exist or a folder or pattern holds no image, ConfigError where a
    pattern is none; on the way DataError where a list can't be read.
    """
    for source in sources:
        if not _is_list(source) and next(_images_of(source), None) is None:
            raise DataError(f"{source}: no images found, expected files ending in {ENDINGS}.")
    return itertools.chain.from_iterable(map(_images_of, sources))


def images_below(folder: Path) -> Iterator[Path]:
    """Image files of a folder and all folders below it, in the order of sorted paths.

    Among them, for `decode` to say why they can't be read, and so that they are counted: pictures of formats that are
    not read (`is_foreign`), links to nothing, and a folder that can't be read. A file without an ending is an image
    where its first bytes say so. Linked folders are followed, each once; hidden files and folders (".name") and what
    systems put beside images are passed over. Both are said.
    """
    return _Below(folder).images()


def is_foreign(path: Path) -> bool:
    """Whether a path of `images_below` is a picture of a format that is not read: HEIC, GIF, raw files and the like."""
    return path.suffix.lower() not in SUFFIXES and _kind(path) == "foreign"


def leave_out_foreign(paths: Iterable[Path]) -> list[Path]:
    """The paths without pictures of formats that are not read, which are counted as left out and named."""
    paths = list(paths)
    foreign = [path for path in paths if is_foreign(path)]
    left_out([str(path) for path in foreign], "pictures of a format that is not read (convert them to JPEG or PNG)")
    gone = set(foreign)
    return [path for path in paths if path not in gone]


def real_path(folder: Path, text: str) -> Path:
    """The file that a line of a list or table means: as it is written, else with the separators of Windows."""
    path = folder / text
    if "\\" in text and not path.exists() and (other := folder / text.replace("\\", "/")).exists():
        return other
    return path


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a text file that are not empty, in UTF-8 or whatever bytes names have, or in the UTF-16 of PowerShell.

    A byte order mark and the ends of lines are no part of them. Raises OSError.
    """
    with open(path, "rb") as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    # A name need not be UTF-8, and may hold any byte but the end of a line.
    with open(path, encoding=encoding, errors="surrogateescape", newline="\n") as file:
        yield from filter(None, (line.rstrip("\r\n") for line in file))


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
    if is_wild(str(source)):
        return _matching(path)
    raise DataError(f"{source}: no such file or folder. Check the path.")


def is_wild(text: str) -> bool:
    """Whether a text has a character that stands for others in a pattern."""
    return any(c in text for c in _WILD)


def literal_folders(pattern: str) -> str:
    """The pattern for glob.glob in which folders that are there by that very name stand for themselves."""
    parts = Path(pattern).parts
    count = _plain_parts(Path(pattern))
    return str(Path(*map(glob.escape, parts[:count]), *parts[count:]))


def _plain_parts(pattern: Path) -> int:
    """How many leading parts of a pattern have no wildcard, or are the name of a folder that is there."""
    parts = pattern.parts
    return next((i for i, part in enumerate(parts) if is_wild(part) and not Path(*parts[: i + 1]).exists()), len(parts))


def _listed(path: Path) -> Iterator[Path]:
    name = ""
    try:
        for name in read_lines(path):
            yield real_path(Path(), name)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a list of images. Check the path.") from error
    if not name:
        raise DataError(f"{path}: an empty list, expected the path of an image in each line.")


def _matching(pattern: Path) -> Iterator[Path]:
    if any("**" in part and part != "**" for part in pattern.parts):
        raise ConfigError(f"{pattern}: not a glob pattern. Use * within a name, ** alone for any number of folders.")
    count = _plain_parts(pattern)
    plain, parts = pattern.parts[:count], pattern.parts[count:]
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


@dataclass
class _Below:
    """One search below a folder. visited: (device, inode) of the folders read; hidden, linked: what was passed over."""

    root: Path
    visited: set[tuple[int, int]] = field(default_factory=set)
    followed: list[str] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    linked: list[str] = field(default_factory=list)

    def images(self) -> Iterator[Path]:
        self.followed.append(os.path.realpath(self.root))
        yield from self._walk(self.root)
        if self.hidden:
            note_once(f"{self.root}: {len(self.hidden)} hidden images passed over: {few(self.hidden)}")
        if self.linked:
            links = f"{len(self.linked)} links to folders that are read already, not followed"
            note_once(f"{self.root}: {links}: {few(self.linked)}")

    def _walk(self, folder: Path) -> Iterator[Path]:
        try:
            state = os.stat(folder)
            if (state.st_dev, state.st_ino) in self.visited:
                self.linked.append(str(folder))
                return
            self.visited.add((state.st_dev, state.st_ino))
            for name in _sorted_names(folder):
                yield from self._entry(folder / name)
        except OSError:
            yield folder

    def _entry(self, path: Path) -> Iterator[Path]:
        mode = _mode(path)
        if stat.S_ISDIR(mode):
            if is_hidden(path.name):
                self.hidden += _some_image_in(path)
            elif not path.is_symlink() or self._is_new(path):
                yield from self._walk(path)
        elif is_hidden(path.name):
            self.hidden += [str(path)] if path.suffix.lower() in SUFFIXES else []
        elif mode and not stat.S_ISREG(mode):
            left_out([str(path)], "pipes and devices that are no files")
        elif _kind(path):
            yield path
        elif not mode:
            left_out([str(path)], "links that lead to nothing")

    def _is_new(self, link: Path) -> bool:
        """Whether a linked folder holds nothing that is found anyway, neither in it nor above it."""
        target = os.path.realpath(link)
        if any(_is_in(target, one) or _is_in(one, target) for one in self.followed):
            self.linked.append(str(link))
            return False
        self.followed.append(target)
        return True


def _mode(path: Path) -> int:
    """What a path is, links followed; 0 for a link to nothing."""
    try:
        return os.stat(path).st_mode
    except OSError:
        return 0


def _is_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of a user's data by its name."""
    return name.startswith(".") or name in _SYSTEM_FOLDERS


def _some_image_in(folder: Path) -> list[str]:
    """The names of images in a hidden folder itself; what lies deeper is hidden twice."""
    try:
        return [str(folder / name) for name in sorted(os.listdir(folder)) if _is_own_image(name)]
    except OSError:
        return []


def _is_own_image(name: str) -> bool:
    return not name.startswith("._") and os.path.splitext(name)[1].lower() in SUFFIXES


def _kind(path: Path) -> str:
    """One of "image", "foreign" for a picture of a format that is not read, "" for what is no picture."""
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return "image"
    if suffix in FOREIGN_SUFFIXES:
        return "foreign"
    if suffix in _NO_PICTURES or not path.is_file():
        return ""
    head = _first_bytes(path)
    # Under an ending of its own it may be a backup, such as .jpg_original: it is named, not used.
    if is_readable_format(head):
        return "foreign" if suffix else "image"
    return "foreign" if foreign_format(head) in PICTURE_FORMATS else ""


def _first_bytes(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(16)
    except OSError:
        return b""


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
