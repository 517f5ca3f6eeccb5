"""Files that are either whole or absent: atomic writes, hashes, and one writer to a folder."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leanvit.errors import BundleError, EnvironmentProblem, RunLockedError


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write `data` so that a crash leaves the old file or the new one, never a part.

    Raises EnvironmentProblem where the disk is full or the folder can't be written; the old file stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise explain_os_error(error, path, len(data)) from error
    finally:
        # Still there only where something failed, ctrl-C included.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, values: Any) -> None:
    """Write JSON atomically; NaN and infinity are refused, because JSON has neither."""
    write_atomic(path, (json.dumps(values, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read JSON. Raises BundleError where the file is missing or isn't JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror}, expected a JSON file. Check the path.") from error
    except ValueError as error:
        raise BundleError(f"{path}: not valid JSON ({error}). Write the artifact again.") from error


def explain_os_error(error: OSError, path: Path, size: int | None = None) -> EnvironmentProblem:
    """An error of the operating system as one line: what failed, where, what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        need = f", {size:,} bytes needed" if size is not None else ""
        return EnvironmentProblem(
            f"{path}: no space left on the disk{_free_space(path)}{need}. "
            "Free some space or choose another --output; what was written before is kept."
        )
    return EnvironmentProblem(f"{path}: {error.strerror or error}. Choose another folder or change its rights.")


def _free_space(path: Path) -> str:
    for folder in (path, *path.parents):
        if folder.is_dir():
            return f" ({shutil.disk_usage(folder).free:,} bytes free)"
    return ""


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(data: bytes) -> str:
    """Twelve hexadecimal digits that tell a few thousand images apart."""
    return hashlib.blake2b(data, digest_size=6).hexdigest()


@contextlib.contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Hold a folder for one process; raises RunLockedError where another has it."""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    _HELD.add(lock)
    try:
        _take(lock, folder)
        yield
    finally:
        if lock in _HELD:  # not in a forked process, which has closed its copy
            _HELD.remove(lock)
            os.close(lock)


_HELD: set[int] = set()


def _let_go() -> None:
    """Close a forked process' copies: a lock lasts until the last copy is closed, and workers outlive a kill -9."""
    while _HELD:
        os.close(_HELD.pop())


os.register_at_fork(after_in_child=_let_go)


def _take(lock: int, folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(lock, 20, 0).decode().strip() or "unknown"
        raise RunLockedError(
            f"{folder}: process {holder} is writing here. Wait for it or choose another --output."
        ) from error
    try:
        os.truncate(lock, 0)
        os.pwrite(lock, str(os.getpid()).encode(), 0)
    except OSError as error:
        raise explain_os_error(error, folder) from error
