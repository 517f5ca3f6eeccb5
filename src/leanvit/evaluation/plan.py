"""What `leanvit val` does in which order, and what its result says of where it comes from; for every task."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from leanvit.bench import machine
from leanvit.config import ValConfig, command_line
from leanvit.errors import ConfigError
from leanvit.evaluation.corruptions import CORRUPTIONS
from leanvit.evaluation.measure import shifts_at
from leanvit.evaluation.subject import Subject
from leanvit.runtime.bundle import versions

Json = dict[str, Any]
SCHEMA_VERSION = 1
RESULT_NAME = "val.json"


def check_shifts(config: ValConfig, subject: Subject) -> None:
    """Raise ConfigError where a shift would leave nothing of an image."""
    side = min(subject.preprocess.input_size)
    if config.shifts >= side:
        raise ConfigError(f"shifts is {config.shifts}, expected less than the images' side of {side} pixels")


def conditions(config: ValConfig) -> list[tuple[str, int]]:
    """(corruption, severity) in the order in which they are measured."""
    names = CORRUPTIONS if "all" in config.corruptions else [n for n in CORRUPTIONS if n in config.corruptions]
    return [(name, severity) for name in names for severity in sorted(set(config.severities))]


def passes(config: ValConfig) -> int:
    """How often the model sees all images."""
    shifted = sum(len(shifts_at(distance)) for distance in range(config.shifts + 1)) if config.shifts else 0
    return 1 + len(conditions(config)) + shifted


def batch_size_of(config: ValConfig, subject: Subject) -> int:
    """Images a step: what is asked for, else what the task takes."""
    return config.batch_size or subject.task.batch_size


def origin(config: ValConfig, subject: Subject, data: str, left_out: list[str]) -> Json:
    """What was measured, with what, where and when, as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command_line("val", config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "seed": config.seed,
        "model": config.model,
        "kind": subject.kind,
        "architecture": subject.architecture,
        "runtime": subject.runtime,
        "data": data,
        "split": config.split,
        "limit": config.limit,
        "input_size": list(subject.preprocess.input_size),
        "left_out": left_out,
    }
