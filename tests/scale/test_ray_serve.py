"""leanvit serve --ray: the answers of the plain server, by replicas that die, multiply and are told of new bundles."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from common import Outcome, smooth
from leanvit.config import ServeConfig
from leanvit.config.scale import LOCAL
from leanvit.errors import ConfigError, EnvironmentProblem, is_installed
from leanvit.imaging import encode_png
from leanvit.runtime.bundle import move_into_place, read_manifest, sign
from leanvit.scale.bundles import pack
from leanvit.scale.serve_fleet import Fleet, room
from leanvit.scale.serve_replica import Asked
from serving import Reply, Running, serving

IMAGE = encode_png(smooth(40, 48, seed=5))
TOKEN = "a-token-of-many-characters"
RIGHT = {"Authorization": f"Bearer {TOKEN}"}

on_ray = pytest.mark.skipif(not is_installed("ray"), reason='ray is missing: pip install "leanvit[ray]"')
pytestmark = pytest.mark.ray


def replicas(root: int) -> list[int]:
    """Processes of replicas below a process: a server that started its own Ray, or this one."""
    parents: dict[int, int] = {}
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status, command = (folder / "status").read_text(), (folder / "cmdline").read_bytes()
            except OSError:
                continue
            parents[int(folder.name)] = int(status.partition("PPid:")[2].split()[0])
            if command.startswith(b"ray::ServeReplica:leanvit-"):
                found.append(int(folder.name))

    def is_below(process: int) -> bool:
        return process == root or (process in parents and is_below(parents[process]))

    return [process for process in found if is_below(process)]


def wait_for(condition: Callable[[], Any], seconds: float = 40) -> Any:
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.1)
    return found


class Load:
    """Threads that ask without pause until the block ends; every answer, and when it came."""

    def __init__(self, running: Running, threads: int, image: bytes = IMAGE) -> None:
        self.running = running
        self.image = image
        self.replies: list[tuple[float, Reply]] = []
        self.failures: list[Exception] = []
        self.slowest = 0.0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                reply = self.running.predict("one", self.image, "?top_k=10", **RIGHT)
            except Exception as error:
                self.failures.append(error)
                continue
            now = time.monotonic()
            self.replies.append((now, reply))
            self.slowest = max(self.slowest, now - started)
            if reply.code != 200:
                time.sleep(0.05)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    @property
    def codes(self) -> Counter[int]:
        return Counter(reply.code for _, reply in list(self.replies))

    def after(self, moment: float) -> list[Reply]:
        return [reply for when, reply in self.replies if when > moment]


def renamed(bundle: Path, target: Path, first: str) -> Path:
    """A copy of a bundle whose first label has another name, signed again: what a retrained bundle looks like."""
    shutil.copytree(bundle, target)
    manifest = read_manifest(target)
    sign(target, replace(manifest, labels=(first, *manifest.labels[1:])))
    return target


WITHOUT_TIMES = re.compile(rb'"milliseconds": {[^}]*}')


def same(reply: Reply) -> tuple[int, bytes, dict[str, str]]:
    """A reply without what differs from one request to the next."""
    headers = {name: value for name, value in reply.headers.items() if name not in ("date", "content-length")}
    return reply.code, WITHOUT_TIMES.sub(b"", reply.body), headers


V2 = {"id": "7", "inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1],
                             "data": [base64.b64encode(IMAGE).decode()]}]}  # fmt: skip
REQUESTS = [
    ("POST", "/v1/models/one:predict", IMAGE, {}),
    ("POST", "/v1/models/one:predict?top_k=10", IMAGE, {}),
    ("POST", "/v1/models/one:predict", IMAGE[:-40], {}),
    ("POST", "/v1/models/one:predict?top_k=0", IMAGE, {}),
    ("POST", "/v1/models/one:predict", IMAGE, {"Accept": "image/png"}),
    ("POST", "/v1/models/one:predict", IMAGE, {"X_Timeout_Ms": "0"}),
    ("POST", "/v1/models/one:predict", IMAGE, {"X_Timeout_Ms": "soon"}),
    ("POST", "/v1/models/one:predict", encode_png(smooth(1100, 1000, seed=1)), {}),
    ("POST", "/v1/models/one:predict", bytes(300_001), {}),
    ("POST", "/v1/models/two:predict", IMAGE, {}),
    ("GET", "/v1/models/one:predict", None, {}),
    ("POST", "/v2/models/one/infer", json.dumps(V2).encode(), {}),
    ("POST", "/v2/models/one/versions/1/infer", json.dumps(V2).encode(), {}),
    ("POST", "/v2/models/one/infer", b"{}", {}),
    ("GET", "/v1/models", None, {}),
    ("GET", "/v1/models/one", None, {}),
    ("GET", "/v2/models/one", None, {}),
    ("GET", "/v2/models/one/ready", None, {}),
    ("GET", "/v2/health/ready", None, {}),
    ("GET", "/", None, {}),
    ("GET", "/nowhere", None, {}),
    ("PUT", "/v1/models/one:predict", IMAGE, {}),
]


@on_ray
def test_answers_are_those_of_the_plain_server_and_sigterm_ends_all(shared_bundle: Path) -> None:
    limits = ("--threads", 1, "--max-body", 300_000, "--max-pixels", 1_000_000)

    def replies(running: Running) -> list[tuple[int, bytes, dict[str, str]]]:
        return [same(running.ask(method, path, body, **headers)) for method, path, body, headers in REQUESTS]

    with serving(f"one={shared_bundle}", *limits) as running:
        expected = replies(running)
    with serving(f"one={shared_bundle}", *limits, "--ray", "local", "--ray-workers", 1) as running:
        for request, found, wanted in zip(REQUESTS, replies(running), expected, strict=True):
            assert found == wanted, request[:2]
        assert {code for code, _, _ in expected} == {200, 400, 404, 405, 406, 413, 429}
        assert running.metric("leanvit_seconds_count", stage="compute", model="one") == 4
        (replica,) = replicas(running.process.pid)
        assert "torch" not in Path(f"/proc/{replica}/maps").read_text()
        assert running.end() == 143
        assert [line["event"] for line in running.events][-1] == "ended"
        wait_for(lambda: not Path(f"/proc/{replica}").exists())
    assert running.errors == ["leanvit: terminated; what was finished before is kept\n"]


@pytest.fixture(scope="module")
def address(cluster: ModuleType) -> str:
    """Of the cluster that servers join."""
    return str(cluster.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def folder(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that `server` serves, which a test may replace."""
    return Path(shutil.copytree(shared_bundle, tmp_path_factory.mktemp("served") / "bundle"))


@pytest.fixture(scope="module")
def server(address: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server on the cluster with room for two replicas, and with a token."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(TOKEN)
    few = ("--max-queue", 8, "--max-batch", 4, "--threads", 1, "--ray-workers", 2, "--watch", 0.2)
    with serving(f"one={folder}", "--ray", address, "--token-file", token, *few) as running:
        yield running


def two(server: Running) -> list[int]:
    """The processes of both replicas, once load has brought the second."""
    return wait_for(lambda: found if len(found := replicas(os.getpid())) == 2 and ready(server) == 2 else None)


def ready(server: Running) -> int:
    """Replicas that the server last said to be ready."""
    lines = server.named("replicas")
    return int(lines[-1]["running"]) if lines else 1


def test_a_wrong_token_is_refused_as_by_the_plain_server(server: Running) -> None:
    for headers in ({}, {"Authorization": "Bearer a-token-of-other-characters"}):
        reply = server.predict("one", IMAGE, **headers)
        assert (reply.code, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert server.get("/v2/health/ready").code == 200
    assert server.predict("one", IMAGE, **RIGHT).code == 200


def test_a_killed_replica_costs_the_requests_that_it_had_and_these_are_told_so(server: Running) -> None:
    # Large, so that it has some in work whenever it is killed.
    with Load(server, 12, encode_png(smooth(900, 1200, seed=5))) as load:
        victim = two(server)[0]
        time.sleep(1)
        before = load.codes
        assert set(before) <= {200, 429}
        os.kill(victim, signal.SIGKILL)
        wait_for(lambda: ready(server) == 1, 10)
        after_loss = len(load.replies)
        wait_for(lambda: len(load.replies) > after_loss + 50)
        wait_for(lambda: victim not in two(server))
        recovered = time.monotonic() + 0.5
        wait_for(lambda: len(load.after(recovered)) > 50)
    assert load.failures == []
    assert set(load.codes) <= {200, 429, 503}
    # Each client waits for one request at a time, and more than eight are not taken of one replica.
    assert 1 <= load.codes[503] <= 12
    for _, reply in load.replies:
        assert reply.code == 200 or int(reply.headers["retry-after"]) >= 1
    assert {reply.code for reply in load.after(recovered)} == {200}
    assert load.slowest < 10


def test_more_than_the_replicas_take_is_refused_at_once(server: Running) -> None:
    with Load(server, 40) as load:
        time.sleep(4)
    assert load.failures == []
    assert set(load.codes) == {200, 429}
    refused = [reply for _, reply in load.replies if reply.code == 429]
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    assert "too many requests wait" in refused[0].json["error"]
    assert load.slowest < 10
    assert [server.predict("one", IMAGE, **RIGHT).code for _ in range(10)] == [200] * 10


def test_a_bundle_is_replaced_under_load_without_a_failed_request(
    server: Running, folder: Path, tmp_path: Path
) -> None:
    digests = {read_manifest(folder).sha256: "label 0"}
    with Load(server, 6) as load:
        two(server)
        for number in range(3):
            damaged = number == 1
            new = renamed(folder, tmp_path / "new", f"of swap {number}")
            if damaged:
                with open(new / "model.onnx", "r+b") as file:
                    file.seek(1000)
                    file.write(b"\xff\xff\xff")
            else:
                digests[read_manifest(new).sha256] = f"of swap {number}"
            last = list(digests)[-1]
            event = "bundle kept" if damaged else "bundle swapped"
            count = len(server.named(event))
            pristine = Path(shutil.copytree(folder, tmp_path / f"pristine {number}"))
            move_into_place(new, folder)
            server.named(event, count + 1)[-1]
            swapped = time.monotonic() + 1
            wait_for(lambda swapped=swapped: len(load.after(swapped)) > 30)
            assert {reply.json["bundle"] for reply in load.after(swapped)} == {last}
            if damaged:
                move_into_place(pristine, folder)
    assert load.failures == []
    assert set(load.codes) == {200}
    for _, reply in load.replies:
        assert digests[reply.json["bundle"]] in {one["label"] for one in reply.json["predictions"]}
    # Later replicas have it from the start.
    victim = replicas(os.getpid())[0]
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: victim not in replicas(os.getpid()) and server.predict("one", IMAGE, **RIGHT).code == 200)
    assert {server.predict("one", IMAGE, **RIGHT).json["bundle"] for _ in range(20)} == {last}


def test_what_a_client_that_left_had_asked_is_dropped_before_the_network_runs(server: Running) -> None:
    def count(name: str, **labels: str) -> float:
        lines = server.get("/metrics", **RIGHT).body.decode().splitlines()
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(name) and all(w in line for w in wanted)
        )

    images = count("leanvit_batch_images_sum")
    head = f"POST /v1/models/one:predict HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {TOKEN}\r\n"
    for _ in range(40):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(f"{head}Content-Length: {len(IMAGE)}\r\n\r\n".encode() + IMAGE)
    wait_for(lambda: count("leanvit_pending") == 0)
    dropped = count("leanvit_dropped_total", reason="disconnected")
    assert dropped > 20
    server.predict("one", IMAGE, **RIGHT)  # numbers of a replica come with its answers
    assert count("leanvit_batch_images_sum") - images < 40


def test_replicas_end_when_the_server_is_killed(server: Running) -> None:
    """Last in this file, for it ends the server that the tests share."""
    assert replicas(os.getpid())
    server.process.kill()
    wait_for(lambda: not replicas(os.getpid()))


def test_a_bundle_that_a_replica_can_t_serve_is_taken_back(cluster: ModuleType, shared_bundle: Path) -> None:
    config = ServeConfig(bundles=[f"one={shared_bundle}"], threads=1, ray=LOCAL, ray_workers=1)
    fleet = Fleet(cluster, config)
    try:
        digest = read_manifest(shared_bundle).sha256
        fleet.put("one", digest, pack(shared_bundle))
        fleet.start()
        with pytest.raises(EnvironmentProblem, match=r"can't serve it: ReadError"):
            fleet.put("one", "f" * 64, b"no archive")
        wanted, said = cluster.get(fleet.shelf.state.remote())
        assert wanted == {"one": digest}
        assert [served for served, _ in said.values()][-1] == {"one": digest}
        assert fleet.handle.answer.remote(Asked("predict", "one", b"", [], IMAGE)).result(timeout_s=30).code == 200
    finally:
        fleet.close()


def test_without_a_replica_it_is_not_ready_and_ctrl_c_ends_all(address: str, shared_bundle: Path) -> None:
    with serving(f"one={shared_bundle}", "--ray", address, "--ray-workers", 1, "--threads", 1) as running:
        assert running.predict("one", IMAGE).code == 200
        os.kill(replicas(os.getpid())[0], signal.SIGKILL)
        wait_for(lambda: running.get("/v2/health/ready").code == 503, 10)
        refused = running.predict("one", IMAGE)
        assert (refused.code, refused.headers["retry-after"]) == (503, "1")
        assert running.get("/v2/health/live").code == running.get("/v1/models/one").code == 200
        wait_for(lambda: running.predict("one", IMAGE).code == 200)
        assert running.get("/v2/health/ready").code == 200
        assert running.end(signal.SIGINT) == 130
        assert running.errors == ["leanvit: interrupted; what was finished before is kept\n"]
        wait_for(lambda: not replicas(os.getpid()))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--ray", "local", "--workers", "2"), "--ray-workers 2"),
        (("--ray-workers", "2"), "--ray local"),
    ],
)
def test_flags_that_do_not_fit_are_refused_by_name(
    leanvit: Callable[..., Outcome], flags: tuple[str, ...], told: str
) -> None:
    outcome = leanvit("serve", "/nowhere", "--port", 0, *flags)
    assert outcome.code == 2
    assert told in outcome.error


def test_more_replicas_than_there_is_room_for_are_refused() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 4.0}}, {"Alive": True, "Resources": {"CPU": 2.0}}]
    ray: Any = SimpleNamespace(nodes=lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 64.0}}])

    def asked(**options: Any) -> tuple[int, int]:
        return room(ray, ServeConfig(bundles=["one"], **{"ray": LOCAL, **options}))

    assert asked() == (1, 6)
    assert asked(threads=2) == (2, 3)
    assert asked(threads=4) == (4, 1)
    assert asked(ray_workers=2) == (2, 2)
    assert asked(ray_workers=4) == (1, 4)
    assert asked(ray_workers=1) == (4, 1)
    assert asked(ray="10.0.0.1:6379", ray_workers=50) == (1, 50)
    for wrong in ({"threads": 5}, {"ray_workers": 7}, {"ray_workers": 2, "threads": 4}):
        with pytest.raises(ConfigError, match="Give fewer"):
            asked(**wrong)


WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""


@pytest.mark.parametrize(
    "program",
    [
        'BLOCKED = ("torch", "timm", "torchvision", "safetensors", "onnx", "scipy", "ray"); import leanvit.scale.serve',
        'BLOCKED = ("ray",); import leanvit.cli; sys.exit(leanvit.cli.main(["serve", "/nowhere"]) - 3)',
    ],
)
def test_torch_is_never_imported_and_ray_only_where_it_is_asked_for(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
