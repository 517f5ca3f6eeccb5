"""Headless Chromium for the tests of the pages: playwright-core and axe-core by npm, the browser of the system."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from node_run import required_tool

FOLDER = Path(__file__).parent / "browser"


def modules() -> Path:
    """A folder whose node_modules are those of the lock file; kept in the user's cache."""
    lock = (FOLDER / "package-lock.json").read_bytes()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = base / "leanvit" / f"browser-{hashlib.sha256(lock).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not (folder / "node_modules" / "axe-core" / "axe.min.js").is_file():
            for name in ("package.json", "package-lock.json"):
                shutil.copy(FOLDER / name, folder)
            command = [required_tool("npm", "npm"), "ci", "--silent", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                unavailable(f"npm ci failed: {done.stderr[:200]}")
    return folder


def unavailable(reason: str) -> None:
    """Fail where CI has promised it, skip elsewhere."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def drive(script: str, values: Any, folder: Path, timeout: int = 1200) -> Any:
    """Run a script of tests/helpers/browser with `values`; returns what it tells."""
    chromium = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    environment = {
        **os.environ,
        "CHROMIUM": chromium or required_tool("chromium", "chromium"),
        "BROWSER_MODULES": str(modules()),
    }
    given, told = folder / "given.json", folder / "told.json"
    given.write_text(json.dumps(values), encoding="utf-8")
    command = [required_tool("node", "nodejs"), str(FOLDER / script), str(given), str(told)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(told.read_text(encoding="utf-8"))


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    """The address of a server that runs meanwhile in a thread."""
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://localhost:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def plain_server(folder: Path) -> Iterator[str]:
    """A web server that knows nothing of the page: no headers of its own."""
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder))) as server,
        running(server) as url,
    ):
        yield url
