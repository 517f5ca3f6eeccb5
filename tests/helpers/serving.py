"""A server in a process of its own, on a free port of this machine, and plain requests to it.

PYTEST_DONT_REWRITE: modules import this one before pytest does.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reply:
    """What a server answered."""

    code: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A server that runs. events: the lines of its log so far. errors: those on its standard error."""

    process: subprocess.Popen[str]
    port: int
    events: list[dict[str, Any]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        """One request on a connection of its own; in the names of headers _ stands for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            response = connection.getresponse()
            return Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> Reply:
        return self.ask("GET", path, **headers)

    def predict(self, name: str, image: bytes, query: str = "", **headers: str) -> Reply:
        return self.ask("POST", f"/v1/models/{name}:predict{query}", image, **headers)

    def raw(self, data: bytes, seconds: float = 10.0) -> bytes:
        """What comes back for bytes that need not be HTTP, until the server closes or the time is over."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(OSError):
                connection.sendall(data)
            received = b""
            with contextlib.suppress(OSError):
                while part := connection.recv(65536):
                    received += part
            return received

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric over its samples with these labels."""
        total = 0.0
        for line in self.get("/metrics").body.decode().splitlines():
            if line.startswith((f"{name}{{", f"{name} ")) and all(f'{k}="{v}"' in line for k, v in labels.items()):
                total += float(line.rpartition(" ")[2])
        return total

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal; returns the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def named(self, event: str, least: int = 0, seconds: float = 20.0) -> list[dict[str, Any]]:
        """Lines of the log of one kind, once there are as many; after so many seconds those that there are."""
        until = time.monotonic() + seconds
        while True:
            found = [line for line in list(self.events) if line["event"] == event]
            if len(found) >= least or time.monotonic() > until:
                return found
            time.sleep(0.02)


@contextlib.contextmanager
def serving(*arguments: Any, drain: float = 0.2) -> Iterator[Running]:
    """`leanvit serve` with these arguments, until the block ends."""
    command = [sys.executable, "-m", "leanvit", "serve", "--port", "0", "--drain", str(drain), *map(str, arguments)]
    # Where a script runs the tests in the background, ctrl-C is ignored, and what it starts inherits that.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    first = process.stdout.readline()
    if not first:
        raise RuntimeError(f"the server did not start: {process.communicate()[1]}")
    running = Running(process, json.loads(first)["port"], [json.loads(first)])

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            running.events.append(json.loads(line))

    def read_errors() -> None:
        assert process.stderr is not None
        running.errors.extend(process.stderr)

    readers = [threading.Thread(target=target, daemon=True) for target in (read, read_errors)]
    for reader in readers:
        reader.start()
    try:
        yield running
    finally:
        process.kill()
        process.wait()
        for reader in readers:
            reader.join(5)
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()
