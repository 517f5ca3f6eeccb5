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
import os
import platform
import pstats
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "paper W4A4": {"weight_bits": 4, "activation_bits": 4},
    "best W4A4": {"weight_bits": 4, "activation_bits": 4, "mode": "best"},
    "Greedy MP 5": {"average_bits": 5.0},
}
AIM_SECONDS = {"paper W4A4": 90, "best W4A4": 360, "Greedy MP 5": 720}
AIM_BYTES = 4 << 30


def peak_bytes() -> int:
    """The most memory that this process has held (VmHWM)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    return 0


def run_case(case: str, model_name: str, images: int, threads: int, profile: bool) -> dict[str, Any]:
    """Quantize once, in this process."""
    import timm
    import torch

    import leanvit.models  # noqa: F401
    from leanvit.config import Budget, MPTQConfig
    from leanvit.quant import quantize

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = timm.create_model(model_name).eval()
    coarse = torch.randn(images, 3, 14, 14)
    pixels = torch.nn.functional.interpolate(coarse, size=(224, 224), mode="bicubic", align_corners=False)
    keys = dict(CASES[case])
    average = keys.pop("average_bits", None)
    config = MPTQConfig(**keys, budget=Budget(average_bits=average) if average else None)
    loaded = peak_bytes()
    profiler = cProfile.Profile()
    started, cpu_started = time.monotonic(), time.process_time()
    if profile:
        quantized = profiler.runcall(quantize, model, pixels, config)
    else:
        quantized = quantize(model, pixels, config)
    seconds = time.monotonic() - started
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(15)
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("cumtime").print_stats("leanvit", 25)
    search = quantized.report["search"] or {}
    return {
        "case": case,
        "model": model_name,
        "images": images,
        "walked": quantized.report["calibration"]["walked"],
        "threads": threads,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu_started, 1),
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": loaded,
        "evaluations": search.get("evaluations"),
        "kl": quantized.report["calibration"]["kl_divergence"],
        "load_before": round(os.getloadavg()[0], 1),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown of the measured cases against their aims."""
    lines = ["| Case | Seconds | Aim | Peak memory, GiB | Aim |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['case']} | {row['seconds']:.0f} | {AIM_SECONDS[row['case']]} | {row['peak_bytes'] / 2**30:.2f} | "
        f"{AIM_BYTES >> 30} |"
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
            merge(args.output, rows)
    print(table(rows))


def merge(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows into a JSON file; cases measured before and not now stay."""
    kept = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    measured = {row["case"] for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    values = [row for row in kept if row["case"] not in measured] + rows
    path.write_text(json.dumps({"version": 1, "rows": values}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
