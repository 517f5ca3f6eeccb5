"""How long a million and a billion images take on 1 to 1,000 workers: measured here, and simulated from that.

    python benchmarks/scale_plan.py BUNDLE IMAGES      (about 3 minutes; results in benchmarks/results/scale_plan.json)

Measured: images a second of one worker of one core, its memory, names a second that the driver lists, parts a second
that it writes. Simulated, by seed: every worker takes the next part when it is free. The time of a part is the
measured one, times a machine's own speed (normal, 5%), times chance (normal, 3%); one machine in fifty is a straggler
of half the speed; every worker is lost once in a day on average (exponential), which costs the part that it is at and
a minute until another one is there. The driver takes the time that was measured for each part, one after the other.
"""

from __future__ import annotations

import argparse
import heapq
import resource
import tempfile
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from leanvit.bench import machine
from leanvit.config import PredictConfig
from leanvit.files import write_json
from leanvit.image_paths import find_images
from leanvit.runtime.parts import Job, alone
from leanvit.runtime.places import Folder
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.sources import Piece

RESULTS = Path(__file__).parent / "results" / "scale_plan.json"
PART_IMAGES = 1024
WORKERS = (1, 2, 4, 10, 30, 100, 300, 1000)
DAY = 86_400.0
WRITES = 200
LISTED = 50_000


@dataclass(frozen=True)
class Model:
    """What the simulation goes by, in seconds. part: of one part in one worker. write: of one part in the driver."""

    part: float
    write: float
    listing: float = 0.0
    machines: float = 0.05
    chance: float = 0.03
    stragglers: float = 0.02
    slowness: float = 2.0
    between_losses: float = DAY
    replacement: float = 60.0
    seed: int = 0


def simulate(model: Model, workers: int, images: int) -> dict[str, Any]:
    """One run: its time, what of it the workers were at work, and how many parts were done again."""
    rng = np.random.default_rng(model.seed)
    parts = -(-images // PART_IMAGES)
    speed = np.clip(rng.normal(1.0, model.machines, workers), 0.5, None)
    speed[rng.random(workers) < model.stragglers] *= model.slowness
    lost_at = rng.exponential(model.between_losses, workers)
    free = [(0.0, worker) for worker in range(workers)]
    heapq.heapify(free)
    driver = busy = 0.0
    given = again = 0
    while given < parts:
        now, worker = heapq.heappop(free)
        # A part can't be begun before its names are listed.
        now = max(now, given * PART_IMAGES * model.listing)
        seconds = model.part * speed[worker] * max(0.5, rng.normal(1.0, model.chance))
        if now + seconds > lost_at[worker]:
            again += 1
            back = max(now, lost_at[worker]) + model.replacement
            lost_at[worker] = back + rng.exponential(model.between_losses)
            heapq.heappush(free, (back, worker))
            continue
        driver = max(driver, now + seconds) + model.write
        busy += seconds
        given += 1
        heapq.heappush(free, (now + seconds, worker))
    return {
        "workers": workers,
        "images": images,
        "seconds": driver,
        "images_per_second": images / driver,
        "efficiency": busy / (driver * workers),
        "parts_again": again,
    }


def measure(bundle: str, images: str) -> dict[str, float]:
    """What one worker of one core and the driver do here."""
    predictor = Predictor(bundle, threads=1)
    paths = tuple(str(path) for path in find_images([images]))[: 4 * PART_IMAGES]
    config = PredictConfig(bundle=bundle, images=[images], threads=1, format="jsonl", batch_size=32)
    pieces = [Piece(paths[i : i + PART_IMAGES]) for i in range(0, len(paths), PART_IMAGES)]
    seconds, part = [], None
    for number, piece in enumerate(pieces):
        started = time.monotonic()
        *_, part = next(iter(alone(predictor)(Job(config, None, None), iter([(number, piece)]))))
        seconds.append((time.monotonic() - started) / len(piece.paths))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if part is None:
        raise SystemExit(f"{images}: no images")
    with tempfile.TemporaryDirectory() as name:
        folder = Folder(name)
        started = time.monotonic()
        for number in range(WRITES):
            folder.write(f"part-{number:06d}.jsonl", part.data)
        write = (time.monotonic() - started) / WRITES
        for number in range(LISTED):
            Path(name, f"{number:07d}.jpg").touch()
        started = time.monotonic()
        listed = sum(1 for _ in find_images([name]))
        listing = (time.monotonic() - started) / listed
    sizes = [Path(path).stat().st_size for path in paths]
    return {
        "images_per_second_and_core": 1 / float(np.median(seconds)),
        "worker_mib": memory,
        "part_bytes": len(part.data),
        "image_bytes": float(np.mean(sizes)),
        "seconds_a_part_written": write,
        "seconds_a_name_listed": listing,
    }


def main() -> None:
    """Measure, simulate, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("images", help="folder of images, 4,096 of which are taken")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    measured = measure(args.bundle, args.images)
    print(measured, flush=True)
    model = Model(
        PART_IMAGES / measured["images_per_second_and_core"],
        measured["seconds_a_part_written"],
        measured["seconds_a_name_listed"],
        seed=args.seed,
    )
    # What a ViT-S at 224 px has on such a core: docs/measured/files.md; an image of 100 kB takes 5 ms to decode.
    slow = replace(model, part=PART_IMAGES / 20.0)
    rows = []
    for name, own in (("as measured", model), ("20 images/s a core", slow)):
        for count in (10**6, 10**9):
            for workers in WORKERS:
                rows.append({"model": name, **simulate(own, workers, count)})
                print(rows[-1], flush=True)
    found = {"version": 1, "bundle": Path(args.bundle).name, "seed": args.seed, "measured": measured, "rows": rows,
             "machine": machine(), "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    write_json(RESULTS, found)


if __name__ == "__main__":
    main()
