"""What a run folder holds: which of its JSON files the report knows, and where they may lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from leanvit.errors import DataError
from leanvit.files import read_json
from leanvit.report.words import Json, finite

# Part of the report: where its file may lie in a run folder; the first that exists is read.
_PLACES = {
    "demo": ("demo.json",),
    "train": ("train/train.json", "train.json"),
    "attention": ("attention.json",),
    "analysis": ("analysis.json",),
    "bundle": ("bundle/bundle.json", "bundle.json"),
    "verify": ("bundle/verify.json", "verify.json"),
    "benchmark": ("benchmark.json",),
    "speed": ("speed.json",),
    "val": ("val.json",),
    "optimize": ("optimize.json",),
}
_QUANTIZED = ("quantize*/quantize.json", "quantize.json")


@dataclass(frozen=True)
class Run:
    """What was found in a run folder.

    parts: values of each part that is there. quantized: quantization reports by name, most bits first; that of a
    task's network holds those of its parts under `part_reports`.
    files: path of every file that was read, by its name inside the folder.
    """

    folder: Path
    parts: dict[str, Json]
    quantized: dict[str, Json]
    files: dict[str, Path]

    def get(self, part: str) -> Json:
        """The values of a part, empty where its file isn't there."""
        return self.parts.get(part, {})


def read_run(run: str | Path) -> Run:
    """Read every known JSON file of a run folder. Raises DataError, BundleError."""
    folder = Path(run)
    if not folder.is_dir():
        state = "is a file" if folder.exists() else "no such folder"
        raise DataError(f"{folder}: {state}, expected a run folder. Check the path, or make one: leanvit demo")
    places = {
        part: next((p for p in map(folder.joinpath, paths) if p.is_file()), None) for part, paths in _PLACES.items()
    }
    reports = [path for pattern in _QUANTIZED for path in sorted(folder.glob(pattern))]
    files = {str(path.relative_to(folder)): path for path in (*places.values(), *reports) if path is not None}
    if not files:
        known = ", ".join((*(paths[-1] for paths in _PLACES.values()), _QUANTIZED[-1]))
        raise DataError(
            f"{folder}: none of the known files found, expected one or more of {known}. "
            "Give the folder of leanvit optimize, demo, train, val, quantize, analyze or export."
        )
    parts = {part: _read_object(path) for part, path in places.items() if path is not None}
    quantized: dict[str, Json] = {}
    read = [(_with_parts(_read_object(path), path, folder, files), path) for path in reports]
    for report, path in sorted(read, key=lambda pair: -_bits(pair[0])[0]):
        weight, activation = _bits(report)
        name = f"W{weight}A{activation}" if weight and activation else path.parent.resolve().name
        quantized[name if name not in quantized else f"{name} ({path.parent.name})"] = report
    return Run(folder, parts, quantized, files)


def _with_parts(report: Json, path: Path, folder: Path, files: dict[str, Path]) -> Json:
    """The report of a task's network with those of its parts, which lie in folders of their own; others as they are."""
    if not isinstance(report.get("parts"), dict):
        return report
    found = {name: path.parent / name / path.name for name in report["parts"]}
    found = {name: part for name, part in found.items() if part.is_file()}
    files |= {str(part.relative_to(folder)): part for part in found.values()}
    return report | {"part_reports": {name: _read_object(part) for name, part in found.items()}}


def _read_object(path: Path) -> Json:
    values = read_json(path)
    if not isinstance(values, dict):
        raise DataError(f"{path}: holds a JSON {type(values).__name__}, expected an object. Make the run again.")
    return values


def _bits(report: Json) -> tuple[int, int]:
    config = report.get("config") or {}
    return int(finite(config.get("weight_bits")) or 0), int(finite(config.get("activation_bits")) or 0)
