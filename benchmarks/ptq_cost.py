"""What calibration costs on a network of real size: ViT-S/16 at 224 x 224, 32 images, two threads.

    python benchmarks/ptq_cost.py --output benchmarks/results/ptq_cost.json

Weights are random (seed 0) and images smooth noise: cost depends on shapes, not on answers. Every case runs in a
process of its own, so that the peak of its memory (VmHWM) is its own. `cpu_seconds` is of both threads: up to twice
`seconds` on a machine that has nothing else to do. Aims: `paper` at W4A4 90 s, `best` at W4A4 6 minutes, Greedy MP to
5 bits on average 12 minutes, each within 4 GB. With --profile a case runs under cProfile and the functions that took
most time are printed.
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
from pathlib import Path
from typing import Any

import timm
import torch

import leanvit.models  # noqa: F401 - registers its architectures, which --model may name
from leanvit.config import Budget, MPTQConfig
from leanvit.files import write_json
from leanvit.quant import quantize
from measure import SEED, facts, merged, run_with_peak

CASES: dict[str, dict[str, Any]] = {
    "paper W4A4": {"weight_bits": 4, "activation_bits": 4},
    "best W4A4": {"weight_bits": 4, "activation_bits": 4, "mode": "best"},
    "Greedy MP 5": {"average_bits": 5.0},
}
AIM_SECONDS = {"paper W4A4": 90, "best W4A4": 360, "Greedy MP 5": 720}
AIM_MEGABYTES = 4 << 10


def run_case(case: str, model_name: str, images: int, threads: int, profile: bool) -> dict[str, Any]:
    """Quantize once, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(SEED)
    model = timm.create_model(model_name).eval()
    coarse = torch.randn(images, 3, 14, 14)
    pixels = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic", align_corners=False)
    keys = dict(CASES[case])
    average = keys.pop("average_bits", None)
    config = MPTQConfig(**keys, budget=Budget(average_bits=average) if average else None)
    call = profiled if profile else timed
    (quantized, seconds, cpu_seconds), added, peak = run_with_peak(
        lambda: call(lambda: quantize(model, pixels, config))
    )
    search = quantized.report["search"] or {}
    return {
        "case": case,
        "model": model_name,
        "images": images,
        "walked": quantized.report["calibration"]["walked"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_megabytes": peak,
        "added_megabytes": added,
        "evaluations": search.get("evaluations"),
        "kl": quantized.report["calibration"]["kl_divergence"],
        **facts(),
    }


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
        f"| {row['case']} | {row['seconds']:.0f} | {AIM_SECONDS[row['case']]} | {row['peak_megabytes'] / 1024:.2f} | "
        f"{AIM_MEGABYTES >> 10} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Run the cases one after another and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a case may take")
    parser.add_argument("--profile", action="store_true", help="print where the time went (slows the case down)")
    parser.add_argument("--output", type=Path, help="JSON file of the rows, written after every case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run_case(args.child, args.model, args.images, args.threads, args.profile)))
        return
    rows = []
    for case in args.cases:
        command = [sys.executable, __file__, "--child", case, "--model", args.model, "--images", str(args.images)]
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
