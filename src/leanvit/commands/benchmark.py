"""leanvit benchmark: time bundles and checkpoints against each other, or the products of one model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from leanvit import errors
from leanvit.commands.inputs import load_model
from leanvit.progress import print_table

if TYPE_CHECKING:
    from leanvit import config as configs


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
    if config.output:
        from leanvit.config import save_yaml

        write_json(config.output, result)
        save_yaml(config, Path(config.output).with_suffix(".config.yaml"))
    return errors.EXIT_OK
