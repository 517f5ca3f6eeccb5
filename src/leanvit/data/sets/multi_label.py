"""Images with any number of labels: a CSV table or JSON lines."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from leanvit.data.sets.image_set import ImageSet, Split, require_files
from leanvit.data.sets.local import SPLIT_NAMES
from leanvit.errors import DataError

FILE_COLUMNS = ("file", "path", "image", "file_name", "filename", "fname")
LABEL_COLUMNS = ("labels", "tags")
SEPARATORS = re.compile(r"[;|]")
FORMS = (
    "FILE.csv with columns file and labels (names between ; or |) or a column of 0 and 1 for each label, or FILE.jsonl "
    'with {"file": ..., "labels": [...]} a line; a column split is optional'
)


def load_multi_label(spec: str, split: Split, *, val_fraction: float = 0.2, seed: int = 0) -> ImageSet:
    """One part of a set whose labels are (N, labels) int64 of 0 and 1, its classes sorted or in the columns' order.

    Paths are relative to the folder of the file. Where no row names a split, `val_fraction` of the images is held out.
    Raises DataError that names the line of what is wrong.
    """
    path = Path(spec.removeprefix("csv:"))
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows}
    if not path.is_file() or path.suffix.lower() not in readers:
        raise DataError(f"data '{spec}' is no table of images with several labels, expected {FORMS}. Check --data.")
    names: list[str] = []
    try:
        rows = list(readers[path.suffix.lower()](path, names))
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}), expected {FORMS}. Save it again in UTF-8.") from error
    if not rows:
        raise DataError(f"{path}: no rows, expected {FORMS}. Add images.")
    known = names or sorted({label for _, labels, _ in rows for label in labels})
    files = [path.parent / file for file, _, _ in rows]
    require_files(files, str(path), "Paths are relative to the folder of the table; correct them or add the files.")
    index = {name: i for i, name in enumerate(known)}
    truth = np.zeros((len(rows), len(known)), np.int64)
    for row, (_, labels, _) in enumerate(rows):
        truth[row, [index[label] for label in labels]] = 1
    chosen = _of_split([told for _, _, told in rows], split, val_fraction, seed, path)
    return ImageSet(str(path), files, truth, tuple(known)).subset(chosen)


Row = tuple[str, list[str], str | None]
"""File, its labels, and the split where it is told."""


def _of_split(told: list[str | None], split: Split, fraction: float, seed: int, path: Path) -> Any:
    if any(told):
        unknown = [name for name in told if str(name or "").strip().lower() not in SPLIT_NAMES]
        if unknown:
            raise DataError(
                f"{path}: split is '{unknown[0] or ''}' in {len(unknown)} rows, expected train, val or test. Correct "
                "them."
            )
        found = np.flatnonzero([SPLIT_NAMES.get(str(name).strip().lower()) == split for name in told])
        if not len(found):
            raise DataError(f"{path}: no row has split '{split}', expected some. Add them, or leave the column out.")
        return found
    if split == "test" or len(told) < 2:
        raise DataError(f"{path}: no part '{split}' of {len(told)} rows, expected a column split. Add it.")
    order = np.random.default_rng(seed).permutation(len(told))
    held_out = min(max(1, round(fraction * len(told))), len(told) - 1)
    return np.sort(order[:held_out] if split == "val" else order[held_out:])


def _csv_rows(path: Path, names: list[str]) -> Iterator[Row]:
    """names: filled where each label has a column."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        image = _column(columns, FILE_COLUMNS)
        if image is None:
            raise DataError(
                f"{path}: no column {FILE_COLUMNS[0]} among {', '.join(columns)}, expected {FORMS}. Add it."
            )
        listed = _column(columns, LABEL_COLUMNS)
        part = _column(columns, ("split",))
        if listed is None:
            names += [name for name in columns if name not in (image, part)]
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{where}: another number of fields than {len(columns)}. Quote commas.")
            labels = _listed(row[listed]) if listed else [name for name in names if _is_one(row[name], name, where)]
            yield _named(row[image], where), labels, row[part] if part else None


def _column(columns: list[str], wanted: tuple[str, ...]) -> str | None:
    return next((name for name in columns if name.lower() in wanted), None)


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in SEPARATORS.split(text) if name.strip()))


def _is_one(text: str, name: str, where: str) -> bool:
    if text.strip() not in ("0", "1", "0.0", "1.0"):
        raise DataError(f"{where}: '{name}' is '{text}', expected 0 or 1. Correct the row.")
    return text.strip() in ("1", "1.0")


def _named(text: Any, where: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: no file is named, expected one in every row. Fill it in or remove the row.")
    return text.strip()


def _json_rows(path: Path, names: list[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, values = f"{path}, line {number}", json.loads(line)
            labels = values.get("labels") if isinstance(values, dict) else None
            if not isinstance(labels, list):
                raise DataError(f"{where}: no list of labels, expected {FORMS}. Correct the line.")
            image = next((values[key] for key in FILE_COLUMNS if key in values), None)
            yield _named(image, where), list(dict.fromkeys(map(str, labels))), values.get("split")
