"""Accuracy against milliseconds as tokens are merged: float and W8A8 files, in both runtimes.

    python benchmarks/merge.py                                  micro models: top-1 of test images and time
    python benchmarks/merge.py --models vit_small_patch16_224   time alone: random weights

Each network is loaded with --keep-tokens 1.0 to 0.4, exported in float and as W8A8 (mode paper, 32 images), and its
files are timed in turns at batch 1 and 8, all of a network in one run. `ratio` is the time of the file with all tokens,
of the same profile and runtime, over this one's. Test images: Fashion-MNIST's, counted by what the bundle answers in
each runtime. Rows are merged with those stored: benchmarks/results/merge.json.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leanvit import load
from leanvit.bench import Target, benchmark
from leanvit.checkpoint import build, preprocess_for, with_merged_tokens
from leanvit.config import ExportOptions, LoadOptions, MPTQConfig, Preprocess
from leanvit.config.commands import RuntimeChoice
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.export.api import export
from leanvit.export.onnx.lower import lower
from leanvit.files import write_json
from leanvit.progress import note
from leanvit.quant import quantize
from leanvit.quant.graph import trace
from leanvit.runtime.predictor import Predictor
from measure import SEED, facts, merged

RESULTS = Path(__file__).parent / "results" / "merge.json"
KEPT = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
MICRO = ("vit_micro", "deit_micro")
PROFILES: dict[RuntimeChoice, tuple[str, str]] = {"onnxruntime": ("fp32", "w8a8"), "openvino": ("fp32", "openvino")}
"""Of each runtime the float file and its own W8A8."""


def network(name: str, keep: float) -> tuple[torch.nn.Module, Preprocess]:
    """A micro model with its weights, any other with random ones."""
    if name in MICRO:
        model, info = load(f"{name}.fmnist", LoadOptions(keep_tokens=keep))
        return model, info.preprocess
    torch.manual_seed(SEED)
    model = build(name, 1000).eval()
    return with_merged_tokens(model, keep), preprocess_for(model)


def calibration(name: str, preprocess: Preprocess) -> torch.Tensor:
    """32 training images, or smooth noise where weights are random."""
    if name in MICRO:
        chosen = load_split("fashion-mnist", "train").subset(np.random.default_rng(SEED).permutation(60_000)[:32])
        return torch.cat([to_input(pixels, preprocess) for pixels, _ in Loader(chosen, preprocess, 32)])
    coarse = torch.randn(32, 3, 14, 14, generator=torch.Generator().manual_seed(SEED))
    return torch.nn.functional.interpolate(coarse, preprocess.input_size, mode="bicubic")


def write_files(name: str, keep: float, folder: Path) -> dict[str, Path]:
    """Of each profile a bundle; of a network with random weights, of which no gate can tell much, the model file."""
    model, preprocess = network(name, keep)
    images = calibration(name, preprocess)
    quantized = quantize(model, images, MPTQConfig(seed=SEED))
    found = {}
    for profile in ("fp32", "w8a8", "openvino"):
        path = folder / f"{profile}-{round(100 * keep)}"
        if name in MICRO:
            options = ExportOptions(profile=profile, min_speedup=0)
            labels = [str(number) for number in range(10)]
            subject = model if profile == "fp32" else quantized
            found[profile] = export(subject, path, options, preprocess=preprocess, labels=labels)
        else:
            graph = trace(model, images[:2]) if profile == "fp32" else quantized.graph
            found[profile] = path.with_suffix(".onnx")
            found[profile].write_bytes(lower(graph, preprocess, profile).SerializeToString())
    return found


def correct(bundle: Path, runtime: RuntimeChoice, test: ImageSet) -> int:
    """Test images that a bundle gets right in a runtime."""
    predictor = Predictor(bundle, runtime=runtime)
    batches = Loader(test, predictor.manifest.preprocess, 250)
    return sum(int((predictor.logits(x.numpy()).argmax(1) == y.numpy()).sum()) for x, y in batches)


def measure(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one network."""
    test = load_split("fashion-mnist", "val").subset(np.arange(args.images)) if name in MICRO else None
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        written = {}
        for keep in args.keep:
            note(f"{name}: {keep:g} of the tokens")
            written[keep] = write_files(name, keep, Path(scratch))
        for runtime, profiles in PROFILES.items():
            for profile in profiles:
                targets = [Target(f"{keep:g}", files[profile], runtime, profile, 0) for keep, files in written.items()]
                timed = benchmark(targets, batch_sizes=(1, 8), threads=args.threads, rounds=args.rounds)
                counts = {keep: correct(files[profile], runtime, test) if test else None
                          for keep, files in written.items()}  # fmt: skip
                for result in timed["results"]:
                    keep = float(result["name"])
                    rows.append(
                        {
                            **facts(),
                            "model": name,
                            "keep": keep,
                            "runtime": runtime,
                            "profile": profile,
                            "batch_size": result["batch_size"],
                            "milliseconds": result["median_ms"],
                            "ratio": result["ratio"],
                            "threads": timed["threads"],
                            "correct": counts[keep],
                            "images": len(test) if test else None,
                        }
                    )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each network, runtime, profile and share."""
    lines = [
        "| Model | Runtime | Profile | Tokens | Right | ms, batch 1 | times | ms, batch 8 | times |",
        "|---" * 9 + "|",
    ]
    firsts = [row for row in rows if row["batch_size"] == 1]
    for row in firsts:
        key = ("model", "runtime", "profile", "keep")
        other = next(r for r in rows if r["batch_size"] == 8 and all(r[k] == row[k] for k in key))
        right = f"{row['correct']} of {row['images']}" if row["images"] else ""
        lines.append(
            f"| {row['model']} | {row['runtime']} | {row['profile']} | {row['keep']:g} | {right} | "
            f"{row['milliseconds']:.2f} | {row['ratio']:.2f} | {other['milliseconds']:.2f} | {other['ratio']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MICRO), metavar="MODEL", help="micro models or timm's names"
    )
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEPT), help="shares of the tokens, 1.0 first")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0, help="of a runtime; 0: all cores")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.models:
        rows = merged(args.output, measure(name, args), ("model", "keep", "runtime", "profile", "batch_size"))
        write_json(args.output, {"version": 1, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
