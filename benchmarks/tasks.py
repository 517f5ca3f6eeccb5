"""Detection, segmentation and pose on composed scenes: trained, quantized, exported, and run in ONNX Runtime.

    leanvit data compose runs/scenes --classes groups --train 6000 --val 500 --size 128 --seed 0 --scale 0.9 1.8 \\
        --rotation 15 --occlusion 0.4 --min-objects 4 --max-objects 8
    leanvit data compose runs/scenes_all --train 3000 --val 500 --size 128 --seed 0
    OMP_NUM_THREADS=1 python benchmarks/tasks.py                    all cases (about two hours on one core)
    OMP_NUM_THREADS=1 python benchmarks/tasks.py --cases pose       one of them
    OMP_NUM_THREADS=1 python benchmarks/tasks.py --speed-only       times, sizes and metrics of bundles that are there

A case is a recipe in configs/tasks. What is there already (a finished run, a bundle) is not made again. The metric of
every stage is measured on the 500 validation pictures: float, quantized in simulation, and the two bundles executed in
ONNX Runtime. Speed: both bundles in turns, batch 1 and 8, one thread and two; ratio is fp32 over w8a8. CPU time is that
of training and validation in all epochs. Results go to benchmarks/results/tasks.json.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanvit.annotations.load import load_scenes
from leanvit.bench import benchmark, describe
from leanvit.config import MPTQConfig, TrainConfig, from_dict, load_yaml
from leanvit.export.api import export
from leanvit.export.data import calibration_inputs
from leanvit.export.simulated import PROFILE_KEY, measured_form
from leanvit.files import read_json, write_json
from leanvit.progress import note
from leanvit.quant.parts import quantize_network, save_network
from leanvit.runtime.task import TASKS as SERVED
from leanvit.tasks.build import load_network
from leanvit.tasks.measure import measure_network
from leanvit.train import run
from measure import SEED, facts, merged

RECIPES = Path(__file__).parents[1] / "configs" / "tasks"
CASES = {
    "segment": "vitaev2_micro_segment_composed",
    "semantic": "vitaev2_micro_semantic_composed",
    "pose": "vitaev2_micro_pose_composed",
    "segment revit_micro": "revit_micro_segment_composed",
    "segment exmobilevit_micro": "exmobilevit_micro_segment_composed",
    "segment resnet18": "resnet18_segment_composed",
}
CALIBRATION = 128
ROUNDS = 40


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or go on with what was killed; the summary of the run."""
    summary = Path(config.output) / "train.json"
    if not summary.is_file() or len(read_json(summary)["history"]) < config.epochs:
        run(replace(config, resume=summary.is_file()))
    found: dict[str, Any] = read_json(summary)
    return found


def measure_case(name: str, *, quantized: bool) -> dict[str, Any]:
    """One row: what training reached, and what is left of it after quantization and export."""
    config = from_dict(TrainConfig, load_yaml(RECIPES / f"{CASES[name]}.yaml"), name)
    data = config.data
    summary = train(config)
    network, info = load_network(config.output)
    metric = SERVED[config.task].metric
    reached = [row for row in summary["history"] if "metric" in row]
    row: dict[str, Any] = {
        "case": name, "model": config.model, "task": config.task, "metric": metric, "seed": SEED,
        "parameters": summary["parameters"], "epochs": config.epochs, "cpu_seconds": summary["cpu_seconds"],
        "losses": [one["train_loss"] for one in summary["history"]], "metric_by_epoch": [r["metric"] for r in reached],
        "float": max(reached, key=lambda one: one["metric"])["metrics"],
    }  # fmt: skip
    if not quantized:
        return row
    val = load_scenes(data, "val", task=config.task)
    scenes = load_scenes(data, "train", task=config.task)
    x = calibration_inputs(info, scenes, CALIBRATION, SEED)
    note(f"{name}: quantizing")
    result = quantize_network(network, info, x, MPTQConfig(weight_bits=8, activation_bits=8))
    folder = Path(config.output)
    result.report |= {"task": info.task, "data": data, "metric": metric, "float_metrics": row["float"]}
    form, result.report[PROFILE_KEY] = measured_form(result)
    row["simulated"] = result.report["metrics"] = measure_network(form, info, val, 16)
    save_network(folder / "w8a8", result, info)
    for profile, model in (("fp32", network), ("w8a8", result)):
        export(model, folder / f"bundle_{profile}", info=info, images=val, float_metric=row["float"][metric])
    return row | read_bundles(name)


def read_bundles(name: str) -> dict[str, Any]:
    """What both bundles of a case say of themselves, and their times in turns, with one thread and with two."""
    folder = Path(from_dict(TrainConfig, load_yaml(RECIPES / f"{CASES[name]}.yaml"), name).output)
    bundles = {profile: folder / f"bundle_{profile}" for profile in ("fp32", "w8a8")}
    found: dict[str, Any] = {
        profile: {
            "metrics": read_json(bundle / "bundle.json")["accuracy"]["metrics"],
            "bytes": (bundle / "model.onnx").stat().st_size,
        }
        for profile, bundle in bundles.items()
    }
    targets = [describe(str(bundle), "onnxruntime") for bundle in bundles.values()]
    timed = {
        str(threads): benchmark(targets, batch_sizes=(1, 8), threads=threads, rounds=ROUNDS)["results"]
        for threads in (1, 2)
    }
    return {"case": name, "speed": timed} | found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| Case | Metric | Float | W8A8, executed | Points lost | Speed ratio, 1 thread | 2 threads | Size | CPU min |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        for metric in ("box_AP50", "mask_AP50") if row["task"] == "segment" else (row["metric"],):
            value, minutes = row["float"][metric], row["cpu_seconds"] / 60
            cells = [""] * 5
            if "w8a8" in row:
                after = row["w8a8"]["metrics"][metric]
                ratios = [[r["ratio"] for r in row["speed"][n] if "w8a8" in r["name"]] for n in ("1", "2")]
                size = row["w8a8"]["bytes"] / row["fp32"]["bytes"]
                speed = [", ".join(f"{ratio:.2f}" for ratio in of_threads) for of_threads in ratios]
                cells = [f"{after:.4f}", f"{100 * (value - after):+.2f}", *speed, f"{size:.2f}"]
            lines.append(f"| {row['case']} | {metric} | {value:.4f} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure the cases that were asked for, and print all that are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--speed-only", action="store_true", help="read and time bundles that are there again")
    parser.add_argument("--train-only", action="store_true", help="leave quantization and export out")
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "tasks.json"))
    options = parser.parse_args()
    output = Path(options.output)
    rows: list[dict[str, Any]] = read_json(output)["results"] if output.is_file() else []
    for name in options.cases:
        row = read_bundles(name) if options.speed_only else measure_case(name, quantized=not options.train_only)
        row |= {"facts": facts()}
        rows = merged(output, [row], ("case",))
        write_json(output, {"version": 1, "results": rows})
    print(table(rows))


if __name__ == "__main__":
    main()
