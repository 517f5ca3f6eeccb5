"""Configuration of the verb `sweep`, and what its file holds."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

from leanvit.config.base import option, require_at_least
from leanvit.config.scale import RayOptions


@dataclass(frozen=True, kw_only=True)
class SweepConfig(RayOptions):
    """Run a verb with every combination of some options, each combination once, alone or on Ray."""

    file: str = option(
        MISSING,
        "YAML file: `verb`, `base` with the options of all runs, and `grid` with lists of values to combine.",
        positional=True,
    )
    output: str = option("runs/sweep", "Folder for the runs, the journal and results.json.")
    threads: int = option(1, "Threads of each run; on Ray its CPUs as well.")
    ray_workers: int | None = option(None, "Runs at a time on Ray; default: as many as it has room for.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "threads")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What the file of a sweep says: a verb, the options of all runs, and lists of values for others."""

    verb: str
    base: dict[str, Any] = field(default_factory=dict)
    grid: dict[str, Any] = field(default_factory=dict)
    version: int = 1
