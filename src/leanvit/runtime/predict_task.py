"""leanvit predict for the tasks: objects, class maps or keypoints of files and folders, as JSON lines and drawn."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leanvit.annotations import ClassMap, Found
from leanvit.config import PredictConfig
from leanvit.errors import ConfigError, ImageError
from leanvit.imaging import Pixels, decode, find_images
from leanvit.progress import Bar, note
from leanvit.runtime.decode import Box
from leanvit.runtime.draw import draw_found, draw_map
from leanvit.runtime.result_files import nothing_left, open_results, settings_of
from leanvit.runtime.task_predictor import TaskPredictor, plain


def run(config: PredictConfig) -> int:
    """One JSON line a picture; with `draw` also pictures with what was found. Returns how many were read.

    Raises DataError where no picture could be read, PartialError where some could not: the others are done.
    """
    if not config.images:
        raise ConfigError("no images given. Run: leanvit predict BUNDLE IMAGE...")
    for name, given in (("format csv", config.format == "csv"), ("top_k", config.top_k != 1)):
        if given:
            raise ConfigError(f"{name} is for classifiers, expected jsonl lines. Leave it out.")
    if nothing_left(config):
        return 0
    runtime = "onnxruntime" if config.runtime == "auto" else config.runtime
    predictor = TaskPredictor(config.bundle, threads=config.threads, runtime=runtime)
    if config.boxes and predictor.manifest.task != "pose":
        raise ConfigError(f"boxes are for pose networks, {config.bundle} finds its own. Leave them out.")
    boxes = read_boxes(config.boxes) if config.boxes else None
    drawing = Drawing(Path(config.draw)) if config.draw else None
    paths = find_images(config.images)
    if drawing:
        paths = drawing.follow(paths)
    settings = settings_of(config, predictor.manifest.sha256)
    with open_results(config, settings, paths) as results, Bar("predicting", None) as bar:
        bar.advance(results.images)
        for path in paths:
            try:
                pixels = decode(path).pixels
            except ImageError as error:
                note(f"skipped {error}")
                results.skip(path, str(error))
            else:
                line = answer(predictor, pixels, path, config.score_threshold, boxes, drawing)
                results.write_line(path, json.dumps(line))
            results.flush()
            bar.advance()
        results.require_one()
    results.require_all()
    return results.images


@dataclass
class Drawing:
    """Where drawn pictures go: by stem, numbered where pictures of other folders have the same.

    name: of the drawn picture of the path that was taken last.
    """

    folder: Path
    name: str = ""
    _used: set[str] = field(default_factory=set)

    def follow(self, paths: Iterator[Path]) -> Iterator[Path]:
        """The same paths, each with its name from when it is taken: also where a run that goes on passes it over."""
        for path in paths:
            numbered = (path.stem if number == 1 else f"{path.stem}-{number}" for number in itertools.count(1))
            self.name = next(name for name in numbered if not {name, f"{name}.map"} & self._used)
            self._used |= {self.name, f"{self.name}.map"}
            yield path

    def write(self, pixels: NDArray[np.uint8], ending: str = ".png") -> str:
        """Write a picture (height, width, 3) or a map (height, width); returns its path."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}{ending}"
        Image.fromarray(pixels).save(path)
        return str(path)


def answer(
    predictor: TaskPredictor,
    pixels: Pixels,
    path: Path,
    score_threshold: float,
    boxes: KnownBoxes | None,
    drawing: Drawing | None,
) -> dict[str, Any]:
    """What one picture's line says; writes the drawn picture where it is asked for."""
    task = predictor.manifest.task
    line: dict[str, Any] = {"path": str(path)}
    if task == "semantic":
        found_map = predictor.class_map(pixels)
        line["shares"] = _shares(found_map, predictor.labels)
        if drawing:
            line["drawn"] = drawing.write(draw_map(pixels, found_map, predictor.labels))
            line["map"] = drawing.write(found_map, ".map.png")
        return line
    found: list[Found] = predictor.objects(pixels, score_threshold, boxes_of(boxes, path))
    line["objects"] = [plain(one, predictor.labels, task) for one in found]
    if drawing:
        line["drawn"] = drawing.write(draw_found(pixels, found, predictor.labels, predictor.keypoints))
    return line


def _shares(found: ClassMap, labels: tuple[str, ...]) -> dict[str, float]:
    """Share of the picture that each class covers, the largest first."""
    counts = np.bincount(found.ravel(), minlength=len(labels))
    order = sorted(np.flatnonzero(counts), key=lambda label: -counts[label])
    return {labels[label]: round(float(counts[label] / found.size), 5) for label in order}


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


def boxes_of(known: KnownBoxes | None, path: Path) -> list[Box] | None:
    """Boxes of one picture, none (with a remark) for one that is not listed; None where no list was given.

    Raises ConfigError where the list has several pictures that it may be.
    """
    if known is None:
        return None
    same = known.get(path.name, {})
    if str(path) in same:
        return same[str(path)]
    ends = [boxes for key, boxes in same.items() if path.parts[-len(Path(key).parts) :] == Path(key).parts]
    fitting = ends or list(same.values())
    if len(fitting) > 1:
        raise ConfigError(f"boxes: {', '.join(list(same)[:3])} may all be {path}, expected one. Give it as listed.")
    if not fitting:
        note(f"{path}: not among the pictures of --boxes, so nothing is looked for")
    return fitting[0] if fitting else []


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
