"""A server's life: swaps under load, refused bundles, deaths of workers, clients that leave, and an orderly end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

import pytest

from common import smooth
from leanvit.imaging import encode_png
from leanvit.runtime.bundle import move_into_place, read_manifest, sign
from serving import Reply, Running, serving

IMAGE = encode_png(smooth(40, 48, seed=5))
SWAPS = int(os.environ.get("LEANVIT_SWAPS", "6"))
"""The environment's LEANVIT_SWAPS=50 is for a long run."""


def renamed(bundle: Path, target: Path, first: str) -> Path:
    """A copy of a bundle whose first label has another name, signed again: what a retrained bundle looks like."""
    shutil.copytree(bundle, target)
    manifest = read_manifest(target)
    sign(target, replace(manifest, labels=(first, *manifest.labels[1:])))
    return target


class Load:
    """Threads that ask without pause; every answer is kept."""

    def __init__(self, running: Running, threads: int, name: str = "one") -> None:
        self.replies: list[Reply] = []
        self.failures: list[Exception] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(running, name)) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def _ask(self, running: Running, name: str) -> None:
        while not self._stop.is_set():
            try:
                self.replies.append(running.predict(name, IMAGE, "?top_k=10"))
            except Exception as error:
                self.failures.append(error)
                time.sleep(0.01)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)


def test_bundles_are_swapped_under_load_and_damaged_ones_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    pristine = Path(shutil.copytree(bundle, tmp_path / "pristine"))
    digests = {read_manifest(bundle).sha256: "label 0"}
    with serving(f"one={bundle}", "--threads", 1, "--watch", 0) as running:
        load = Load(running, 3)
        for number in range(SWAPS):
            damaged = number % 5 == 1
            new = renamed(pristine, tmp_path / "new", f"of swap {number}")
            if damaged:
                with open(new / "model.onnx", "r+b") as file:
                    file.seek(1000)
                    file.write(b"\xff\xff\xff")
            else:
                digests[read_manifest(new).sha256] = f"of swap {number}"
            move_into_place(new, bundle)
            event = "bundle kept" if damaged else "bundle swapped"
            count = len(running.named(event))
            running.process.send_signal(signal.SIGHUP)
            line = running.named(event, count + 1)[-1]
            assert line["model"] == "one"
            assert not damaged or "model.onnx" in line["error"]
        load.stop()
        assert load.failures == []
        assert {reply.code for reply in load.replies} == {200}
        for reply in load.replies:
            labels = {one["label"] for one in reply.json["predictions"]}
            assert digests[reply.json["bundle"]] in labels
        assert len({reply.json["bundle"] for reply in load.replies}) > 2
        assert running.metric("leanvit_swaps_total", outcome="kept") == len(range(1, SWAPS, 5))
        assert running.end() == 143


def test_a_replaced_folder_is_noticed_without_a_signal(bundle: Path, tmp_path: Path) -> None:
    with serving(f"one={bundle}", "--watch", 0.2) as running:
        before = running.get("/v1/models/one").json["bundle"]
        move_into_place(renamed(bundle, tmp_path / "new", "fresh"), bundle)
        line = running.named("bundle swapped", 1)[0]
        facts = running.get("/v1/models/one").json
        assert (line["before"], line["bundle"]) == (before, facts["bundle"])
        assert facts["labels"][0] == "fresh"
        with open(bundle / "golden.npz", "ab") as file:
            file.write(b"\0")
        assert "golden.npz" in running.named("bundle kept", 1)[0]["error"]
        time.sleep(1)
        assert len(running.named("bundle kept")) == 1, "one failure is told once"
        shutil.rmtree(bundle)
        time.sleep(0.5)
        assert running.predict("one", IMAGE).code == 200


def test_sigterm_under_load_loses_nothing_that_was_taken(shared_bundle: Path) -> None:
    with serving(f"one={shared_bundle}", "--threads", 1, drain=1.0) as running:
        load = Load(running, 8)
        time.sleep(1)
        running.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        ready = running.get("/v2/health/ready")
        assert ready.code == 503
        assert running.get("/v2/health/live").code == 200
        assert ready.headers["connection"] == "close"
        assert running.process.wait(30) == 143
        load.stop()
        assert {reply.code for reply in load.replies} == {200}
        # The kernel resets those that it took and nobody had accepted when the port was closed: one a thread at most.
        assert len([error for error in load.failures if not isinstance(error, ConnectionRefusedError)]) <= 8
        with pytest.raises(ConnectionRefusedError):
            running.get("/v2/health/live")


def test_ctrl_c_ends_at_once(shared_bundle: Path) -> None:
    with serving(f"one={shared_bundle}", drain=30) as running:
        started = time.monotonic()
        assert running.end(signal.SIGINT) == 130
        assert time.monotonic() - started < 10


def test_clients_that_leave_are_dropped_before_the_network_runs(shared_bundle: Path) -> None:
    with serving(f"one={shared_bundle}", "--threads", 1, "--max-batch", 1) as running:
        head = b"POST /v1/models/one:predict HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n" % len(IMAGE)
        for _ in range(40):
            with socket.create_connection(("127.0.0.1", running.port)) as connection:
                connection.sendall(head + IMAGE)
        until = time.monotonic() + 20
        while running.metric("leanvit_pending") and time.monotonic() < until:
            time.sleep(0.05)
        dropped = running.metric("leanvit_dropped_total", reason="disconnected")
        assert dropped > 0
        assert running.metric("leanvit_batch_images_sum") + dropped <= 40
        assert running.predict("one", IMAGE).code == 200


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def test_a_worker_that_is_killed_is_replaced_and_none_outlives_the_end(shared_bundle: Path) -> None:
    with serving(f"one={shared_bundle}", "--workers", 2, "--threads", 1) as running:
        workers = [line["process"] for line in running.named("serving", 2)]
        assert len(set(workers)) == 2
        assert running.process.pid not in workers
        with ThreadPoolExecutor(4) as pool:
            codes = [reply.code for reply in pool.map(lambda _: running.predict("one", IMAGE), range(40))]
        assert codes == [200] * 40
        assert running.metric("leanvit_requests_total", model="one", code="200") == 40
        os.kill(workers[0], signal.SIGKILL)
        third = running.named("serving", 3)[-1]["process"]
        assert third not in workers
        assert [running.predict("one", IMAGE).code for _ in range(10)] == [200] * 10
        assert running.end() == 143
        for process in (workers[1], third):
            assert wait_for(lambda process=process: not Path(f"/proc/{process}").exists(), 10)


def test_a_kill_under_load_costs_a_client_that_sends_again_nothing(shared_bundle: Path) -> None:
    """What a killed process held is gone with its connections; their end tells it, and the next try is answered."""
    resets: list[Exception] = []
    stop = threading.Event()

    def ask_on() -> list[Reply]:
        found = []
        while not stop.is_set():
            try:
                found.append(running.predict("one", IMAGE))
            except (ConnectionError, HTTPException) as error:
                resets.append(error)
                time.sleep(0.2)  # the kernel closes the process's connections before the port that it listened on
                found.append(running.predict("one", IMAGE))
        return found

    with serving(f"one={shared_bundle}", "--workers", 2, "--threads", 1) as running, ThreadPoolExecutor(8) as pool:
        expected = running.predict("one", IMAGE).json["predictions"]
        clients = [pool.submit(ask_on) for _ in range(8)]
        for number in range(3):
            time.sleep(1)
            os.kill(running.named("serving", 2 + number)[-1]["process"], signal.SIGKILL)
            running.named("serving", 3 + number)
        stop.set()
        replies = [reply for client in clients for reply in client.result(30)]
        assert {reply.code for reply in replies} == {200}
        assert all(reply.json["predictions"] == expected for reply in replies)
        assert len(resets) <= 3 * 8, "each kill ends at most the one request of each client"


def test_workers_end_when_their_parent_is_killed(shared_bundle: Path) -> None:
    with serving(f"one={shared_bundle}", "--workers", 2, "--threads", 1) as running:
        workers = [line["process"] for line in running.named("serving", 2)]
        running.process.kill()
        running.process.wait()
        for process in workers:
            gone = Path(f"/proc/{process}/stat")
            assert wait_for(lambda gone=gone: not gone.exists() or ") Z " in gone.read_text(), 10)


def test_workers_that_can_t_start_end_the_server_with_their_reason(bundle: Path) -> None:
    (bundle / "golden.npz").unlink()
    with pytest.raises(RuntimeError, match=r"golden\.npz"), serving(f"one={bundle}", "--workers", 2):
        pass


def test_a_port_that_is_taken_is_named(shared_bundle: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RuntimeError, match="Give another --port"), \
                serving(shared_bundle, f"--port={other.getsockname()[1]}"):  # fmt: skip
            pass
