"""The batcher alone: who is run with whom, who is dropped, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from leanvit.serve.batcher import Batcher, Dropped, Ticket


class Network:
    """Returns the sum of each image; waits at a gate, and remembers its batches."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, images: Any) -> dict[str, Any]:
        self.batches.append([int(image.sum()) for image in images])
        self.entered.set()
        assert self.gate.wait(10)
        return {"sums": images.sum(axis=(1, 2, 3)).astype(np.float32)}


def image(value: int, count: int = 1) -> np.ndarray:
    return np.full((count, 1, 1, 1), value, np.uint8)


async def held(network: Network, batcher: Batcher) -> asyncio.Task[Any]:
    """A request that keeps the network busy until the gate opens."""
    network.gate.clear()
    task = asyncio.create_task(batcher.compute(Ticket(), image(100)))
    await asyncio.to_thread(network.entered.wait, 10)
    return task


def test_what_queued_while_a_batch_ran_is_the_next_batch_and_each_gets_its_own() -> None:
    async def run() -> None:
        network = Network()
        seen: list[int] = []
        batcher = Batcher(network, 4, lambda count, seconds: seen.append(count))
        first = await held(network, batcher)
        others = [asyncio.create_task(batcher.compute(Ticket(), image(value))) for value in range(1, 7)]
        await asyncio.sleep(0)
        network.gate.set()
        assert (await first).outputs["sums"].tolist() == [100]
        assert [(await one).outputs["sums"].tolist() for one in others] == [[v] for v in range(1, 7)]
        assert network.batches == [[100], [1, 2, 3, 4], [5, 6]]
        assert seen == [1, 4, 2]
        assert batcher.seconds_an_image > 0
        batcher.close()

    asyncio.run(run())


def test_a_lone_request_does_not_wait_for_company() -> None:
    async def run() -> float:
        batcher = Batcher(Network(), 16)
        await batcher.compute(Ticket(), image(1))
        started = time.perf_counter()
        for _ in range(100):
            await batcher.compute(Ticket(), image(1))
        return (time.perf_counter() - started) / 100

    assert asyncio.run(run()) < 0.02


async def on_all_cores(max_batch: int) -> tuple[Network, Batcher]:
    """A network that takes all cores, after its first batch, and its batcher."""
    network = Network()
    batcher = Batcher(network, max_batch, takes_all_cores=True)
    await batcher.compute(Ticket(), image(9))
    return network, batcher


def test_a_network_on_all_cores_lets_be_decoded_first_what_is_being_decoded() -> None:
    async def run() -> None:
        network, batcher = await on_all_cores(4)
        batcher.seconds_an_image = 30.0
        for _ in range(3):
            batcher.announce()
        first = asyncio.create_task(batcher.compute(Ticket(), image(1)))
        await asyncio.sleep(0.05)
        batcher.decoded()
        second = asyncio.create_task(batcher.compute(Ticket(), image(2)))
        await asyncio.sleep(0.05)
        batcher.decoded()
        assert not first.done()
        batcher.decoded()  # the third was no image
        assert [(await one).outputs["sums"].tolist() for one in (first, second)] == [[1], [2]]
        assert network.batches == [[9], [1, 2]]
        batcher.close()

    asyncio.run(run())


def test_it_waits_no_longer_than_one_image_takes_and_not_for_a_full_batch() -> None:
    async def run() -> None:
        network, batcher = await on_all_cores(2)
        batcher.seconds_an_image = 0.05
        batcher.announce()
        assert (await asyncio.wait_for(batcher.compute(Ticket(), image(1)), 10)).outputs["sums"].tolist() == [1]
        batcher.seconds_an_image = 30.0
        jobs = [asyncio.create_task(batcher.compute(Ticket(), image(value))) for value in (2, 3)]
        await asyncio.wait_for(asyncio.gather(*jobs), 10)
        assert network.batches[-1] == [2, 3]
        batcher.close()

    asyncio.run(run())


def test_nobody_who_left_and_nothing_expired_reaches_the_network() -> None:
    async def run() -> None:
        network = Network()
        batcher = Batcher(network, 4)
        first = await held(network, batcher)
        gone, late, stays = Ticket(), Ticket(until=time.monotonic() + 0.01), Ticket(until=time.monotonic() + 60)
        jobs = [asyncio.create_task(batcher.compute(t, image(v))) for v, t in ((1, gone), (2, late), (3, stays))]
        await asyncio.sleep(0.05)
        gone.gone = True
        network.gate.set()
        await first
        for dropped in jobs[:2]:
            with pytest.raises(Dropped):
                await dropped
        assert (await jobs[2]).outputs["sums"].tolist() == [3]
        assert network.batches == [[100], [3]]

    asyncio.run(run())


def test_one_request_of_many_images_is_run_in_steps() -> None:
    async def run() -> None:
        network = Network()
        batcher = Batcher(network, 4)
        images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
        assert (await batcher.compute(Ticket(), images)).outputs["sums"].tolist() == list(range(10))
        assert network.batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    asyncio.run(run())


def test_an_error_of_the_network_reaches_its_requests_and_not_the_next() -> None:
    async def run() -> None:
        broken = True

        def network(images: Any) -> dict[str, Any]:
            if broken:
                raise ValueError("no")
            return {"sums": images.sum(axis=(1, 2, 3))}

        batcher = Batcher(network, 4)
        with pytest.raises(ValueError, match="no"):
            await batcher.compute(Ticket(), image(1))
        broken = False
        assert (await batcher.compute(Ticket(), image(7))).outputs["sums"].tolist() == [7]

    asyncio.run(run())


def test_a_closed_batcher_ends_its_thread_and_still_runs_what_comes() -> None:
    async def run() -> None:
        before = threading.active_count()
        batcher = Batcher(Network(), 4)
        await batcher.compute(Ticket(), image(1))
        assert threading.active_count() == before + 1
        batcher.close()
        until = time.monotonic() + 10
        while threading.active_count() > before and time.monotonic() < until:
            await asyncio.sleep(0.01)
        assert threading.active_count() == before
        assert (await batcher.compute(Ticket(), image(5))).outputs["sums"].tolist() == [5]

    asyncio.run(run())
