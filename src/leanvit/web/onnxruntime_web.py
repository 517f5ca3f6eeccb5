"""The files of onnxruntime-web that a page takes: one pinned version, each file checked against its SHA-256."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

from leanvit.errors import ConfigError, EnvironmentProblem, MissingDependencyError, VerificationError
from leanvit.files import write_atomic

VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"

FILES = {
    "ort.wasm.min.mjs": (
        "ort.js",
        "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    ),
    "ort-wasm-simd-threaded.mjs": (
        "ort-wasm.js",
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    ),
    "ort-wasm-simd-threaded.wasm": (
        "ort-wasm.wasm",
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    ),
}
"""File of the package's dist folder: its name in a page, where .mjs is .js because many web servers don't know .mjs;
and its SHA-256 in the npm package of VERSION (integrity sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZ...)."""

NPM_SECONDS = 600
"""33 MB over a slow line."""

Reader = Callable[[str], bytes]


def read_files(source: str | None = None) -> dict[str, bytes]:
    """The files of onnxruntime-web by their names in a page.

    source: an unpacked package, its dist folder, or the .tgz of `npm pack`; None: the package as npm downloads it, kept
    for the next time. Raises ConfigError where the source has no such file, VerificationError where one is not that of
    VERSION, MissingDependencyError without npm, EnvironmentProblem where npm fails.
    """
    path = Path(source) if source else _downloaded()
    read = _folder_reader(path) if path.is_dir() else _archive_reader(path)
    found = {}
    for name, (page_name, digest) in FILES.items():
        data = read(name)
        if hashlib.sha256(data).hexdigest() != digest:
            raise VerificationError(
                f"{path}: its {name} is not that of {PACKAGE}: the SHA-256 differs. Give the package of this version: "
                f"npm pack {PACKAGE}"
            )
        found[page_name] = data
    return found


def _folder_reader(folder: Path) -> Reader:
    def read(name: str) -> bytes:
        for place in (folder / "dist" / name, folder / "package" / "dist" / name, folder / name):
            if place.is_file():
                return place.read_bytes()
        raise ConfigError(f"{folder}: has no {name}, expected {PACKAGE}. Get it: npm pack {PACKAGE}")

    return read


def _archive_reader(path: Path) -> Reader:
    def read(name: str) -> bytes:
        try:
            with tarfile.open(path) as archive:
                member = archive.extractfile(f"package/dist/{name}")
                if member is not None:
                    return member.read()
        except (OSError, tarfile.TarError, KeyError, EOFError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"{path}: has no {name} ({reason}), expected the .tgz of {PACKAGE}. Get it: npm pack {PACKAGE}"
            ) from error
        raise ConfigError(f"{path}: {name} is no file, expected the .tgz of {PACKAGE}. Get it: npm pack {PACKAGE}")

    return read


def cache_folder() -> Path:
    """Where the downloaded package is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "leanvit"


def _downloaded() -> Path:
    """The package's .tgz as npm packs it, from the cache where it is there."""
    kept = cache_folder() / f"onnxruntime-web-{VERSION}.tgz"
    if not kept.is_file():
        with tempfile.TemporaryDirectory() as folder:
            packed = _npm_pack(Path(folder))
            write_atomic(kept, packed.read_bytes())
    return kept


def _npm_pack(folder: Path) -> Path:
    npm = shutil.which("npm")
    if npm is None:
        raise MissingDependencyError(
            f"npm is not installed, and the page needs {PACKAGE}. Install npm (Debian: apt-get install npm), or give "
            f"--onnxruntime-web the file that `npm pack {PACKAGE}` writes on another machine."
        )
    command = [npm, "pack", PACKAGE, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS, check=False, cwd=folder)
    except subprocess.TimeoutExpired as error:
        raise EnvironmentProblem(
            f"npm pack {PACKAGE} took longer than {NPM_SECONDS} s. Try again, or give --onnxruntime-web its file."
        ) from error
    packed = next(folder.glob("*.tgz"), None)
    if done.returncode or packed is None:
        reason = " ".join(done.stderr.split())[:200] or f"exit code {done.returncode}"
        raise EnvironmentProblem(
            f"npm pack {PACKAGE} failed ({reason}). Check the network, or give --onnxruntime-web the file that it "
            "writes on another machine."
        )
    return packed
