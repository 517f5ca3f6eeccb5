"""leanvit demo: real digits in; a trained, quantized, exported, verified, timed and drawn model out."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from leanvit import errors
from leanvit.analysis import received_attention
from leanvit.bench import benchmark, describe, machine
from leanvit.checkpoint import CheckpointInfo, load_checkpoint
from leanvit.commands import demo_speed
from leanvit.commands.measured import quantize_and_measure, save
from leanvit.config import DemoConfig, ExportOptions, MPTQConfig, QuantizeConfig, TrainConfig, command_line, save_yaml
from leanvit.data.loader import to_input
from leanvit.data.sets import load_split
from leanvit.errors import ModelError
from leanvit.export.api import export
from leanvit.files import only_writer, read_json, write_json
from leanvit.progress import note, print_table
from leanvit.report import write_report
from leanvit.runtime.bundle import MODEL_NAME, load_golden, versions
from leanvit.train import run as run_training

DATA = "digits"


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the whole path into `config.output`; prints the result table and returns what demo.json holds.

    Raises what the steps raise: nothing is caught, and what finished before stays in the folder.
    """
    started = time.monotonic()
    folder = Path(config.output)
    with only_writer(folder):
        save_yaml(config, folder / "config.yaml")
        checkpoint = _train(config, folder)
        model, info = load_checkpoint(checkpoint)
        _quantize(model, info, config, folder)
        _export(model, info, folder)
        _attention(model, info, folder)
        timings = _benchmark(checkpoint, folder)
        speed = _speed(config, folder)
        result = _summary(config, folder, timings, speed, time.monotonic() - started)
        report = write_report(folder)
    _print(result, folder, report)
    return result


def _train(config: DemoConfig, folder: Path) -> Path:
    note(f"1/7 train {config.model} on {DATA}")
    settings = TrainConfig(
        data=DATA,
        model=config.model,
        output=str(folder / "train"),
        pretrained="." in config.model,
        epochs=config.epochs,
        batch_size=32,
        lr=2e-3,
        warmup_epochs=1.0,
        seed=config.seed,
    )
    return run_training(settings).checkpoint


def _quantize(model: nn.Module, info: CheckpointInfo, config: DemoConfig, folder: Path) -> None:
    note("2/7 quantize with SQ-b: W8A8, and W4A4 in simulation")
    for bits in (8, 4):
        output = folder / f"quantize-w{bits}a{bits}"
        scheme = MPTQConfig(weight_bits=bits, activation_bits=bits)
        settings = QuantizeConfig(
            model=str(folder / "train"), data=DATA, weight_bits=bits, activation_bits=bits, output=str(output),
            seed=config.seed,
        )  # fmt: skip
        quantized = quantize_and_measure(model, info, settings, scheme)
        save_yaml(settings, output / "config.yaml")
        save(output, quantized, info)
        if bits == 8:
            _export_quantized(quantized, info, folder / "bundle", config.max_drop)


def _export_options(info: CheckpointInfo, float_top1: float) -> dict[str, Any]:
    return {
        "info": info,
        "images": load_split(DATA, "val", val_fraction=info.val_fraction, seed=info.seed),
        "float_metric": float_top1,
    }


def _export_quantized(quantized: Any, info: CheckpointInfo, output: Path, max_drop: float) -> None:
    note("3/7 export W8A8 to ONNX and verify it against the model")
    options = _export_options(info, quantized.report["float_accuracy"]["top1"])
    export(quantized, output, ExportOptions(profile="w8a8", max_drop=max_drop), **options)


def _export(model: nn.Module, info: CheckpointInfo, folder: Path) -> None:
    note("4/7 export float32 to ONNX, to compare with")
    export(model, folder / "bundle-fp32", **_export_options(info, info.metrics["top1"]))


def _attention(model: nn.Module, info: CheckpointInfo, folder: Path) -> None:
    """Attention maps of four digits through the depth; models without them get no such section."""
    images = load_split(DATA, "val", val_fraction=info.val_fraction, seed=info.seed)
    picks = [int(np.flatnonzero(images.labels == digit)[0]) for digit in (0, 3, 5, 8)]
    pixels = np.stack([images.pixels(i, info.preprocess) for i in picks])
    x = to_input(torch.from_numpy(pixels), info.preprocess)
    try:
        maps = received_attention(model, x)
    except ModelError as error:
        note(str(error))
        (folder / "attention.json").unlink(missing_ok=True)
        return
    with torch.inference_mode():
        predicted = model(x).argmax(1).tolist()
    entries = [
        {
            "label": images.classes[int(images.labels[index])],
            "predicted": images.classes[predicted[i]],
            "image": pixels[i].tolist(),
            "maps": [layer[i].tolist() for layer in maps],
        }
        for i, index in enumerate(picks)
    ]
    write_json(folder / "attention.json", {"images": entries})


def _benchmark(checkpoint: Path, folder: Path) -> dict[str, Any]:
    note("5/7 benchmark, alternated, each runtime in a process of its own")
    targets = [describe(path) for path in (checkpoint, folder / "bundle-fp32", folder / "bundle")]
    timings = benchmark(targets, batch_sizes=(1, 32))
    write_json(folder / "benchmark.json", timings)
    return timings


def _speed(config: DemoConfig, folder: Path) -> dict[str, Any] | None:
    """How fast a ViT-S is here, where it is asked for: the digits' network is too small to gain much."""
    if not config.speed:
        note("6/7 speed of a ViT-S: left out, as --no-speed says")
        (folder / demo_speed.FILE).unlink(missing_ok=True)
        return None
    note("6/7 speed of a ViT-S at 224 px, float32 against W8A8")
    return demo_speed.time_vit_small(folder)


def _summary(
    config: DemoConfig, folder: Path, timings: dict[str, Any], speed: dict[str, Any] | None, seconds: float
) -> dict[str, Any]:
    note("7/7 report")
    floats = read_json(folder / "train" / "train.json")["best"]
    w8, w4 = (read_json(folder / f"quantize-w{bits}a{bits}" / "quantize.json") for bits in (8, 4))
    onnx32, onnx8 = (read_json(folder / name / "bundle.json")["accuracy"] for name in ("bundle-fp32", "bundle"))
    size = {name: (folder / name / MODEL_NAME).stat().st_size for name in ("bundle-fp32", "bundle")}
    rows = [
        _row("PyTorch eager, float32", floats, w8["float_bytes"], timings, 0),
        _row("ONNX Runtime, float32", onnx32, size["bundle-fp32"], timings, 1),
        _row("ONNX Runtime, W8A8 (SQ-b)", onnx8, size["bundle"], timings, 2),
        _row("W4A4 (SQ-b), simulated", w4["accuracy"], w4["quantized_bytes"], timings, None),
    ]
    result = {
        "command": command_line("demo", config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "seconds": seconds,
        "machine": machine(),
        "versions": versions(),
        "config": asdict(config),
        "table": rows,
        "speed": speed,
    }
    write_json(folder / "demo.json", result)
    return result


def _row(name: str, accuracy: dict[str, Any], size: int, timings: dict[str, Any], index: int | None) -> dict[str, Any]:
    """One line of the table. index: of the target in the benchmark, None for a simulation that isn't timed."""
    results = timings["results"]
    targets = len(results) // 2
    single, batch = (results[index], results[index + targets]) if index is not None else ({}, {})
    return {
        "name": name,
        "accuracy": accuracy["top1"],
        "correct": accuracy["correct"],
        "images": accuracy["images"],
        "bytes": size,
        "latency_ms": single.get("median_ms"),
        "throughput": batch.get("images_per_second"),
        "speedup": batch.get("ratio"),
        "simulated": index is None,
    }


def format_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the result table, as printed and as in the README."""
    columns = ["model", "top-1", "correct", "size", "latency, batch 1", "throughput, batch 32", "speed"]
    cells = []
    for row in result["table"]:
        timed = row["latency_ms"] is not None
        cells.append(
            [
                row["name"],
                f"{row['accuracy']:.2f}%",
                f"{row['correct']}/{row['images']}",
                f"{row['bytes'] / 1e6:.2f} MB",
                f"{row['latency_ms']:.2f} ms" if timed else "-",
                f"{row['throughput']:.0f} images/s" if timed else "-",
                f"{row['speedup']:.2f}x" if timed else "-",
            ]
        )
    return columns, cells


def markdown(result: dict[str, Any]) -> str:
    """The result table as Markdown, with what makes it reproducible below it."""
    lines = _markdown_table(*format_rows(result))
    if result["speed"]:
        lines += ["", f"{demo_speed.TITLE}:", "", *_markdown_table(*demo_speed.format_rows(result["speed"]))]
    where = f"{result['machine']['cpu']}, {result['machine']['cores']} cores"
    lines += ["", f"{result['date'][:10]}, {where}, seed {result['seed']}, {result['seconds']:.0f} s in all."]
    return "\n".join(lines) + "\n"


def _markdown_table(columns: list[str], cells: list[list[str]]) -> list[str]:
    rule = f"|{'---|' + '---:|' * (len(columns) - 1)}"
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(row)} |" for row in cells)]


def _print(result: dict[str, Any], folder: Path, report: Path) -> None:
    columns, cells = format_rows(result)
    print_table(f"leanvit demo, {result['seconds']:.0f} s, seed {result['seed']}", columns, cells)
    if result["speed"]:
        print_table(demo_speed.TITLE, *demo_speed.format_rows(result["speed"]))
    example = folder / "digit.png"
    example.write_bytes(load_golden(folder / "bundle")[0][0])
    (folder / "table.md").write_text(markdown(result), encoding="utf-8")
    print(f"report: {report}\n\nTry next:")
    for command in next_commands(folder):
        print(f"  {command}")


def next_commands(folder: Path) -> list[str]:
    """Three commands to try on a run in `folder`, spelled so that they work in the caller's shell."""
    installed = Path(sys.executable).with_name("leanvit")
    program = "leanvit" if shutil.which("leanvit") else os.path.relpath(installed)
    return [
        f"{program} predict {folder / 'bundle'} {folder / 'digit.png'} --top-k 3",
        f"{program} verify {folder / 'bundle'} --data {DATA}",
        f"{program} train --data YOUR_FOLDER --model revit_micro --output runs/mine",
    ]


def run(config: DemoConfig) -> int:
    """The whole path."""
    run_demo(config)
    return errors.EXIT_OK
