"""One thread a model that runs the network on what queued while it was at the batch before.

There is no waiting for company: a request that comes alone is run alone, at once. Under load the queue fills while a
batch runs, so batches grow by themselves, up to `max_batch`. Only where the network takes all cores does it let those
images be decoded first that are being decoded: both at once would each take longer.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from leanvit.annotations import Outputs
from leanvit.imaging import Pixels
from leanvit.serve.priority import yield_to_event_loop


@dataclass(eq=False)
class Ticket:
    """A request on its way through decoding, queue and network.

    until: time.monotonic() after which nobody waits for it. gone: whether its client has left.
    """

    until: float = float("inf")
    gone: bool = False

    @property
    def expired(self) -> bool:
        """Whether its deadline has passed."""
        return time.monotonic() > self.until

    @property
    def is_dropped(self) -> bool:
        """Whether work on it would be for nobody."""
        return self.gone or self.expired


class Dropped(Exception):
    """A request whose client left, or whose deadline passed, before the network was run for it."""


@dataclass(frozen=True)
class Computed:
    """Outputs of one request by name, and milliseconds in the queue and at the network."""

    outputs: Outputs
    queue_ms: float
    compute_ms: float


Result = tuple["asyncio.Future[Computed]", Computed | Exception]


@dataclass(eq=False)
class _Job:
    ticket: Ticket
    images: Pixels
    future: asyncio.Future[Computed]
    queued: float = field(default_factory=time.perf_counter)


class Batcher:
    """Runs `run` on images (N, H, W, C) uint8 of several requests at a time, in a thread of its own.

    observe: is told how many images each batch had and how many seconds it took. takes_all_cores: the runtime has a
    thread for every core, so what is being decoded is waited for; else the event loop goes before this thread, see
    `priority`.
    """

    def __init__(
        self,
        run: Callable[[Pixels], Outputs],
        max_batch: int,
        observe: Callable[[int, float], None] | None = None,
        *,
        takes_all_cores: bool = False,
    ) -> None:
        self._run = run
        self._max_batch = max_batch
        self._observe = observe
        self._takes_all_cores = takes_all_cores
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._runs = False
        self._coming = 0
        self.seconds_an_image = 0.0
        """Moving mean, for telling clients when to come again."""

    async def compute(self, ticket: Ticket, images: Pixels) -> Computed:
        """The outputs for the images of one request. Raises Dropped, or what the network raised."""
        future: asyncio.Future[Computed] = asyncio.get_running_loop().create_future()
        self.put(ticket, images, future)
        return await future

    def announce(self) -> None:
        """Images are being decoded; `decoded` follows, after `put` where they are any good."""
        with self._changed:
            self._coming += 1

    def decoded(self) -> None:
        """What was announced is queued, or will not come."""
        with self._changed:
            self._coming -= 1
            self._changed.notify()

    def put(self, ticket: Ticket, images: Pixels, future: asyncio.Future[Computed]) -> None:
        """Queue the images of one request, from any thread; `future` gets what `compute` returns or raises."""
        with self._changed:
            self._jobs.append(_Job(ticket, images, future))
            self._changed.notify()
            if not self._runs:
                self._runs = True
                threading.Thread(target=self._work, name="network", daemon=True).start()

    def close(self) -> None:
        """End the thread once everything that queues has been run; what comes later still is."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _work(self) -> None:
        if not self._takes_all_cores:
            yield_to_event_loop()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._closed)
                if self._takes_all_cores:
                    self._changed.wait_for(self._has_all, self.seconds_an_image)
                if not self._jobs:
                    self._runs = False
                    return
                taken, dropped = self._take()
            settle([(job.future, Dropped()) for job in dropped])
            if taken:
                settle(self._computed(taken))

    def _has_all(self) -> bool:
        """Whether waiting for what is being decoded would add nothing to the next batch."""
        return self._closed or self._coming <= 0 or sum(len(job.images) for job in self._jobs) >= self._max_batch

    def _take(self) -> tuple[list[_Job], list[_Job]]:
        """The jobs of the next batch, first come first served, and those for which nobody waits any more."""
        taken: list[_Job] = []
        dropped: list[_Job] = []
        count = 0
        while self._jobs:
            job = self._jobs[0]
            if job.ticket.is_dropped:
                dropped.append(self._jobs.popleft())
            elif taken and count + len(job.images) > self._max_batch:
                break
            else:
                count += len(job.images)
                taken.append(self._jobs.popleft())
        return taken, dropped

    def _computed(self, jobs: list[_Job]) -> list[Result]:
        started = time.perf_counter()
        try:
            outputs = self._in_steps([job.images for job in jobs])
        except Exception as error:
            return [(job.future, error) for job in jobs]
        seconds = time.perf_counter() - started
        count = sum(len(job.images) for job in jobs)
        mean = self.seconds_an_image
        self.seconds_an_image = 0.9 * mean + 0.1 * seconds / count if mean else seconds / count
        if self._observe:
            self._observe(count, seconds)
        results: list[Result] = []
        first = 0
        for job in jobs:
            last = first + len(job.images)
            own = {name: values[first:last] for name, values in outputs.items()}
            results.append((job.future, Computed(own, 1e3 * (started - job.queued), 1e3 * seconds)))
            first = last
        return results

    def _in_steps(self, images: Sequence[Pixels]) -> Outputs:
        """Outputs for all images; more than `max_batch`, which only one request alone can have, in steps."""
        together = images[0] if len(images) == 1 else np.concatenate(images)
        step = self._max_batch
        parts = [self._run(together[first : first + step]) for first in range(0, len(together), step)]
        return parts[0] if len(parts) == 1 else {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def settle(results: Sequence[Result]) -> None:
    """Hand results to the event loops that wait for them: one call a loop, for each call wakes it up."""
    for loop in {future.get_loop() for future, _ in results}:
        own = [(future, result) for future, result in results if future.get_loop() is loop]
        if not loop.is_closed():
            loop.call_soon_threadsafe(_set_all, own)


def _set_all(results: Sequence[Result]) -> None:
    for future, result in results:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
