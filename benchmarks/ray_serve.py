"""`leanvit serve --ray local` beside `leanvit serve`: requests a second, and a replica that is killed under load.

    .venv/bin/python benchmarks/ray_serve.py BUNDLE --image photo.jpg --output benchmarks/results/ray_serve.json

Each server alone in its turn, one thread a network, clients of serve_clients.py on the same machine. The kill: 16
clients, and a second replica which their load has brought.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from leanvit.files import write_json
from measure import facts
from serve_clients import Target, request_bytes, run_clients

CLIENTS = (1, 16)


class Server:
    """A server that runs, and the lines of its log."""

    def __init__(self, bundle: str, *flags: str) -> None:
        command = [sys.executable, "-m", "leanvit", "serve", f"one={bundle}", "--port", "0", "--threads", "1"]
        began = time.perf_counter()
        self.process = subprocess.Popen([*command, "--no-access-log", *flags], stdout=subprocess.PIPE, text=True)
        self.lines: list[tuple[float, dict[str, Any]]] = []
        threading.Thread(target=self._read, daemon=True).start()
        (_, line) = self.wait_for("serving", 120)
        self.start_seconds = round(time.perf_counter() - began, 1)
        self.port = int(line["port"])

    def _read(self) -> None:
        for text in self.process.stdout or ():
            self.lines.append((time.perf_counter(), json.loads(text)))

    def wait_for(self, event: str, seconds: float, since: float = 0.0, **values: Any) -> tuple[float, dict[str, Any]]:
        """The first line of the log of this kind with these values, and when it came."""
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for when, line in list(self.lines):
                if when > since and line["event"] == event and line.items() >= values.items():
                    return when, line
            time.sleep(0.05)
        raise RuntimeError(f"no line {event} {values} in {seconds} s")

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


class Clients:
    """`count` clients for some seconds, in a process of their own."""

    def __init__(self, server: Server, image: bytes, count: int, seconds: float) -> None:
        target = Target(server.port, request_bytes("/v1/models/one:predict", image, {}))
        context = multiprocessing.get_context("spawn")
        self.received, sent = context.Pipe(duplex=False)
        how = {"count": count, "seconds": seconds, "most": 10**9}
        self.process = context.Process(target=run_clients, args=(target, sent), kwargs=how)
        self.process.start()

    def result(self) -> dict[str, Any]:
        found, took = self.received.recv()
        self.process.join()
        good = sorted(seconds for code, seconds, _ in found if code == 200)
        return {
            "requests_a_second": round(len(good) / took, 1),
            "codes": dict(Counter(str(code) for code, _, _ in found)),
            "p50_ms": round(1e3 * good[len(good) // 2], 1),
            "p99_ms": round(1e3 * good[len(good) * 99 // 100], 1),
            "slowest_ms": round(1e3 * max(seconds for _, seconds, _ in found), 1),
        }


def replicas() -> list[int]:
    """Processes of the replicas: no other Ray runs on a machine that measures."""
    found = subprocess.run(["pgrep", "-f", "^ray::ServeReplica:leanvit-"], capture_output=True, text=True, check=False)
    return [int(number) for number in found.stdout.split()]


def throughput(server: Server, image: bytes, seconds: float) -> dict[str, Any]:
    """Requests a second of a server, after a second to warm up."""
    Clients(server, image, 4, 1.0).result()
    found = {str(count): Clients(server, image, count, seconds).result() for count in CLIENTS}
    return {"start_seconds": server.start_seconds, "clients": found}


def killed(server: Server, image: bytes) -> dict[str, Any]:
    """What clients are answered when one of two replicas is killed, and the seconds until there are two again."""
    clients = Clients(server, image, CLIENTS[-1], 40.0)
    server.wait_for("replicas", 30, running=2)
    time.sleep(3)
    at = time.perf_counter()
    os.kill(replicas()[0], signal.SIGKILL)
    noticed, _ = server.wait_for("replicas", 10, at, running=1)
    again, _ = server.wait_for("replicas", 30, at, running=2)
    return {"noticed_after_s": round(noticed - at, 1), "two_again_after_s": round(again - at, 1), **clients.result()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--image", required=True)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--output", default="benchmarks/results/ray_serve.json")
    args = parser.parse_args()
    image = Path(args.image).read_bytes()
    result: dict[str, Any] = {"facts": facts(), "bundle": args.bundle, "image_bytes": len(image)}
    one, two = ("--ray", "local", "--ray-workers", "1"), ("--ray", "local", "--ray-workers", "2", "--max-batch", "4")
    for name, flags in (("plain", ()), ("ray_one_replica", one), ("killed_of_two", two)):
        server = Server(args.bundle, *flags)
        result[name] = killed(server, image) if flags == two else throughput(server, image, args.seconds)
        server.end()
        print(name, json.dumps(result[name]), flush=True)
    write_json(Path(args.output), result)


if __name__ == "__main__":
    main()
