"""Times of files on this machine: in turns, each in a process of its own (leanvit.bench)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from leanvit.bench import Target, benchmark, describe
from leanvit.config import OptimizeOptions
from leanvit.runtime.task import task_named

Timer = Callable[[list[Target], int, int], dict[str, Any]]
"""(files, images a step, threads) -> what leanvit.bench.benchmark returns."""

ROUNDS = 15
"""Turns of each file at batch 1, as `leanvit benchmark` takes."""

BATCH_ROUNDS = 5
"""Turns at larger batches, whose time varies less: a median of fewer is moved by one busy moment."""

THROUGHPUT_BATCH = 32
"""Images of a classifier that fill the cores."""


def time_files(targets: list[Target], batch_size: int, threads: int) -> dict[str, Any]:
    """Median times of files, in turns."""
    rounds = ROUNDS if batch_size == 1 else BATCH_ROUNDS
    return benchmark(targets, batch_sizes=(batch_size,), threads=threads, rounds=rounds)


def batch_size_of(options: OptimizeOptions, task: str) -> int:
    """Images a step for which times count."""
    if options.batch_size is not None:
        return options.batch_size
    if options.by != "throughput":
        return 1
    return min(THROUGHPUT_BATCH, task_named(task).batch_size)


def targets_of(files: Mapping[str, tuple[Path, Sequence[str]]]) -> list[tuple[str, Target]]:
    """What is timed: each file, by name, in each of its runtimes."""
    return [(name, describe(path, runtime)) for name, (path, runtimes) in files.items() for runtime in runtimes]


def milliseconds(targets: list[tuple[str, Target]], timed: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{name: {runtime: median of a batch}} from what a timer returned for these targets."""
    found: dict[str, dict[str, float]] = {}
    for (name, target), result in zip(targets, timed["results"], strict=True):
        found.setdefault(name, {})[target.runtime] = float(result["median_ms"])
    return found
