"""Speed and memory of the families beside timm's nearest models, alternated in one process.

    python benchmarks/models.py                       (about 15 minutes on 2 cores)
    python benchmarks/models.py --pairs reswin --batch-sizes 8 --rounds 5

For each pair: inference and one training step (AdamW, float32) at each batch size. `ratio` is our median over
the peer's, below 1 is faster; `fuse_gain` is the plain definition's median over that after fuse(). Memory is
what a process of its own adds to its peak over the loaded model. Results: benchmarks/results/models.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch

from leanvit.bench import machine
from leanvit.export.bundle import versions
from leanvit.files import write_json
from leanvit.models import fuse
from leanvit.progress import note

RESULTS = Path(__file__).parent / "results" / "models.json"
# name: (ours, peer, input side)
PAIRS = {
    "revit": ("revit_base_patch16_224", "vit_base_patch16_224", 224),
    "remvit": ("remvitv2_tiny", "mvitv2_tiny", 224),
    "reswin": ("reswin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224", 224),
    "exmobilevit": ("exmobilevit_928", "mobilevit_s", 256),
    "vitae": ("vitaev2_small", "swin_tiny_patch4_window7_224", 224),
}


def build(name: str, *, fused_attention: bool = True) -> torch.nn.Module:
    """A model with random weights, attention fused or written out."""
    timm.layers.set_fused_attn(fused_attention)
    torch.manual_seed(0)
    model = timm.create_model(name)
    timm.layers.set_fused_attn(True)
    return model


def inference(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """One forward pass in eval mode."""
    model.eval()

    def run() -> Any:
        with torch.inference_mode():
            return model(x)

    return run


def training(model: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    """One step of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(x).square().mean().backward()
        optimizer.step()

    return run


def alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, taken in turns after one warm-up."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def peak_megabytes(name: str, side: int, batch: int, train: bool) -> float:
    """Memory that one run adds to the peak of a process that holds the model."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak, (name, side, batch, train))


def _peak(name: str, side: int, batch: int, train: bool) -> float:
    import leanvit.models  # noqa: F401 - registers our architectures

    run = (training if train else inference)(build(name), torch.randn(batch, 3, side, side))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def compare(pair: str, batch: int, rounds: int) -> dict[str, Any]:
    """All numbers of one pair at one batch size."""
    ours, peer, side = PAIRS[pair]
    x = torch.randn(batch, 3, side, side)
    runs = {
        "ours": inference(build(ours), x),
        "ours_fused": inference(fuse(build(ours)), x),
        "peer": inference(build(peer), x),
        "peer_unfused_attention": inference(build(peer, fused_attention=False), x),
    }
    seconds = alternate(runs, rounds)
    steps = alternate({"ours": training(build(ours), x), "peer": training(build(peer), x)}, max(3, rounds // 3))
    return {
        "ours": ours,
        "peer": peer,
        "batch_size": batch,
        "side": side,
        "inference_seconds": seconds,
        "training_seconds": steps,
        "ratio": seconds["ours"] / seconds["peer"],
        "ratio_fused": seconds["ours_fused"] / seconds["peer"],
        "ratio_to_unfused_attention": seconds["ours_fused"] / seconds["peer_unfused_attention"],
        "fuse_gain": seconds["ours"] / seconds["ours_fused"],
        "training_ratio": steps["ours"] / steps["peer"],
        "inference_megabytes": {n: peak_megabytes(n, side, batch, False) for n in (ours, peer)},
        "training_megabytes": {n: peak_megabytes(n, side, batch, True) for n in (ours, peer)},
    }


def main() -> None:
    """Compare every pair and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results = []
    for pair in options.pairs:
        for batch in options.batch_sizes:
            row = compare(pair, batch, options.rounds)
            results.append(row)
            note(
                f"{row['ours']} / {row['peer']} batch {batch}: inference {row['ratio']:.2f}, fused "
                f"{row['ratio_fused']:.2f}, to unfused attention {row['ratio_to_unfused_attention']:.2f}, "
                f"fuse gain {row['fuse_gain']:.2f}, training {row['training_ratio']:.2f}"
            )
    facts = {"machine": machine(), "versions": versions(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(options.output, {**facts, "rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
