"""Greedy MP alone and with two processes of one thread on Ray, in turns: journal and plan byte for byte, and time.

    python benchmarks/ray_search.py      (20 to 40 minutes on 2 idle cores; to benchmarks/results/ray_search.json)

Alone is measured with one thread, whose journal the other has to write, and with all threads of the machine. `search`
is the time in the search itself, `whole` that from reading the images to the quantized network, with the start of Ray.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

from leanvit.bench import machine
from leanvit.checkpoint import preprocess_for
from leanvit.config import Budget, MPTQConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.files import write_json
from leanvit.models import micro
from leanvit.quant import greedy_mp, quantize
from leanvit.scale.cluster import connected
from leanvit.scale.search import RaySearch
from measure import SEED

RESULTS = Path(__file__).parent / "results" / "ray_search.json"
WAYS = ("one thread", "ray", "all threads")


def run(args: argparse.Namespace, count: int, way: str, folder: Path) -> dict[str, Any]:
    """One search: its times, and what it wrote. Processes start before images are read, as `leanvit quantize --ray`
    has it."""
    config = MPTQConfig(budget=Budget(average_bits=args.bits), mode=args.mode)
    torch.set_num_threads(args.threads if way == "all threads" else 1)
    journal, spent = folder / f"{way}.jsonl", [0.0]
    journal.unlink(missing_ok=True)
    original = greedy_mp.allocate

    def timed(*given: Any, **named: Any) -> Any:
        started = time.monotonic()
        found = original(*given, **named)
        spent[0] += time.monotonic() - started
        return found

    greedy_mp.allocate = timed
    started = time.monotonic()
    try:
        with _processes(args, way) as elsewhere:
            model, x = network_and_images(args.model, count)
            quantized = quantize(model, x, config, journal=journal, elsewhere=elsewhere)
    finally:
        greedy_mp.allocate = original
    plan = json.dumps(sorted(quantized.plan.items())).encode()
    return {
        "search": spent[0],
        "whole": time.monotonic() - started,
        "evaluations": quantized.report["search"]["evaluations"],
        "journal": hashlib.sha256(journal.read_bytes()).hexdigest(),
        "plan": hashlib.sha256(plan).hexdigest(),
    }


@contextlib.contextmanager
def _processes(args: argparse.Namespace, way: str) -> Iterator[RaySearch | None]:
    if way != "ray":
        yield None
        return
    with connected("local", cpus=args.workers) as ray:
        yield RaySearch(ray, args.workers)


def network_and_images(name: str, count: int) -> tuple[nn.Module, Tensor]:
    """A micro model with images of Fashion-MNIST; any other network with random weights and smooth noise."""
    if name not in micro.VARIANTS:
        torch.manual_seed(SEED)
        model = timm.create_model(name).eval()
        coarse = torch.randn(count, 3, 14, 14, generator=torch.Generator().manual_seed(SEED))
        return model, nn.functional.interpolate(coarse, preprocess_for(model).input_size, mode="bicubic")
    model = timm.create_model(f"{name}.fmnist", pretrained=True).eval()
    preprocess = preprocess_for(model)
    images = load_split("fashion-mnist", "train").subset(np.arange(count))
    return model, torch.cat([to_input(batch, preprocess) for batch, _ in Loader(images, preprocess, count)])


def main() -> None:
    """Alternate the ways, compare and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_micro")
    parser.add_argument("--mode", default="paper")
    parser.add_argument("--bits", type=float, default=4.0, help="average")
    parser.add_argument("--calibration", type=int, nargs="+", default=[128, 512], help="images")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, metavar="WAY", help=", ".join(WAYS))
    args = parser.parse_args()
    rows = [compare(args, count) for count in args.calibration]
    result = {
        "version": 2, "options": vars(args), "rows": rows,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(),
    }  # fmt: skip
    write_json(RESULTS, result)


def compare(args: argparse.Namespace, count: int) -> dict[str, Any]:
    """All ways in turns, with some calibration images."""
    rounds: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for way, found in rounds.items():
                found.append(run(args, count, way, Path(folder)))
                print(count, way, found[-1], flush=True)
    same = {key: len({row[key] for way in args.ways if way != "all threads" for row in rounds[way]}) == 1
            for key in ("journal", "plan")}  # fmt: skip

    def ratio(way: str, key: str) -> float:
        return statistics.median(one[key] / ray[key] for one, ray in zip(rounds[way], rounds["ray"], strict=True))

    ratios = {key: {way: ratio(way, key) for way in args.ways if way != "ray"} for key in ("search", "whole")}
    print(json.dumps({"images": count, "same": same, "times_faster_on_ray": ratios}, indent=2), flush=True)
    return {"images": count, "rounds": rounds, "same": same, "times_faster_on_ray": ratios}


if __name__ == "__main__":
    main()
