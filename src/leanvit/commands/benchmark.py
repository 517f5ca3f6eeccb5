"""leanvit benchmark: time bundles and checkpoints against each other, or the products of one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.commands.inputs import load_model
from leanvit.progress import note, print_table

if TYPE_CHECKING:
    from leanvit import config as configs
    from leanvit.bench import Target


def _latency_table(config: configs.BenchmarkConfig, path: str) -> int:
    """Measure what the products of one model cost."""
    import torch

    from leanvit.export.onnx.latency import measure_table
    from leanvit.files import write_json

    if len(config.targets) != 1:
        raise errors.ConfigError(f"--table with {len(config.targets)} targets, expected one checkpoint or NAME.TAG")
    model, info = load_model(config.targets[0], config.load_options())
    example = torch.zeros(1, info.preprocess.channels, *info.preprocess.input_size)
    table = measure_table(model, example, threads=config.threads, rounds=config.rounds)
    write_json(path, table)
    rows = [
        [key, f"{row['float_ms']:.3f}", f"{row['int8_ms']:.3f}", f"{row['float_ms'] / row['int8_ms']:.2f}"]
        for key, row in table["sites"].items()
    ]
    columns = ["product: weight, elements, multiply-adds", "float ms", "int8 ms", "speed ratio"]
    print_table(f"{table['machine']['cpu']}, {table['threads']} threads, {table['date']}", columns, rows)
    print(f"next: leanvit quantize {config.targets[0]} --latency-table {path} --latency-ms MILLISECONDS")
    return errors.EXIT_OK


def _by_operation(targets: list[Target], config: configs.BenchmarkConfig) -> list[dict[str, Any]]:
    """Profile every file at every batch size, and say what runs on integers."""
    from leanvit import kernels
    from leanvit.bench import images_of, model_file, take_images

    found: list[dict[str, Any]] = []
    for target in targets:
        if target.runtime == "torch":
            note(f"{target.path}: a network in PyTorch has no int8 kernels, so it is not told by operation")
            continue
        images = images_of(target)
        for size in config.batch_sizes:
            profile = kernels.profile(model_file(target), target.runtime, take_images(images, size), config.threads)
            row = {"name": target.name, "path": str(target.path), "runtime": target.runtime, "batch_size": size,
                   **profile.to_json()}  # fmt: skip
            row["machine_rate"] = kernels.machine_rate(config.threads) if row["int8_rate"] else None
            print_table(f"{target.name}, batch {size}: {_coverage(row)}", *_operations(row))
            found.append(row)
    return found


def _coverage(row: dict[str, Any]) -> str:
    """How much runs on int8 kernels, in words."""
    text = f"{row['int8_share_of_time']:.0%} of the time is on int8 kernels"
    if row["int8_share_of_multiply_adds"] is not None:
        text += f", {row['int8_share_of_multiply_adds']:.0%} of the multiply-adds"
    if row["machine_rate"]:
        share = row["int8_rate"] / row["machine_rate"]
        text += f", whose products run at {share:.0%} of this machine's {row['machine_rate']:.0f} billion a second"
    return text


def _operations(row: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells: operations of 1% of the time and more, then the rest."""
    whole = row["milliseconds"]
    shown = [entry for entry in row["operations"] if entry["milliseconds"] >= whole / 100]
    cells = [
        [entry["operation"], "int8" if entry["int8"] else "float", f"{entry['milliseconds']:.2f}",
         f"{entry['milliseconds'] / whole:.0%}",
         f"{entry['multiply_adds'] / 1e6:.0f}" if entry["multiply_adds"] else ""]
        for entry in shown
    ]  # fmt: skip
    rest = whole - sum(entry["milliseconds"] for entry in shown)
    cells.append(["the rest", "", f"{rest:.2f}", f"{rest / whole:.0%}", ""])
    return ["operation", "kernels", "ms", "share", "million multiply-adds"], cells


def run(config: configs.BenchmarkConfig) -> int:
    """Time targets against each other, or the products of one model."""
    if config.table:
        return _latency_table(config, config.table)
    from leanvit.bench import benchmark as run_it
    from leanvit.bench import describe
    from leanvit.files import write_json

    described = [
        describe(path, runtime, config.load_options()) for path in config.targets for runtime in config.runtimes
    ]
    targets = list(dict.fromkeys(described))
    result = run_it(targets, batch_sizes=config.batch_sizes, threads=config.threads, rounds=config.rounds)
    rows = [
        [
            r["name"],
            str(r["batch_size"]),
            f"{r['median_ms']:.2f}",
            f"{r['p10_ms']:.2f} to {r['p90_ms']:.2f}",
            f"{r['images_per_second']:.0f}",
            f"{r['ratio']:.2f}",
            f"{r['bytes'] / 1e6:.2f}",
            f"{r['peak_megabytes']:.0f}" if r["peak_megabytes"] else "",
            f"{r['load_seconds']:.2f}",
        ]
        for r in result["results"]
    ]
    columns = ["target", "batch", "median ms", "p10 to p90 ms", "images/s", "speed ratio", "MB", "peak MiB", "load s"]
    print_table(f"{result['machine']['cpu']}, {result['threads']} threads, {result['date']}", columns, rows)
    if config.by_operation:
        result["by_operation"] = _by_operation(targets, config)
    if config.output:
        from leanvit.config import save_yaml

        write_json(config.output, result)
        save_yaml(config, Path(config.output).with_suffix(".config.yaml"))
    return errors.EXIT_OK
