"""`leanvit serve` and LitServe with the same bundle, in turns in one run: requests a second, overload and memory.

    .venv/bin/python benchmarks/serve.py BUNDLE --image photo.jpg --output benchmarks/results/serve.json
    .venv/bin/python benchmarks/serve.py BUNDLE --image photo.jpg --soak 50000 --peer none

BUNDLE: `leanvit demo` leaves a small one, `benchmarks/web.py --work FOLDER` one of ViT-S beside its photographs.

Clients (serve_clients.py) are a process of their own, with kept connections on loopback. Closed loop: a client
asks again when it has its answer. Overload: requests come at twice the rate of the most clients, whatever the answers,
which a server that bounds its queue refuses in part. LitServe decodes and runs with the same Predictor, batch size
and threads.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from leanvit.runtime.bundle import read_manifest
from leanvit.runtime.predictor import Predictor
from measure import facts
from serve_clients import Target, request_bytes, run_clients

OURS, THEIRS = "leanvit", "litserve"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def on_cores(cores: set[int]) -> Iterator[None]:
    """What is started within runs on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def started(name: str, args: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """A server that answers; yields its port and the path for images. Its whole process group is ended at the end."""
    port = free_port()
    command = [
        sys.executable, "-m", "leanvit", "serve", f"one={args.bundle}", "--port", str(port), "--threads",
        str(args.threads), "--max-batch", str(args.max_batch), "--max-queue", str(args.max_queue), "--no-access-log",
    ]  # fmt: skip
    if name == THEIRS:
        program = Path(__file__).with_name("serve_litserve.py")
        command = [sys.executable, str(program), str(args.bundle), str(port), str(args.threads), str(args.max_batch)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    probe, path = ("/v2/health/ready", "/v1/models/one:predict") if name == OURS else ("/health", "/predict")
    try:
        for _ in range(600):
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask_once(port, "GET", probe, b"", {})[0] == 200:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"{name} did not start")
        yield port, path
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def ask_once(port: int, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    started = time.perf_counter()
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, time.perf_counter() - started


def body_for(name: str, image: bytes) -> tuple[bytes, dict[str, str]]:
    """The request of each server: ours takes the image itself, LitServe a form."""
    if name == OURS:
        return image, {"Content-Type": "image/jpeg"}
    head = (
        b'--xyz\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    return head + image + b"\r\n--xyz--\r\n", {"Content-Type": "multipart/form-data; boundary=xyz"}


def load(
    name: str, port: int, path: str, image: bytes, seconds: float, *, count: int = 0, rate: float = 0, most: int = 10**9
) -> dict[str, Any]:
    """One run of `count` clients, or of `rate` requests a second, in a process of their own."""
    target = Target(port, request_bytes(path, *body_for(name, image)))
    context = multiprocessing.get_context("spawn")
    received, sent = context.Pipe(duplex=False)
    how = {"count": count, "rate": rate, "seconds": seconds, "most": most}
    process = context.Process(target=run_clients, args=(target, sent), kwargs=how)
    process.start()
    found, took = received.recv()
    process.join()
    good = sorted(t for code, t, _ in found if code == 200)
    refused = sorted(t for code, t, _ in found if code in (429, 503))
    never_sent = sum(code == -1 for code, _, _ in found)
    return {
        "clients": count,
        "offered_a_second": rate,
        "requests_a_second": round(len(good) / took, 1),
        "answered": len(good),
        "refused": len(refused),
        "never_sent": never_sent,
        "failed": len(found) - len(good) - len(refused) - never_sent,
        "refused_without_retry_after": sum(code in (429, 503) and not after for code, _, after in found),
        "p50_ms": _ms(good, 0.5),
        "p99_ms": _ms(good, 0.99),
        "refused_p99_ms": _ms(refused, 0.99),
        "refused_slowest_ms": _ms(refused, 1.0),
    }


def _ms(values: list[float], share: float) -> float | None:
    return round(1e3 * values[min(len(values) - 1, int(share * len(values)))], 1) if values else None


def resident(port: int) -> float:
    """MiB of the process that listens on a port and of its children."""
    table = subprocess.run(["ss", "-ltnpH", f"sport = :{port}"], capture_output=True, text=True, check=True).stdout
    total = 0.0
    for number in {part.split(",")[0] for part in table.split("pid=")[1:]}:
        for line in Path(f"/proc/{number}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                total += int(line.split()[1]) / 1024
    return round(total, 1)


def network_alone(args: argparse.Namespace, image: bytes) -> float:
    """Images a second of the same Predictor with nothing before or after the network: no server can do more."""
    predictor = Predictor(args.bundle, threads=args.threads)
    images = np.repeat(predictor.prepare(image)[None], args.max_batch, axis=0)
    predictor.outputs(images)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < args.seconds:
        predictor.outputs(images)
        count += len(images)
    return round(count / (time.perf_counter() - began), 1)


def compare(args: argparse.Namespace, image: bytes) -> dict[str, Any]:
    """Requests a second of both servers, each alone on the machine in its turn."""
    names = [OURS] if args.peer == "none" else [OURS, THEIRS]
    rounds: dict[str, dict[int, list[dict[str, Any]]]] = {name: {count: [] for count in args.clients} for name in names}
    alone = []
    for _ in range(args.rounds):
        alone.append(network_alone(args, image))
        print("network alone", alone[-1], flush=True)
        for name in names:
            with started(name, args) as (port, path):
                load(name, port, path, image, 1.0, count=4)
                for count in args.clients:
                    rounds[name][count].append(load(name, port, path, image, args.seconds, count=count))
                    print(name, json.dumps(rounds[name][count][-1]), flush=True)
    result: dict[str, Any] = {"rounds": rounds}
    medians = {
        name: {
            count: statistics.median(one["requests_a_second"] for one in rounds[name][count]) for count in args.clients
        }
        for name in names
    }
    result["median_requests_a_second"] = medians
    result["network_alone_images_a_second"] = statistics.median(alone)
    if len(names) == 2:
        result["ratio"] = {count: round(medians[OURS][count] / medians[THEIRS][count], 2) for count in args.clients}
    return result


def overload(args: argparse.Namespace, image: bytes) -> dict[str, Any]:
    """Our server with twice as many requests as it can do, and the limit that its queue sets; the median round.

    The clients have the last core and the server the others, as where clients are other machines: else what is measured
    is how two programs share a core. A server with as many threads as there are cores has the last one, too. The
    machine's speed drifts, so each round measures the capacity, with the most clients, just before.
    """
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        with on_cores(set(cores[: max(args.threads, len(cores) - 1)])):
            port, path = stack.enter_context(started(OURS, args))
        stack.enter_context(on_cores({cores[-1]}))
        load(OURS, port, path, image, 1.0, count=4)
        rounds = [_overload_once(args, image, port, path) for _ in range(args.rounds)]
    median = sorted(rounds, key=lambda found: found["p99_ratio"])[len(rounds) // 2]
    return {"median_by_p99_ratio": median, "rounds": rounds}


def _overload_once(args: argparse.Namespace, image: bytes, port: int, path: str) -> dict[str, Any]:
    capacity = load(OURS, port, path, image, args.seconds, count=max(args.clients))["requests_a_second"]
    found = load(OURS, port, path, image, 2 * args.seconds, rate=2 * capacity)
    wait_ms = 1e3 * (args.max_queue + args.max_batch) / capacity
    ratio = round(found["p99_ms"] / wait_ms, 2)
    done = {**found, "capacity": capacity, "queue_and_a_batch_ms": round(wait_ms, 1), "p99_ratio": ratio}
    print("overload", json.dumps(done), flush=True)
    return done


def soak(args: argparse.Namespace, image: bytes) -> dict[str, Any]:
    """Memory after a warm-up and after many more requests."""
    with started(OURS, args) as (port, path):
        load(OURS, port, path, image, 600, count=16, most=3000)
        before = resident(port)
        found = load(OURS, port, path, image, 3600, count=16, most=args.soak)
        return {**found, "rss_before_mib": before, "rss_after_mib": resident(port)}


def describe(bundle: Path) -> str:
    """What is served, in words."""
    manifest = read_manifest(bundle)
    size = manifest.preprocess.input_size
    return f"{manifest.architecture}, {manifest.profile}, {size}, sha256 {manifest.sha256[:16]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--max-queue", type=int, default=64)
    parser.add_argument("--peer", choices=("litserve", "none"), default="litserve")
    parser.add_argument("--soak", type=int, default=0, help="requests of the run that watches memory; 0: none")
    args = parser.parse_args()
    image = args.image.read_bytes()
    result: dict[str, Any] = {"bundle": describe(args.bundle), "image_bytes": len(image), "facts": facts()}
    result |= {"load_at_start": os.getloadavg()[0], "threads": args.threads, "max_batch": args.max_batch}
    result |= compare(args, image)
    result["overload"] = overload(args, image)
    if args.soak:
        result["soak"] = soak(args, image)
    print(json.dumps({key: value for key, value in result.items() if key != "rounds"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
