"""What several workers of xdist need and one makes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same for all workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The file or folder at `path`: the first that asks makes it, the others wait for it."""
    made = path.with_name(f"{path.name}.made")
    with FileLock(path.with_name(f"{path.name}.lock")):
        if not made.is_file():
            make(path)
            made.touch()
    return path
