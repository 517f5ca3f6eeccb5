"""Clients of a server on loopback for benchmarks/serve.py: kept connections in one event loop, a tenth of a
millisecond a request, so that they leave the cores to the server.

Closed loop: a client asks again when it has its answer. Open loop: requests come at a rate, whatever the answers.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

Answer = tuple[int, float, bool]
"""HTTP code (0: no answer), seconds, whether Retry-After was there."""

MOST_CONNECTIONS = 500
"""Of an open loop; below --max-connections of the server."""


@dataclass(frozen=True)
class Target:
    """Where one request goes: a port of loopback, and the bytes of the whole request."""

    port: int
    request: bytes


def request_bytes(path: str, body: bytes, headers: dict[str, str]) -> bytes:
    """A POST over a kept connection."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Connection(asyncio.Protocol):
    """One connection, and one request at a time on it."""

    def __init__(self) -> None:
        self.data = b""
        self.waiting: asyncio.Future[tuple[int, bool]] | None = None
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self._settle((0, False))

    def data_received(self, data: bytes) -> None:
        self.data += data
        head, found, rest = self.data.partition(b"\r\n\r\n")
        if not found:
            return
        names = dict(line.lower().partition(b": ")[::2] for line in head.split(b"\r\n")[1:])
        if len(rest) >= int(names.get(b"content-length", b"0")):
            self.data = b""
            self._settle((int(head[9:12]), b"retry-after" in names))

    def _settle(self, found: tuple[int, bool]) -> None:
        if self.waiting is not None and not self.waiting.done():
            self.waiting.set_result(found)


async def ask(target: Target, connection: Connection | None) -> tuple[Answer, Connection | None]:
    """One request, over a new connection where there is none or it was closed."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    try:
        if connection is None or connection.transport is None:
            _, connection = await loop.create_connection(Connection, "127.0.0.1", target.port)
        connection.waiting = loop.create_future()
        connection.transport.write(target.request)
        code, after = await connection.waiting
    except OSError:
        return (0, time.perf_counter() - began, False), None
    return (code, time.perf_counter() - began, after), connection


async def closed_loop(target: Target, count: int, seconds: float, most: int) -> list[Answer]:
    """Answers to `count` clients that asked for so many seconds, or until there are `most`."""
    found: list[Answer] = []
    ends = time.perf_counter() + seconds

    async def client() -> None:
        connection = None
        while time.perf_counter() < ends and len(found) < most:
            answer, connection = await ask(target, connection)
            found.append(answer)

    await asyncio.gather(*(client() for _ in range(count)))
    return found


async def open_loop(target: Target, rate: float, seconds: float) -> list[Answer]:
    """Answers to `rate` requests a second; code -1 for one that found all connections taken and was never sent."""
    found: list[Answer] = []
    idle: deque[Connection | None] = deque([None] * MOST_CONNECTIONS)
    tasks: set[asyncio.Task[None]] = set()

    async def one(connection: Connection | None) -> None:
        answer, connection = await ask(target, connection)
        found.append(answer)
        idle.append(connection)

    began = time.perf_counter()
    for number in range(round(rate * seconds)):
        await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
        if not idle:
            found.append((-1, 0.0, False))
            continue
        task = asyncio.create_task(one(idle.pop()))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return found


def run_clients(target: Target, sent: Any, *, count: int = 0, rate: float = 0, seconds: float, most: int) -> None:
    """In a process of its own: a closed loop of `count` clients, or an open one.

    Sends through a pipe the answers and the seconds until the last of them: batches of several seconds' work come
    together, so that those within a fixed time would be counted a batch more or less.
    """
    work = open_loop(target, rate, seconds) if rate else closed_loop(target, count, seconds, most)
    began = time.perf_counter()
    answers = asyncio.run(work)
    sent.send((answers, time.perf_counter() - began))
