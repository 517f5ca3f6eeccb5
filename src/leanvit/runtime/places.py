"""Files by path or by URL (s3://, gs://, http://, ...), the latter by fsspec (extra `ray`). No torch.

What a store needs to be told (keys, an endpoint) it reads where fsspec's users keep it: environment variables of the
store's own client, or ~/.config/fsspec/*.json.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from leanvit.errors import DataError, EnvironmentProblem, ImageError, LeanvitError, require, require_store
from leanvit.files import write_atomic
from leanvit.imaging import ENDINGS, SUFFIXES

SEPARATOR = "://"


def is_url(text: str | Path) -> bool:
    """Whether a text names a place by URL."""
    return SEPARATOR in str(text)


def store_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the URL as that calls it.

    Raises MissingDependencyError where a package is missing, DataError for a scheme that is none.
    """
    fsspec = require("fsspec")
    try:
        store, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        require_store(url, error)
    except ValueError as error:
        raise DataError(f"{url}: {error}. Check the URL.") from error
    return store, path


def opened(place: str | Path) -> IO[bytes]:
    """A file or URL, open to be read. Raises DataError where it can't be, ImageError where it is not there."""
    try:
        if is_url(place):
            store, path = store_of(str(place))
            return cast("IO[bytes]", store.open(path, "rb"))
        return open(place, "rb")
    except FileNotFoundError as error:
        raise ImageError(f"{place}: no such file. Check the path.") from error
    except LeanvitError:
        raise
    except Exception as error:  # the clients of stores have no common type
        raise DataError(f"{place}: {_told(error)}. Check that this machine may read it.") from error


def _told(error: Exception) -> str:
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def images_at(url: str) -> Iterator[str]:
    """URLs of the images at a URL, a file or a folder with what is below it, in the order of sorted names.

    All names of a folder are in memory, some 200 bytes each. Raises DataError where there is none.
    """
    store, path = store_of(url)
    try:
        found = store.find(path)
    except Exception as error:  # the clients of stores have no common type
        raise DataError(f"{url}: {_told(error)}. Check the URL and the rights of its store.") from error
    images = [name for name in sorted(found) if posixpath.splitext(name)[1].lower() in SUFFIXES]
    if not images:
        raise DataError(f"{url}: no images found, expected files ending in {ENDINGS}.")
    return iter([store.unstrip_protocol(name) for name in images])


class Folder:
    """A folder by path or URL, in which files are whole or absent."""

    def __init__(self, place: str) -> None:
        """Raises as `store_of` does."""
        self.place = place.rstrip("/")
        self._store: Any = None
        self._path = place
        if is_url(place):
            self._store, self._path = store_of(self.place)

    def names(self) -> list[str]:
        """Names of the files in it, sorted; none where there is no folder."""
        if self._store is None:
            return sorted(path.name for path in Path(self._path).glob("*") if path.is_file())
        self._store.invalidate_cache()
        try:
            return sorted(posixpath.basename(path) for path in self._store.find(self._path, maxdepth=1))
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """A file of it. Raises DataError."""
        with opened(f"{self.place}/{name}") as file:
            return file.read()

    def write(self, name: str, data: bytes) -> None:
        """A file of it, whole or not at all. Raises EnvironmentProblem."""
        if self._store is None:
            write_atomic(Path(self._path) / name, data)
            return
        try:
            self._store.pipe_file(f"{self._path}/{name}", data)
        except Exception as error:  # the clients of stores have no common type
            told = f"{self.place}/{name}: {_told(error)}. Check the store and your rights in it."
            raise EnvironmentProblem(told) from error
