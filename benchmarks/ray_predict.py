"""Prediction on Ray: a cluster of two nodes that loses one and then its driver, and its throughput beside one process.

    python benchmarks/ray_predict.py BUNDLE IMAGES --lose     a node is removed at a third, the driver killed at two
    python benchmarks/ray_predict.py BUNDLE IMAGES --speed    two workers of one core beside one process of two threads

The nodes are processes of this machine. Rows go to benchmarks/results/ray_predict.json. Nothing else should run.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leanvit.bench import machine
from leanvit.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "ray_predict.json"
LEANVIT = str(Path(sys.executable).with_name("leanvit"))
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
}  # fmt: skip


def rows_in(folder: Path) -> list[str]:
    """All rows of a run in parts."""
    return [row for part in sorted(folder.glob("part-*")) for row in part.read_text().splitlines()]


class Watch:
    """The resident memory of processes in MiB, looked at twice a second by what they are."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {"driver": [], "worker": []}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while not self.stop.wait(0.5):
            sizes: dict[str, list[float]] = {"driver": [], "worker": []}
            for entry in Path("/proc").glob("[0-9]*"):
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    kind = (
                        "worker"
                        if "ray::make_part" in line
                        else "driver"
                        if "predict" in line and LEANVIT in line
                        else ""
                    )
                    if kind:
                        sizes[kind].append(int((entry / "statm").read_text().split()[1]) * 4096 / 2**20)
                except (OSError, ValueError, IndexError):
                    continue
            for kind, found in sizes.items():
                if found:
                    self.seen[kind].append(max(found))

    def result(self) -> dict[str, Any]:
        """Of each kind the largest in the second quarter of the time and in the last."""
        self.stop.set()
        quarters = {}
        for kind, found in self.seen.items():
            size = max(1, len(found) // 4)
            quarters[kind] = {"second_quarter": max(found[size : 2 * size] or [0]), "last": max(found[-size:] or [0])}
        return quarters


def lose(args: argparse.Namespace) -> dict[str, Any]:
    """One node removed at a third of the parts, the driver killed at two thirds and started again."""
    from ray.cluster_utils import Cluster

    alone, spread = Path(args.folder) / "alone", Path(args.folder) / "spread"
    common = ["predict", args.bundle, args.images, "--threads", "1", "--part-images", str(args.part_images)]
    subprocess.run([LEANVIT, *common, "--output", f"{alone}/"], check=False, stderr=subprocess.DEVNULL)
    whole = read_json(alone / "manifest.json")
    count = len(whole["parts"])
    node = {"num_cpus": 1, "object_store_memory": 128 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    second = cluster.add_node(num_cpus=1, object_store_memory=128 * 2**20)
    command = [LEANVIT, *common, "--output", f"{spread}/", "--ray", cluster.address]
    watch, events = Watch(), []
    started = time.monotonic()
    driver = subprocess.Popen(command)
    _wait(lambda: len(list(spread.glob("part-*"))) >= count // 3)
    cluster.remove_node(second, allow_graceful=False)
    events.append({"node removed": time.monotonic() - started, "parts": len(list(spread.glob("part-*")))})
    _wait(lambda: len(list(spread.glob("part-*"))) >= 2 * count // 3)
    driver.kill()
    driver.wait()
    events.append({"driver killed": time.monotonic() - started, "parts": len(list(spread.glob("part-*")))})
    code = subprocess.run([*command, "--resume"], check=False).returncode
    seconds = time.monotonic() - started
    cluster.shutdown()
    rows, expected = rows_in(spread), rows_in(alone)
    return {
        "case": "lose",
        "images": whole["images"],
        "parts": count,
        "exit_code": code,
        "rows": len(rows),
        "distinct_rows": len(set(rows)),
        "same_set_of_rows": set(rows) == set(expected) and len(rows) == len(expected),
        "same_bytes": all(
            (spread / p["file"]).read_bytes() == (alone / p["file"]).read_bytes() for p in whole["parts"]
        ),
        "events": events,
        "seconds": seconds,
        "memory_mib": watch.result(),
    }


def _wait(holds: Any, seconds: float = 1200) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise TimeoutError("the run does not come on")
        time.sleep(0.05)


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Images a second of the command's whole time, and of what is left without its start, in alternated rounds."""
    found: dict[str, list[float]] = {"alone": [], "ray": []}
    start: dict[str, list[float]] = {"alone": [], "ray": []}
    first = Path(args.folder) / "first"
    first.mkdir()
    names = sorted(path for path in Path(args.images).rglob("*") if path.suffix in (".png", ".jpg"))
    (first / "list.txt").write_text(str(names[0]) + "\n")
    ways = {"alone": ["--threads", "2"], "ray": ["--threads", "1", "--ray", "local", "--ray-workers", "2"]}
    for number in range(args.rounds):
        for way, options in ways.items():
            for images, into in ((f"@{first}/list.txt", start), (args.images, found)):
                output = Path(args.folder) / f"{way}-{number}-{'one' if into is start else 'all'}"
                command = [LEANVIT, "predict", args.bundle, images, "--output", f"{output}/", "--part-images",
                           str(args.part_images), *options]  # fmt: skip
                begun = time.monotonic()
                subprocess.run(command, check=False, stderr=subprocess.DEVNULL)
                into[way].append(time.monotonic() - begun)
            print(way, start[way][-1], found[way][-1], flush=True)
    images = len(names)
    rates = {way: [images / (a - b) for a, b in zip(found[way], start[way], strict=True)] for way in ways}
    return {
        "case": "speed",
        "images": images,
        "rounds": args.rounds,
        "seconds": found,
        "start_seconds": {way: statistics.median(values) for way, values in start.items()},
        "images_per_second": {way: statistics.median(values) for way, values in rates.items()},
        "ratio": statistics.median(r / a for r, a in zip(rates["ray"], rates["alone"], strict=True)),
    }


def main() -> None:
    """Run what was asked for and add it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("images", help="folder of images")
    parser.add_argument("--lose", action="store_true")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--part-images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = read_json(RESULTS)["rows"] if RESULTS.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = folder
        for case in [case for case, asked in ((lose, args.lose), (speed, args.speed)) if asked]:
            row = {
                **case(args),
                "bundle": Path(args.bundle).name,
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            row["machine"] = machine()
            rows = [other for other in rows if other["case"] != row["case"]] + [row]
            print(json.dumps(row, indent=2), flush=True)
            write_json(RESULTS, {"version": 1, "rows": rows})


if __name__ == "__main__":
    main()
