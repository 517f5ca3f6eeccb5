"""What calibration costs on networks of real size: 32 images (modes best and learned at W4A4: 128), two threads.

    python benchmarks/ptq_cost.py --output benchmarks/results/ptq_cost.json

Weights are random (seed 0) and images smooth noise: cost depends on shapes, not on answers. Every case runs in a
process of its own, so that the peak of its memory (VmHWM) is its own. `cpu_seconds` is of both threads: up to twice
`seconds` on a machine that has nothing else to do. A case names its network, at that network's own size, or a
detector (Mask R-CNN of leanvit's) and its side in pixels. With --profile it runs under cProfile and the functions that
took most time are printed.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import leanvit.models  # noqa: F401 - registers its architectures, which --model may name
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import IMAGENET_MEAN, IMAGENET_STD, Budget, MPTQConfig, Preprocess
from leanvit.files import write_json
from leanvit.quant import quantize
from leanvit.quant.parts import quantize_network
from leanvit.tasks.build import build_network
from measure import SEED, facts, merged, run_with_peak


@dataclass(frozen=True)
class Case:
    """A network, how it is quantized, and the most seconds and gibibytes that it should take.

    side: of a detector's pictures in pixels, of backbone `model`; None: a classifier at its own size. images: how many
    calibrate.
    """

    model: str
    config: MPTQConfig
    seconds: float
    gibibytes: float = 4.0
    side: int | None = None
    images: int = 32


VIT_S = "vit_small_patch16_224"
CASES = {
    "paper W4A4": Case(VIT_S, MPTQConfig(weight_bits=4, activation_bits=4), 90),
    "best W4A4": Case(VIT_S, MPTQConfig(weight_bits=4, activation_bits=4, mode="best"), 300, 5.0, images=128),
    "learned W4A4": Case(VIT_S, MPTQConfig(weight_bits=4, activation_bits=4, mode="learned"), 1200, 5.0, images=128),
    "Greedy MP 5": Case(VIT_S, MPTQConfig(budget=Budget(average_bits=5.0)), 720),
    "W8A8 ViT-B": Case("vit_base_patch16_224", MPTQConfig(), 180),
    "W8A8 ViT-L": Case("vit_large_patch16_224", MPTQConfig(), 720, 12.0),
    "W8A8 Mask R-CNN 640": Case("vitaev2_micro", MPTQConfig(), 240, side=640),
}


def run_case(name: str, images: int, threads: int, profile: bool) -> dict[str, Any]:
    """Quantize once, in this process. images: in place of the case's own; 0: these."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    case = CASES[name]
    images = images or case.images
    quantize_it = detector(case) if case.side else classifier(case)
    side = case.side or 224
    coarse = torch.randn(images, 3, side // 16, side // 16)
    pixels = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=False)
    call = profiled if profile else timed
    (report, seconds, cpu_seconds), added, peak = run_with_peak(lambda: call(lambda: quantize_it(pixels)))
    search = report.get("search") or {}
    return {
        "case": name,
        "model": case.model,
        "images": images,
        "walked": report.get("calibration", {}).get("walked"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_megabytes": peak,
        "added_megabytes": added,
        "evaluations": search.get("evaluations"),
        "kl": report.get("calibration", {}).get("kl_divergence"),
        **facts(),
    }


def classifier(case: Case) -> Callable[[Tensor], dict[str, Any]]:
    """A function that quantizes a classifier on images (N, 3, H, W) and returns the report."""
    model = timm.create_model(case.model).eval()
    return lambda x: quantize(model, x, case.config).report


def detector(case: Case) -> Callable[[Tensor], dict[str, Any]]:
    """The same of a Mask R-CNN with three classes."""
    preprocess = Preprocess((case.side or 0, case.side or 0), IMAGENET_MEAN, IMAGENET_STD)
    info = CheckpointInfo(case.model, ("a", "b", "c"), preprocess, task="segment")
    network = build_network(info).eval()
    return lambda x: quantize_network(network, info, x, case.config).report


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What run() returns, and its seconds by the clock and of all threads."""
    started, cpu_started = time.monotonic(), time.process_time()
    result = run()
    return result, time.monotonic() - started, time.process_time() - cpu_started


def profiled(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """The same under cProfile; prints the functions that took most time."""
    profiler = cProfile.Profile()
    found = timed(lambda: profiler.runcall(run))
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(15)
    pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumtime").print_stats("leanvit", 25)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the measured cases against their aims."""
    lines = ["| Case | Seconds | Aim | Peak memory, GiB | Aim |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['seconds']:.0f} | {CASES[row['case']].seconds:.0f} | "
        f"{row['peak_megabytes'] / 1024:.2f} | {CASES[row['case']].gibibytes:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the cases one after another and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--images", type=int, default=0, help="instead of each case's own number")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a case may take")
    parser.add_argument("--profile", action="store_true", help="print where the time went (slows the case down)")
    parser.add_argument("--output", type=Path, help="JSON file of the rows, written after every case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_case(args.child, args.images, args.threads, args.profile)))
        return
    rows = []
    for case in args.cases:
        command = [sys.executable, __file__, "--child", case, "--images", str(args.images)]
        command += ["--threads", str(args.threads), *(["--profile"] if args.profile else [])]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=args.timeout, check=True)
        except subprocess.TimeoutExpired:
            print(f"{case}: stopped after {args.timeout:g} s", file=sys.stderr)
            continue
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(json.dumps(rows[-1]), file=sys.stderr)
        if args.output:
            write_json(args.output, {"results": merged(args.output, rows[-1:], ("case", "model"))})
    print(table(rows))


if __name__ == "__main__":
    main()
