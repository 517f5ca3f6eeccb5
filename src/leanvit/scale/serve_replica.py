"""A replica of `leanvit serve --ray`: every bundle's network in a process of a Ray cluster. No torch, and no HTTP.

A request comes from the server's process (leanvit.scale.serve), which read it and decided that it is taken. What then
happens is what happens without Ray: `predict` and `infer` of leanvit.serve with their decoders and batches.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.types import Message

from leanvit.config import ServeConfig
from leanvit.errors import LeanvitError
from leanvit.scale.bundles import unpacked
from leanvit.serve import log
from leanvit.serve.infer import infer
from leanvit.serve.limits import Limits
from leanvit.serve.metrics import Metrics
from leanvit.serve.models import Model, Models
from leanvit.serve.predict import predict
from leanvit.serve.priority import switch_often
from leanvit.serve.refusals import Gone, Refusal
from leanvit.serve.service import Service

NAMESPACE = "leanvit"
"""Of Ray's names: where replicas find the shelf of their server."""

HANDLERS = {"predict": predict, "infer": infer}

LOOK = 0.5
"""Seconds between a replica's looks at the shelf."""

NOTED = ("seconds", "batch", "dropped")
"""Metrics that only a replica can tell; they go to the server's process with the answers, which alone has /metrics."""

Headers = list[tuple[bytes, bytes]]
Note = tuple[str, tuple[str, ...], float]
Wanted = tuple[str, list[Any]]
"""Digest of a bundle, and in a list, so that it is not fetched on its way, the reference of its packed files."""
Said = tuple[dict[str, str], dict[str, tuple[str, str]]]
"""Of a replica: digests of what it serves, and digests and errors of what it could not load."""


@dataclass(frozen=True)
class Asked:
    """A request as a replica gets it. kind: of HANDLERS. name: of the model. body: whole."""

    kind: str
    name: str
    query: bytes
    headers: Headers
    body: bytes


@dataclass(frozen=True)
class Answer:
    """What a replica answers.

    refusal: arguments of the Refusal that it raised, else None. notes: what its metrics were told since the answer
    before. seconds_an_image: of this model's network, for telling clients when to come again.
    """

    notes: tuple[Note, ...]
    seconds_an_image: float = 0.0
    code: int = 0
    headers: Headers | None = None
    body: bytes = b""
    refusal: dict[str, Any] | None = None


@dataclass(frozen=True)
class Noted:
    """In the place of a metric: keeps what it is told, until an answer takes it along."""

    name: str
    notes: deque[Note]
    values: tuple[str, ...] = ()

    def labels(self, *values: str) -> Noted:
        """The same metric with values of its labels."""
        return replace(self, values=values)

    def observe(self, value: float) -> None:
        """Keep a value."""
        self.notes.append((self.name, self.values, value))

    def inc(self, value: float = 1.0) -> None:
        """Keep an increase."""
        self.observe(value)


class Shelf:
    """Which bundles the replicas of one server are to serve, and what each of them says of it: an actor that ends with
    the server's process. It holds references; the bytes stay in the object store."""

    def __init__(self) -> None:
        self.wanted: dict[str, Wanted] = {}
        self.said: dict[str, Said] = {}

    def want(self, wanted: dict[str, Wanted]) -> None:
        """From now on these are to be served."""
        self.wanted = wanted

    def look(self, replica: str, said: Said) -> dict[str, Wanted]:
        """What a replica is to serve; it says what became of that so far."""
        self.said[replica] = said
        return self.wanted

    def state(self) -> tuple[dict[str, str], dict[str, Said]]:
        """Digests of what is wanted, and what each replica said last."""
        return {name: digest for name, (digest, _) in self.wanted.items()}, self.said


class OfReplica(Models):
    """The bundles of a replica. errors: of those that failed last, by name."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self.errors: dict[str, str] = {}
        super().__init__(config, metrics)

    def _load(self, name: str) -> Model:
        self.errors.pop(name, None)
        try:
            return super()._load(name)
        except (LeanvitError, OSError) as error:
            self.errors[name] = str(error)
            raise


class Replica:
    """The class of the deployment. config: the server's, with the threads that this process has.

    name: of the server's shelf and of its application. Raises what Predictor raises.
    """

    def __init__(self, config: ServeConfig, name: str) -> None:
        import ray

        switch_often()
        self.name = name
        self.id = ray.get_runtime_context().get_actor_id()
        self.shelf = ray.get_actor(name, NAMESPACE)
        self.notes: deque[Note] = deque()
        self.tried = ray.get(self.shelf.look.remote(self.id, ({}, {})))
        folders = {name: _fetched(wanted) for name, wanted in self.tried.items()}
        metrics = Metrics()
        for noted in NOTED:
            setattr(metrics, noted, Noted(noted, self.notes))
        config = replace(config, bundles=[f"{name}={folder}" for name, folder in folders.items()])
        self.models = OfReplica(config, metrics)
        self.service = Service(config, self.models, metrics, Limits(config, None))
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def _watch(self) -> None:
        """Follow the shelf; where it is gone with the server, nobody asks any more, and nobody else would end us."""
        import ray
        from ray import serve

        while True:
            failed = {name: (self.tried[name][0], error) for name, error in self.models.errors.items()}
            said = ({model.name: model.digest for model in self.models}, failed)
            try:
                wanted = ray.get(self.shelf.look.remote(self.id, said))
                for name in wanted:
                    if wanted[name][0] != self.tried[name][0]:
                        self.tried[name] = wanted[name]
                        self._swap(name, wanted[name])
            except ray.exceptions.ActorDiedError:
                serve.delete(self.name, _blocking=False)
                return
            except ray.exceptions.RayError as error:
                log.write("shelf not reached", error=type(error).__name__)
            time.sleep(LOOK)

    def _swap(self, name: str, wanted: Wanted) -> None:
        """Load a bundle beside the one that is served, and swap; one that fails is told to the server by `look`."""
        before = self.service.model(name).predictor.folder
        try:
            new = self.models.folders[name] = _fetched(wanted)
        except Exception as error:  # of Ray, of the disk, of the archive: all the same to who waits for the swap
            self.models.errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return
        self.models.reload([name])
        # The network is in memory, and replicas live long.
        shutil.rmtree(new if name in self.models.errors else before, ignore_errors=True)

    async def answer(self, asked: Asked) -> Answer:
        """Answer one request; where it is cancelled, its client has left, and no network is run for it."""
        left = asyncio.Event()
        work = asyncio.create_task(self._answer(asked, left))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            left.set()
            raise

    async def _answer(self, asked: Asked, left: asyncio.Event) -> Answer:
        scope = {
            "type": "http", "method": "POST", "path": "", "query_string": asked.query, "headers": asked.headers,
        }  # fmt: skip
        messages: list[Message] = [{"type": "http.request", "body": asked.body}]

        async def receive() -> Message:
            if messages:
                return messages.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        try:
            response = await HANDLERS[asked.kind](self.service, Request(scope, receive), asked.name)
        except Refusal as refusal:
            return Answer(self._taken_notes(), refusal=vars(refusal))
        except Gone:
            return Answer(())
        pace = self.service.model(asked.name).batcher.seconds_an_image
        return Answer(self._taken_notes(), pace, response.status_code, response.raw_headers, bytes(response.body))

    def _taken_notes(self) -> tuple[Note, ...]:
        taken = []
        while self.notes:
            taken.append(self.notes.popleft())
        return tuple(taken)


def _fetched(wanted: Wanted) -> Path:
    """A folder with the files of a bundle."""
    import ray

    data: bytes = ray.get(wanted[1][0])
    return unpacked(data)
