"""What quantization gives in the runtimes: ours beside onnxruntime.quantization and NNCF, in one alternated run.

    python benchmarks/deploy.py                                   speed of five models (about 40 minutes on 2 cores)
    python benchmarks/deploy.py --models vit_small_patch16_224    one of them
    python benchmarks/deploy.py --accuracy                        micro models on Fashion-MNIST in both runtimes
    python benchmarks/deploy.py --table                           the tables of all that is stored

Speed: weights are random (seed 0), images smooth noise, 32 to calibrate and 16 others for SQNR against float logits:
times depend on shapes, and SQNR on how rounding adds up, not on training. Ours after fuse(), mode paper. Every target
has a process of its own without torch, and they take turns. `ratio` is ONNX Runtime fp32 over this. Files with
`opset21` have attention as products, as torch.onnx writes it; the peers quantize such a file.
Accuracy: 10,000 real test images, executed, beside float; agreement and SQNR are against the simulation.
Results are merged with those stored in benchmarks/results/deploy.json.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import leanvit.models
from leanvit import export
from leanvit.bench import Target, benchmark, describe
from leanvit.checkpoint import preprocess_for
from leanvit.config import MPTQConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.errors import BundleError
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.onnx.lower import lower
from leanvit.files import read_json, write_json
from leanvit.progress import note
from leanvit.quant import quantize
from leanvit.quant.graph import trace
from leanvit.runtime.bundle import read_manifest, sqnr_db
from leanvit.runtime.engines import open_engine, openvino_core, without_openvino_telemetry
from measure import SEED, facts, merged

RESULTS = Path(__file__).parent / "results" / "deploy.json"
MODELS = (
    "vit_small_patch16_224",
    "swin_tiny_patch4_window7_224",
    "revit_small_patch16_224",
    "exmobilevit_928",
    "vitaev2_small",
)
OURS: dict[str, dict[str, Any]] = {"w8a8": {}, "w4a8": {"weight_bits": 4}}
LOWERED: dict[str, tuple[str, Any, Any]] = {
    "w8a8": ("w8a8", "w8a8", 23),
    "w8a8-opset21": ("w8a8", "w8a8", 21),
    "w4a8": ("w4a8", "w4a8", 23),
    "openvino-w8a8": ("w8a8", "openvino", 23),
    "exact-w8a8": ("w8a8", "exact", 23),
}
"""By case: which of OURS it is, the profile and the opset of its file."""

BOTH = ("onnxruntime", "openvino", "openvino-bf16")
PRODUCTS = "fp32-opset21"
CASES: dict[str, tuple[str, ...]] = {
    "fp32": BOTH,
    PRODUCTS: BOTH,
    "w8a8": BOTH,
    "w8a8-opset21": BOTH,
    "w4a8": BOTH,
    "openvino-w8a8": BOTH,
    "exact-w8a8": BOTH,
    "ort-static": ("onnxruntime",),
    "ort-static-matmul": ("onnxruntime",),
    "ort-dynamic": ("onnxruntime",),
    "nncf": ("openvino", "openvino-bf16"),
}
CALIBRATION, HELD_OUT = 32, 16
SAME_DB = 150.0


def build(name: str) -> nn.Module:
    """A model with random weights, ours in its inference form."""
    torch.manual_seed(SEED)
    model = timm.create_model(name).eval()
    return leanvit.models.fuse(model) if model.__module__.startswith("leanvit") else model


def write_files(name: str, folder: Path, cases: list[str]) -> tuple[dict[str, Path], np.ndarray[Any, Any]]:
    """The model file of every case, and the held-out pixels."""
    model = build(name)
    preprocess = preprocess_for(model)
    pixels = np.stack(synthetic_images(CALIBRATION + HELD_OUT, preprocess.input_size))
    calibration, held_out = pixels[:CALIBRATION], pixels[CALIBRATION:]
    images = to_input(torch.from_numpy(calibration), preprocess)
    graph, opsets = trace(model, images[:2]), {"fp32": 23, PRODUCTS: 21}
    written = {case: folder / f"{case}.onnx" for case in opsets}
    for case, opset in opsets.items():
        written[case].write_bytes(lower(graph, preprocess, "fp32", opset=opset).SerializeToString())
    ours = {LOWERED[case][0] for case in cases if case in LOWERED}
    quantized = {kind: quantize(model, images, MPTQConfig(**OURS[kind])).graph for kind in sorted(ours)}
    for case in (case for case in cases if case not in written):
        note(f"{name}: writing {case}")
        if case in LOWERED:
            kind, profile, opset = LOWERED[case]
            written[case] = folder / f"{case}.onnx"
            proto = lower(quantized[kind], preprocess, profile, opset=opset)
            written[case].write_bytes(proto.SerializeToString())
        else:
            written[case] = _write_peer(case, calibration, written[PRODUCTS])
    return {case: written[case] for case in dict.fromkeys(["fp32", *cases])}, held_out


def _write_peer(case: str, pixels: Any, fp32: Path) -> Path:
    target = fp32.with_name(f"{case}.onnx")
    if case == "nncf":
        target = target.with_suffix(".xml")
        _nncf(fp32, target, pixels)
    else:
        _onnxruntime_quantization(case, fp32, target, pixels)
    return target


def _onnxruntime_quantization(case: str, fp32: Path, target: Path, pixels: Any) -> None:
    from onnxruntime import quantization as ort

    if case == "ort-dynamic":
        ort.quantize_dynamic(fp32, target)
        return
    prepared = fp32.with_name("prepared.onnx")
    ort.shape_inference.quant_pre_process(fp32, prepared, skip_symbolic_shape=True)

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        rows: Iterator[Any] = iter(pixels)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self.rows, None)
            return None if row is None else {"images": row[None]}

    products = {"op_types_to_quantize": ["MatMul", "Gemm"]} if case == "ort-static-matmul" else {}
    ort.quantize_static(prepared, target, Reader(), per_channel=True, **products)


def _nncf(fp32: Path, target: Path, pixels: Any) -> None:
    model = openvino_core().read_model(str(fp32))
    with without_openvino_telemetry():
        import nncf
        import openvino

        dataset = nncf.Dataset([pixel[None] for pixel in pixels])
        quantized = nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(pixels))
        openvino.save_model(quantized, str(target), compress_to_fp16=False)


def speed(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one model: every case in its runtimes at every batch size."""
    with tempfile.TemporaryDirectory(prefix="leanvit-deploy-") as folder:
        files, held_out = write_files(name, Path(folder), args.cases)
        truth = open_engine(files["fp32"], "onnxruntime", args.threads)(held_out)
        targets: list[Target] = []
        ratios: dict[str, float] = {}
        for case, path in files.items():
            for runtime in CASES[case]:
                target = describe(path, runtime)
                try:
                    logits = open_engine(path, runtime, args.threads)(held_out)  # type: ignore[arg-type]
                except BundleError as error:
                    if case in OURS or case == "fp32":
                        raise
                    note(f"{name}: a peer's file has no row, {error}")
                    continue
                targets.append(target)
                ratios[target.name] = sqnr_db(truth, logits)
        batches = tuple(args.batch_sizes)
        found = benchmark(targets, batch_sizes=batches, threads=args.threads, rounds=args.rounds)
    rows = found["results"]
    for row in rows:
        row |= {"model": name, "sqnr_db": ratios[row["name"]], "facts": facts()}
        del row["path"]
    return rows


def accuracy(name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one micro model: float, w8a8 and w4a8 as bundles, executed on all test images."""
    model = timm.create_model(name, pretrained=True).eval()
    preprocess = preprocess_for(model)
    train, test = load_split("fashion-mnist", "train"), load_split("fashion-mnist", "val")
    test = test.subset(np.arange(min(args.images, len(test))))
    rows = []
    for seed in args.seeds:
        chosen = np.random.default_rng(seed).permutation(len(train))[:128]
        (pixels,) = [batch for batch, _ in Loader(train.subset(chosen), preprocess, 128)]
        for case in ("fp32", *OURS):
            if case == "fp32" and seed != args.seeds[0]:
                continue
            quantized = None if case == "fp32" else quantize(
                model, to_input(pixels, preprocess), MPTQConfig(**OURS[case], seed=seed)
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as folder:
                bundle = export(quantized or model, Path(folder) / case, images=test)
                rows.append(_accuracy_row(name, case, seed, bundle))
                note(f"{rows[-1]}")
    return rows


def _accuracy_row(name: str, case: str, seed: int, bundle: Path) -> dict[str, Any]:
    manifest = read_manifest(bundle)
    found = {check["name"]: check["found"] for check in read_json(bundle / "verify.json")["checks"]}
    wanted = ("accuracy in", "agreement", "logits")
    return {
        "model": name,
        "name": case,
        "seed": seed,
        "correct": manifest.accuracy["correct"] if manifest.accuracy else None,
        "images": manifest.accuracy["images"] if manifest.accuracy else None,
        "bytes": (bundle / "model.onnx").stat().st_size,
        "runtimes": list(manifest.runtimes),
        "checks": {key: value for key, value in found.items() if key.startswith(wanted)},
        "facts": facts(),
    }


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each model and file, its batch sizes side by side."""
    timed = [row for row in rows if "ratio" in row]
    sizes = sorted({row["batch_size"] for row in timed})
    lines = [
        f"| model | file, runtime |{''.join(f' batch {n}, ms | ratio |' for n in sizes)} SQNR, dB | MB | peak MiB |",
        f"|---|---|{'---:|' * (2 * len(sizes) + 3)}",
    ]
    for model, name in dict.fromkeys((row["model"], row["name"]) for row in timed):
        found = {row["batch_size"]: row for row in timed if (row["model"], row["name"]) == (model, name)}
        times = [f"{found[n]['median_ms']:.1f} | {found[n]['ratio']:.2f}" if n in found else " | " for n in sizes]
        last = found[max(found)]
        lines.append(
            f"| {model} | {name} | {' | '.join(times)} | {_decibel(last['sqnr_db'])} | {last['bytes'] / 1e6:.1f} | "
            f"{last['peak_megabytes']:.0f} |"
        )
    return "\n".join(lines)


def _decibel(ratio: float) -> str:
    return "" if ratio >= SAME_DB else f"{ratio:.1f}"


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each micro model, means over the seeds; agreement is the least of all seeds and runtimes."""
    measured = [row for row in rows if "checks" in row]
    lines = [
        "| model | seeds | float | w8a8 | of fp32's bytes | agreement | w4a8 | of fp32's bytes | agreement |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for model in dict.fromkeys(row["model"] for row in measured):
        own = {case: [r for r in measured if (r["model"], r["name"]) == (model, case)] for case in ("fp32", *OURS)}
        if not all(own.values()):
            continue
        (reference, *_) = own["fp32"]
        cells = [f"{_top1(own['fp32']):.2f}"]
        for case in OURS:
            shares = [float(v.split("%")[0]) for r in own[case] for k, v in r["checks"].items() if "agreement" in k]
            size = mean(r["bytes"] for r in own[case]) / reference["bytes"]
            cells += [f"{_top1(own[case]):.2f}", f"{size:.3f}", f"{min(shares):.2f}"]
        lines.append(f"| {model} | {len(own['w8a8'])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _top1(rows: list[dict[str, Any]]) -> float:
    return 100 * mean(row["correct"] / row["images"] for row in rows)


def main() -> None:
    """Measure what was asked for, store it, print the table."""
    packed = sorted(p.name.split(".")[0] for p in Path(leanvit.models.__file__).parent.glob("weights/*.fmnist.*"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="default: five models; with --accuracy: all micro")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accuracy", action="store_true", help="micro models on real images instead of speed")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="measure nothing, print the tables of what is there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.table:
        stored = read_json(args.output)["results"]
        print(speed_table(stored), accuracy_table(stored), sep="\n\n")
        return
    torch.set_num_threads(args.threads)
    keys = ("model", "name", "batch_size", "seed")
    for name in args.models or (packed if args.accuracy else MODELS):
        rows = accuracy(name, args) if args.accuracy else speed(name, args)
        rows = [{"batch_size": None, "seed": SEED} | row for row in rows]
        write_json(args.output, {"version": 1, "results": merged(args.output, rows, keys)})
        print(accuracy_table(rows) if args.accuracy else speed_table(rows), flush=True)


if __name__ == "__main__":
    main()
