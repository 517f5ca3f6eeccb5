"""A bundle as bytes, for machines that don't see its folder: packed once, unpacked once in a process. No torch."""

from __future__ import annotations

import atexit
import io
import shutil
import tarfile
import tempfile
from pathlib import Path

from leanvit.runtime.bundle import MANIFEST_NAME, read_manifest


def pack(folder: str | Path) -> bytes:
    """The files of a bundle as an uncompressed tar. Raises BundleError where it is damaged."""
    manifest = read_manifest(Path(folder))
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in sorted({MANIFEST_NAME, *manifest.files}):
            tar.add(Path(folder) / name, arcname=name)
    return file.getvalue()


def unpacked(data: bytes) -> Path:
    """A folder of this process alone with the files of a packed bundle, which goes when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="leanvit-bundle-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        tar.extractall(folder, filter="data")
    return folder
