"""Boxes of the objects in pictures, from a detector's lines or a COCO file: `leanvit predict --boxes`. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from leanvit.errors import ConfigError
from leanvit.runtime.decode import Box

KnownBoxes = dict[str, dict[str, list[Box]]]
"""Boxes (x1, y1, x2, y2) by file name, then by path: lists are often written with other folders before it."""


def read_boxes(path: str) -> KnownBoxes:
    """Boxes of pictures: from JSON lines of a detector's predict, or from a COCO file (crowds left out).

    Raises ConfigError where the file is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("{") and '"annotations"' in text:
            entries = _coco_boxes(json.loads(text))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
            entries = {row["path"]: [_box(*one["box"]) for one in row["objects"]] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"boxes {path}: not readable ({error}), expected the JSON lines of a detector's `leanvit predict`, or a "
            "COCO file."
        ) from error
    known: KnownBoxes = {}
    for key, boxes in entries.items():
        known.setdefault(Path(key).name, {})[key] = boxes
    return known


def boxes_of(known: KnownBoxes, path: Path) -> list[Box] | None:
    """Boxes of one picture, None for one that is not listed.

    Raises ConfigError where the list has several pictures that it may be.
    """
    same = known.get(path.name, {})
    if str(path) in same:
        return same[str(path)]
    ends = [boxes for key, boxes in same.items() if path.parts[-len(Path(key).parts) :] == Path(key).parts]
    fitting = ends or list(same.values())
    if len(fitting) > 1:
        raise ConfigError(f"boxes: {', '.join(list(same)[:3])} may all be {path}, expected one. Give it as listed.")
    return fitting[0] if fitting else None


def _coco_boxes(document: dict[str, Any]) -> dict[str, list[Box]]:
    names = {image["id"]: str(image["file_name"]) for image in document["images"]}
    found: dict[str, list[Box]] = {name: [] for name in names.values()}
    for entry in document["annotations"]:
        if not entry.get("iscrowd"):
            x, y, width, height = entry["bbox"]
            found[names[entry["image_id"]]].append(_box(x, y, x + width, y + height))
    return found


def _box(x1: float, y1: float, x2: float, y2: float) -> Box:
    box = float(x1), float(y1), float(x2), float(y2)
    if not (np.isfinite(box).all() and x1 < x2 and y1 < y2):
        raise ValueError(f"box {list(box)} has no area")
    return box
