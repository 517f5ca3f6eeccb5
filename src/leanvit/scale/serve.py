"""leanvit serve --ray: networks in replicas of Ray Serve, behind the server of `leanvit serve`. No torch.

    client -> Server, Surround, Limits (this process) -> handle -> predict, infer (serve_replica.py) -> network

The HTTP proxy of Ray Serve is left off. Tried with Ray 2.60: one of two replicas was killed under 16 clients, and the
seven requests that it had in work were answered 500 by the proxy, which nothing behind it can change; and the proxy has
none of this server's limits (headers, connections, slow bodies), no drain and no swap. So a request is read and taken
by the same code as without Ray and goes on by a DeploymentHandle, whose exceptions become 503 here. Whether a request
is taken is decided here alone: Ray's own queues are wide enough that they never refuse.

Bundles go to the replicas through the object store, so no disk must be shared. A replaced bundle is loaded and checked
here first; then every replica, which asks a small actor what it is to serve (Shelf), loads it beside the old one and
swaps as the plain server does. Where one can't, all go back to the old one. A deployment of Ray Serve that changes
restarts its replicas instead: a gap where there is only one of them, and no progress where there is no room for more.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import time
from typing import Any, TextIO

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from leanvit.config import ServeConfig
from leanvit.config.scale import LOCAL
from leanvit.errors import ConfigError, require
from leanvit.scale.bundles import pack
from leanvit.scale.cluster import connected
from leanvit.scale.serve_fleet import Fleet, lost
from leanvit.scale.serve_replica import Answer, Asked
from leanvit.serve import log
from leanvit.serve.app import PREDICT, create_app
from leanvit.serve.batcher import Ticket
from leanvit.serve.infer import HEADER_LENGTH, VERSION
from leanvit.serve.limits import Limits, read_token
from leanvit.serve.metrics import Metrics
from leanvit.serve.models import Model, Models, fingerprint
from leanvit.serve.priority import switch_often
from leanvit.serve.refusals import Refusal
from leanvit.serve.run import answer, listen
from leanvit.serve.service import DEADLINE, Service, ticket_for
from leanvit.serve.surround import Surround

ENVIRONMENT = {
    # Else threads of Ray Serve that outlive the connection for a moment would join whichever cluster they find.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Of Ray's own 10 s another replica would be late.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
"""Of this process, before Ray is imported."""

INFER = "/v2/models/{name}/infer"
INFER_VERSION = f"/v2/models/{{name}}/versions/{VERSION}/infer"
FORWARDED = {PREDICT: "predict", INFER: "infer", INFER_VERSION: "infer"}
PATHS = {route: re.compile(re.escape(route).replace(r"\{name\}", "([^/]+)")) for route in FORWARDED}
"""What replicas answer; all else is answered here."""

HEADERS = (b"content-type", b"accept", HEADER_LENGTH.encode())
"""Of a request that a replica is told; the token stays here."""


def serve(config: ServeConfig) -> None:
    """Load and check every bundle, start replicas, and answer until a signal ends it, which is raised again at the end.

    Raises what leanvit.serve.start.serve raises, ConfigError for a flag that Ray has no use for and for replicas that
    the cluster has no room for, EnvironmentProblem where the cluster or a replica can't be started.
    """
    token = read_token(config)
    if config.workers > 1:
        raise ConfigError(f"workers is {config.workers}, but with ray processes are --ray-workers {config.workers}.")
    require("python_multipart")
    listening = listen(config, reuse=False)
    switch_often()
    os.environ |= ENVIRONMENT
    ended_by = signal.getsignal(signal.SIGTERM)
    with connected(config.ray or LOCAL) as ray, contextlib.redirect_stdout(OnlyLog(sys.stdout)):
        signal.signal(signal.SIGTERM, ended_by)  # Ray has put its own in the place, which ends with another exit code
        log.take_library_lines()
        fleet = Fleet(ray, config)
        try:
            run(config, token, listening, fleet)
        finally:
            fleet.close()
            log.write("ended", process=os.getpid())


class OnlyLog(io.TextIOBase):
    """Standard output for lines of the log: what Ray prints there, as of a process that died, becomes one of them."""

    def __init__(self, output: TextIO) -> None:
        self.output = output

    def write(self, text: str) -> int:
        """Pass a line of the log on, and make one of any other."""
        if text.startswith('{"time"'):
            return self.output.write(text)
        for line in text.splitlines():
            if line.strip():
                log.write("library", library="ray", level="warning", message=line)
        return len(text)

    def flush(self) -> None:
        """Let whoever reads the log have it."""
        self.output.flush()


def run(config: ServeConfig, token: bytes | None, listening: Any, fleet: Fleet) -> None:
    """Answer on a bound socket, by replicas."""
    metrics = Metrics()
    service = Front(config, RemoteModels(config, metrics, fleet), metrics, Limits(config, token), fleet)
    app = Surround(with_replicas(create_app(service), service), service)
    answer(app, service, listening)


class RemoteModels(Models):
    """The bundles as this process loaded and checked them; the replicas have the same."""

    def __init__(self, config: ServeConfig, metrics: Metrics, fleet: Fleet) -> None:
        self.fleet = fleet
        super().__init__(config, metrics)
        fleet.start()

    def _load(self, name: str) -> Model:
        while True:
            model = super()._load(name)
            data = pack(self.folders[name])
            # Whoever replaces the folder meanwhile must not have another bundle sent than the one that was checked.
            if fingerprint(self.folders[name]) == model.fingerprint:
                break
        self.fleet.put(name, model.digest, data)
        return model


class Front(Service):
    """What requests share in this process; `ending`: whether a signal has come."""

    def __init__(self, config: ServeConfig, models: Models, metrics: Metrics, limits: Limits, fleet: Fleet) -> None:
        self.fleet = fleet
        self.ending = False
        super().__init__(config, models, metrics, limits)

    @property
    def draining(self) -> bool:
        """Whether requests should be sent elsewhere: the server is about to end, or no replica is ready."""
        return self.ending or not self.fleet.running

    @draining.setter
    def draining(self, value: bool) -> None:
        self.ending = value

    def require_room(self, model: Model) -> None:
        """Raise Refusal where no replica is ready, or as many requests as all of them may have are on their way."""
        replicas = self.fleet.running
        if not replicas:
            raise lost("no replica is ready")
        if model.pending >= self.config.max_queue * replicas:
            wait = model.seconds_to_wait / replicas
            raise Refusal(429, "too many requests wait for this model", reason="queue", retry_after=wait)

    def note(self, model: Model, answer: Answer) -> None:
        """Tell the metrics what the replica's were told."""
        if answer.seconds_an_image:
            model.batcher.seconds_an_image = answer.seconds_an_image
        for name, labels, value in answer.notes:
            if "disconnected" in labels:
                continue  # was counted when the client left
            metric = getattr(self.metrics, name).labels(*labels)
            (metric.observe if hasattr(metric, "observe") else metric.inc)(value)


def with_replicas(app: FastAPI, service: Front) -> ASGIApp:
    """The application, whose images and tensors go to replicas. Raises Refusal and Gone for what surrounds it."""
    routes = {getattr(route, "path", ""): route for route in app.routes if getattr(route, "path", "") in FORWARDED}

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        for path, route in routes.items():
            found = PATHS[path].fullmatch(scope["path"]) if scope["method"] == "POST" else None
            if found is not None:
                scope.update(route=route, path_params={"name": found[1]})
                response = await forward(service, Request(scope, receive), FORWARDED[path], found[1])
                await response(scope, receive, send)
                return
        await app(scope, receive, send)

    return call


async def forward(service: Front, request: Request, kind: str, name: str) -> Response:
    """A replica's response to a request that is taken. Raises Refusal, Gone."""
    model = service.model(name)
    ticket = ticket_for(request.headers)
    service.require_room(model)
    body = await service.limits.read_body(request.receive)
    try:
        with service.taken(model), service.dropping(model, ticket):
            asked = Asked(kind, name, request.scope["query_string"], headers_of(request, ticket), body)
            answer = await service.fleet.ask(asked, ticket, request.receive)
    finally:
        service.limits.release(len(body))
    service.note(model, answer)
    if answer.refusal is not None:
        raise Refusal(**answer.refusal)
    response = Response(answer.body, answer.code)
    response.raw_headers = answer.headers or []
    return response


def headers_of(request: Request, ticket: Ticket) -> list[tuple[bytes, bytes]]:
    """The headers that a replica reads; of a deadline, the milliseconds that are left."""
    found = [(name, value) for name, value in request.headers.raw if name in HEADERS]
    if ticket.until < float("inf"):
        left = max(0, round(1e3 * (ticket.until - time.monotonic())))
        found.append((DEADLINE.encode(), str(left).encode()))
    return found
