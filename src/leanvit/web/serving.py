"""A web server for the folder of `leanvit web` on this machine, with the headers that permit threads. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from leanvit.errors import EnvironmentProblem
from leanvit.web.site import POLICY

HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The first two are what browsers ask of a page whose WebAssembly has threads."""


class _Handler(SimpleHTTPRequestHandler):
    """Files of one folder with HEADERS; folders are not listed."""

    # Python asks the machine's tables, where some have text/plain for .js.
    extensions_map = {  # noqa: RUF012 - as the base class declares it
        ".html": "text/html; charset=utf-8", ".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8",
        ".json": "application/json", ".svg": "image/svg+xml", ".png": "image/png", ".wasm": "application/wasm",
        "": "application/octet-stream",
    }  # fmt: skip

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def list_directory(self, path: object) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the page itself says what is wrong."""


@contextlib.contextmanager
def open_server(folder: str | Path, port: int = 0) -> Iterator[ThreadingHTTPServer]:
    """A server of `folder` on the loopback address; port 0: a free one. The caller runs it.

    Raises EnvironmentProblem where the port can't be had.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Handler, directory=str(folder)))
    except OSError as error:
        raise EnvironmentProblem(f"port {port}: {error.strerror or error}. Choose another --port, or 0.") from error
    try:
        yield server
    finally:
        server.server_close()


def address(server: ThreadingHTTPServer) -> str:
    """Where a browser finds it. Browsers let localhost do what else needs https."""
    return f"http://localhost:{server.server_port}/"
