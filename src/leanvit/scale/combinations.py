"""The file of a sweep: read, checked before anything runs, and taken apart into its combinations."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from leanvit import config as configs
from leanvit.config import SweepConfig, convert, from_dict, load_yaml
from leanvit.config.sweep import Sweep
from leanvit.errors import ConfigError, did_you_mean

OWN_KEYS = ("output", "resume", "ray", "ray_workers", "version")
"""Options of a verb that a sweep sets: each run has a folder of its own, in which it goes on."""

FILES = {
    "benchmark": "benchmark.json",
    "convert": "model.safetensors",
    "predict": "predictions.jsonl",
    "report": "report.html",
}
"""Verbs whose output is a file, with its name in the folder of the run."""

LONGEST_VALUE = 24
"""Characters of a value in the name of a run: several of them stay readable in one line."""


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    values: of the grid. options: all that are given to the verb. key: of the verb and these options, by which the
    journal knows a run. name: of its folder, readable and no other's.
    """

    values: dict[str, Any]
    options: dict[str, Any]
    key: str
    name: str


def sweepable() -> dict[str, type]:
    """Verbs that write an output, with their configurations: `data inspect` has DataInspectConfig."""
    found = {}
    for name in configs.__all__:
        cls = getattr(configs, name)
        if name.endswith("Config") and cls is not SweepConfig and "output" in {f.name for f in fields(cls)}:
            found[re.sub(r"(?<!^)(?=[A-Z])", " ", name.removesuffix("Config")).lower()] = cls
    return found


def read_sweep(path: str | Path) -> Sweep:
    """The file of a sweep, checked as far as it can be without running it.

    Raises ConfigError for an unknown verb or key, a value of another type, an empty grid, and what no run would have.
    """
    sweep = from_dict(Sweep, load_yaml(path), f"{path}")
    verbs = sweepable()
    if sweep.verb not in verbs:
        known = ", ".join(verbs)
        raise ConfigError(
            f"{path}: verb is '{sweep.verb}'.{did_you_mean(sweep.verb, verbs)} Expected one that writes: {known}."
        )
    _check_grid(sweep, str(path))
    _check_options(sweep, verbs[sweep.verb], str(path))
    return sweep


def _check_grid(sweep: Sweep, path: str) -> None:
    if not sweep.grid:
        raise ConfigError(f"{path}: grid is empty, expected options with their values, as in grid: {{seed: [0, 1]}}.")
    for key, values in sweep.grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: grid: {key} is {values!r}, expected a list of values, as in {key}: [0, 1].")


def _check_options(sweep: Sweep, cls: type, path: str) -> None:
    for part in ("base", "grid"):
        for key in OWN_KEYS:
            if key in getattr(sweep, part):
                raise ConfigError(f"{path}: {part} has {key}, which the sweep itself sets for every run. Leave it out.")
    if both := sorted(sweep.base.keys() & sweep.grid.keys()):
        raise ConfigError(f"{path}: {', '.join(both)} is in base and in grid, expected in one of them.")
    convert(cls, sweep.base, f"{path}: base")
    for key, values in sweep.grid.items():
        for value in values:
            convert(cls, {key: value}, f"{path}: grid")
    given = {*sweep.base, *sweep.grid, *OWN_KEYS}
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in needed if name not in given]:
        raise ConfigError(f"{path}: missing {', '.join(missing)}, expected in base or grid.")


def combinations(sweep: Sweep) -> list[Combination]:
    """All combinations of the grid, each once, the last key's values changing fastest."""
    made = (_combination(sweep, dict(values)) for values in _products(sweep.grid))
    return list({one.key: one for one in made}.values())


def _products(grid: dict[str, list[Any]]) -> Iterator[list[tuple[str, Any]]]:
    for values in itertools.product(*grid.values()):
        yield list(zip(grid, values, strict=True))


def _combination(sweep: Sweep, values: dict[str, Any]) -> Combination:
    options = {**sweep.base, **values}
    text = json.dumps([sweep.verb, options], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    words = [f"{name}={_short(value)}" for name, value in values.items()]
    # The digits keep values apart that look alike, and runs of an earlier base.
    return Combination(values, options, key, "_".join([*words, key[:6]]))


def _short(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip("-._")[-LONGEST_VALUE:] or "none"
