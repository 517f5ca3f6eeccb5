"""The server process: socket, signals, the look for replaced bundles, and an orderly end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from leanvit.config import ServeConfig
from leanvit.errors import ConfigError, EnvironmentProblem
from leanvit.serve import log
from leanvit.serve.app import create_app, with_shortcut
from leanvit.serve.limits import HEADER_BYTES, Limits, protocol
from leanvit.serve.metrics import Metrics
from leanvit.serve.models import Models
from leanvit.serve.priority import switch_often
from leanvit.serve.service import Service
from leanvit.serve.surround import Surround

GRACE = 30
"""Seconds that requests have to end in after the port is closed; Kubernetes kills after 30 by default."""

BACKLOG = 1024

LAST_REQUESTS = 0.3
"""Seconds after the port was closed in which connections that are open may still bring their request."""


def listen(config: ServeConfig, reuse: bool) -> socket.socket:
    """A bound socket. reuse: several processes bind the same port. Raises ConfigError, EnvironmentProblem."""
    try:
        (family, kind, _, _, address), *_ = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"host {config.host}: {error.strerror}. Give an address of this machine.") from error
    found = socket.socket(family, kind)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise EnvironmentProblem(
            f"{config.host} port {config.port}: {error.strerror}. Give another --port, or end what listens there."
        ) from error
    return found


def run(config: ServeConfig, token: bytes | None, listening: socket.socket, parent: int = 0) -> None:
    """Load the bundles and answer on a bound socket. parent: a process with whose end this one ends, 0: none."""
    switch_often()
    log.take_library_lines()
    metrics = Metrics()
    service = Service(config, Models(config, metrics), metrics, Limits(config, token))
    app = Surround(with_shortcut(create_app(service), service), service)
    try:
        answer(app, service, listening, parent)
    finally:
        log.write("ended", process=os.getpid())


def answer(app: ASGIApp, service: Service, listening: socket.socket, parent: int = 0) -> None:
    """Answer on a bound socket by an application until a signal ends it; the service is closed then."""
    config = service.config
    settings = uvicorn.Config(
        app, http=protocol(config), ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_keep_alive=max(1, round(config.timeout)), timeout_graceful_shutdown=GRACE, backlog=BACKLOG,
    )  # fmt: skip
    try:
        Server(settings, service, parent).run(sockets=[listening])
    finally:
        service.close()


class Server(uvicorn.Server):
    """uvicorn's server, which ends in two steps and looks after the bundles.

    At SIGTERM requests are still taken for `drain` seconds, while probes are told that the server is not ready and
    every response closes its connection. Then the port is closed, and what was taken is answered.
    """

    def __init__(self, settings: uvicorn.Config, service: Service, parent: int) -> None:
        super().__init__(settings)
        self.service = service
        self.parent = parent
        self.ends_at = float("inf")
        self.hung_up = False
        self.next_look = time.monotonic() + service.config.watch
        self.reloading: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM starts the drain; a second one, or ctrl-C, ends at once."""
        if sig != signal.SIGTERM or self.service.draining:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self.drain()

    def drain(self) -> None:
        """Begin to end."""
        self.service.draining = True
        self.ends_at = time.monotonic() + self.service.config.drain

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, say so, and take SIGHUP for a look at the bundles."""
        if threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._hang_up)
        await super().startup(sockets)
        models = {model.name: model.digest for model in self.service.models}
        host, port = sockets[0].getsockname()[:2] if sockets else ("", 0)
        log.write("serving", host=host, port=port, process=os.getpid(), models=models)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, then every connection once it has its answer."""
        if self.service.draining:
            for server in self.servers:
                server.close()
            # Connections that were accepted just now have a request on its way.
            await asyncio.sleep(LAST_REQUESTS)
        await super().shutdown(sockets)

    def _hang_up(self) -> None:
        self.hung_up = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end, and whether to look at the bundles."""
        now = time.monotonic()
        if self.parent and os.getppid() != self.parent and not self.service.draining:
            self.drain()
        if now >= self.ends_at:
            self.should_exit = True
        self._look(now)
        return await super().on_tick(counter)

    def _look(self, now: float) -> None:
        if self.reloading is not None and not self.reloading.done():
            return
        watch = self.service.config.watch
        if self.hung_up or (watch and now >= self.next_look):
            hung_up, self.hung_up = self.hung_up, False
            self.next_look = now + watch
            self.reloading = asyncio.create_task(self._reload(hung_up))

    async def _reload(self, every: bool) -> None:
        models = self.service.models
        names = [model.name for model in models] if every else await asyncio.to_thread(models.replaced)
        if names:
            await asyncio.to_thread(models.reload, names)
