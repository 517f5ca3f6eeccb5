"""The replicas of one `leanvit serve --ray`: started, told of new bundles, counted, asked, and ended. No torch."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import replace
from types import ModuleType
from typing import Any

from starlette.types import Receive

from leanvit.config import ServeConfig
from leanvit.config.scale import LOCAL
from leanvit.errors import ConfigError, EnvironmentProblem
from leanvit.scale.cluster import thread_variables
from leanvit.scale.serve_replica import LOOK, NAMESPACE, Answer, Asked, Replica, Shelf, Wanted
from leanvit.serve import log
from leanvit.serve.batcher import Dropped, Ticket
from leanvit.serve.refusals import Refusal
from leanvit.serve.run import GRACE

START_SECONDS = 120
"""In which the first replica, or all with a new bundle, must be ready: a process starts in 5 s, a large network loads
and proves itself in some ten."""

PATIENCE = 15.0
"""Seconds that taken requests wait where no replica is left: a new one is there after about 6 s."""

DEPLOYMENT = "replica"


def room(ray: ModuleType, config: ServeConfig) -> tuple[int, int]:
    """CPUs of each replica, which are its threads, and how many replicas there may be. Raises ConfigError."""
    cpus = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]

    def fitting(each: int) -> int:
        return sum(count // each for count in cpus)

    wanted = config.ray_workers or 1
    # As many threads as leave room for all replicas that are asked for.
    shares = (each for each in range(max(cpus), 1, -1) if config.ray_workers and fitting(each) >= wanted)
    each = config.threads or next(shares, 1)
    # A cluster that is joined may grow; this machine does not.
    if not fitting(each) or (config.ray == LOCAL and wanted > fitting(each)):
        raise ConfigError(
            f"{wanted} replicas of {each} threads, but Ray has room for {fitting(each)} (CPUs of its machines: "
            f"{', '.join(map(str, cpus))}). Give fewer --ray-workers or --threads."
        )
    return each, config.ray_workers or fitting(each)


class Fleet:
    """The replicas of one server: started, told of new bundles, counted, and ended. running: how many are ready."""

    def __init__(self, ray: ModuleType, config: ServeConfig) -> None:
        from ray import serve as ray_serve

        self.ray, self.serve, self.config = ray, ray_serve, config
        self.name = f"leanvit-{secrets.token_hex(4)}"
        self.threads, self.most = room(ray, config)
        self.wanted: dict[str, Wanted] = {}
        self.running = 0
        self.seen = time.monotonic()
        self.handle: Any = None
        self._ended = threading.Event()
        self._watching = threading.Thread(target=self._watch, name="count", daemon=True)
        # What it says at level info belongs to no log of ours; an import of it sets the level.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        self.serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        # Begun again where its process is lost; with this process it ends for good, which tells the replicas to end.
        actor = ray.remote(num_cpus=0, max_restarts=-1)(Shelf)
        self.shelf = actor.options(name=self.name, namespace=NAMESPACE).remote()

    def put(self, name: str, digest: str, data: bytes) -> None:
        """Have every replica serve a packed bundle; those that run have it, or all have the one before, when it ends.

        Raises EnvironmentProblem where one of them can't serve it.
        """
        before, self.wanted = self.wanted, {**self.wanted, name: (digest, [self.ray.put(data)])}
        try:
            self._want()
            if self.handle is not None:
                self._wait_for(name, digest)
        except EnvironmentProblem:
            self.wanted = before
            self._want()
            raise

    def _want(self) -> None:
        try:
            self.ray.get(self.shelf.want.remote(self.wanted))
        except self.ray.exceptions.RayError as error:
            raise EnvironmentProblem(f"the replicas can't be told of bundles: {_in_short(error)}") from error

    def _wait_for(self, name: str, digest: str) -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            _, said = self.ray.get(self.shelf.state.remote())
            failed = [errors[name][1] for _, errors in said.values() if errors.get(name, ("",))[0] == digest]
            if failed:
                raise EnvironmentProblem(f"a replica can't serve it: {failed[0]}")
            # Replicas that have ended said another digest last; those that start have this one.
            if [served.get(name) for served, _ in said.values()].count(digest) >= self._count():
                return
            if time.monotonic() > until:
                raise EnvironmentProblem(f"not all replicas had it after {START_SECONDS} s")
            time.sleep(LOOK / 2)

    def start(self) -> None:
        """Start the replicas, and wait until one is ready. Raises EnvironmentProblem."""
        app = self.serve.deployment(Replica).options(**self._options()).bind(self._told(), self.name)
        target = self.serve.RunTarget(app, name=self.name, route_prefix=None)
        (self.handle,) = self.serve.run_many([target], wait_for_applications_running=False)
        until = time.monotonic() + START_SECONDS
        while (state := self.serve.status().applications[self.name]).status != "RUNNING":
            if state.status == "DEPLOY_FAILED" or time.monotonic() > until:
                told = [one.message for one in state.deployments.values()]
                raise EnvironmentProblem(f"no replica of {self.threads} CPUs is ready: {_in_short(*told)}")
            time.sleep(LOOK / 5)
        self._count()
        self._watching.start()

    def _told(self) -> ServeConfig:
        """The configuration of a replica, which refuses no request for want of room: that is done before it."""
        most = self.config.max_queue * len(self.config.bundles)
        return replace(self.config, ray=None, ray_workers=None, threads=self.threads, max_queue=most, token_file=None)

    def _options(self) -> dict[str, Any]:
        environment = {"env_vars": thread_variables(self.threads)}
        return {
            "name": DEPLOYMENT,
            "max_ongoing_requests": self._told().max_queue,
            "health_check_period_s": 1,
            "graceful_shutdown_timeout_s": GRACE,
            "graceful_shutdown_wait_loop_s": LOOK,
            "ray_actor_options": {"num_cpus": self.threads, "runtime_env": environment},
            "autoscaling_config": {
                "min_replicas": 1,
                "max_replicas": self.most,
                # One more where beside the batch that runs another one waits, for some seconds; one less after minutes.
                "target_ongoing_requests": max(1, min(self.config.max_batch, self.config.max_queue // 2)),
                "upscale_delay_s": 3,
                "look_back_period_s": 11,  # at least; Ray wants more than the 10 s of a setting that it has given up
                "downscale_delay_s": 120,
            },
        }

    def _watch(self) -> None:
        while not self._ended.wait(LOOK):
            before = self.running
            # While Ray restarts what is asked here, the last number holds.
            with suppress(KeyError, RuntimeError, EnvironmentProblem, self.ray.exceptions.RayError):
                self._count()
                digests, _ = self.ray.get(self.shelf.state.remote())
                if not digests:  # its process was lost
                    self._want()
            if self.running != before:
                log.write("replicas", running=self.running, before=before)

    def _count(self) -> int:
        states = self.serve.status().applications[self.name].deployments[DEPLOYMENT].replica_states
        self.running = states.get("RUNNING", 0)
        if self.running:
            self.seen = time.monotonic()
        return self.running

    async def ask(self, asked: Asked, ticket: Ticket, receive: Receive) -> Answer:
        """The answer of a replica. Raises Dropped where the client leaves, Refusal (503) where the replica is lost."""
        response = self.handle.answer.remote(asked)
        answer = asyncio.ensure_future(_awaited(response))
        left = asyncio.ensure_future(_left(receive))
        try:
            while not answer.done():
                await asyncio.wait({answer, left}, timeout=LOOK, return_when=asyncio.FIRST_COMPLETED)
                if left.done():
                    ticket.gone = True
                    raise Dropped
                if time.monotonic() > self.seen + PATIENCE:
                    raise lost("no replica is left")
            return answer.result()
        except self.ray.exceptions.RayTaskError:
            raise  # what a replica raised is a bug
        except (self.ray.exceptions.RayError, self.serve.exceptions.RayServeException):
            raise lost("the process that had the request has ended") from None
        finally:
            left.cancel()
            if not answer.done():
                response.cancel()
                answer.cancel()

    def close(self) -> None:
        """End the replicas, where the cluster stays."""
        self._ended.set()
        if self._watching.is_alive():
            self._watching.join()
        # As the cluster may be lost, and what is left then ends by itself.
        with suppress(RuntimeError, self.ray.exceptions.RayError):
            if self.handle is not None:
                self.handle.shutdown()
            if self.config.ray != LOCAL:
                self.serve.delete(self.name)
                self.ray.kill(self.shelf)


async def _awaited(response: Any) -> Answer:
    found: Answer = await response
    return found


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def lost(reason: str) -> Refusal:
    """The refusal of a request whose replica is gone. It is not asked of another one here: a picture that kills one
    would kill them all."""
    return Refusal(503, f"{reason}; send the request again", reason="replica", retry_after=1)


def _in_short(*told: Any) -> str:
    """The last line of the first of several messages that says anything: that of a traceback names the error."""
    lines = [line.strip() for one in told for line in reversed(str(one).split("\n")) if line.strip()]
    return lines[0][:300] if lines else "nothing is said"
