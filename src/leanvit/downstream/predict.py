"""leanvit predict for the tasks: objects, class maps or keypoints of files and folders, as JSON lines and drawn."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image

from leanvit.config import PredictConfig
from leanvit.downstream.predictor import TaskPredictor, plain
from leanvit.errors import ConfigError, DataError, ImageError, PartialError
from leanvit.files import read_json
from leanvit.imaging import Pixels, decode, find_images
from leanvit.progress import Bar, note
from leanvit.scenes import ClassMap, Found
from leanvit.scenes.decode import Box
from leanvit.scenes.draw import draw_found, draw_map


def run(config: PredictConfig) -> int:
    """One JSON line a picture; with `draw` also pictures with what was found. Returns how many were read.

    Raises DataError where no picture could be read, PartialError where some could not: the others are done.
    """
    if not config.images:
        raise ConfigError("no images given. Run: leanvit predict BUNDLE IMAGE...")
    if config.resume or config.format == "csv":
        raise ConfigError(
            f"{'resume' if config.resume else 'format csv'} is for classifiers, expected jsonl lines of a whole run."
        )
    runtime = "onnxruntime" if config.runtime == "auto" else config.runtime
    predictor = TaskPredictor(config.bundle, threads=config.threads, runtime=runtime)
    boxes = read_boxes(config.boxes) if config.boxes else None
    done, problems = 0, list[str]()
    with _lines(config.output) as lines, Bar("predicting", None) as bar:
        for path in find_images(config.images):
            try:
                pixels = decode(path).pixels
            except ImageError as error:
                note(f"skipped {error}")
                problems.append(str(error))
                continue
            line = answer(predictor, pixels, path, config, boxes)
            lines.write(json.dumps(line) + "\n")
            done += 1
            bar.advance()
    if problems and not done:
        raise DataError(problems[0] if len(problems) == 1 else f"none of {len(problems)} images could be read")
    if problems:
        raise PartialError(f"{len(problems)} of {done + len(problems)} images could not be read and were skipped.")
    return done


def answer(
    predictor: TaskPredictor, pixels: Pixels, path: Path, config: PredictConfig, boxes: dict[str, list[Box]] | None
) -> dict[str, Any]:
    """What one picture's line says; writes the drawn picture where it is asked for."""
    task = predictor.manifest.task
    if task == "semantic":
        found_map = predictor.class_map(pixels)
        if config.draw:
            _write_map(Path(config.draw), path, found_map)
            _write_picture(Path(config.draw), path, draw_map(pixels, found_map, predictor.labels))
        return {"path": str(path), "shares": _shares(found_map, predictor.labels)}
    given = None if boxes is None else boxes.get(path.name, [])
    found: list[Found] = predictor.objects(pixels, config.score_threshold, given)
    if config.draw:
        drawn = draw_found(pixels, found, predictor.labels, predictor.keypoints)
        _write_picture(Path(config.draw), path, drawn)
    return {"path": str(path), "objects": [plain(one, predictor.labels, task) for one in found]}


def _shares(found: ClassMap, labels: tuple[str, ...]) -> dict[str, float]:
    """Share of the picture that each class covers, the largest first."""
    counts = np.bincount(found.ravel(), minlength=len(labels))
    order = sorted(np.flatnonzero(counts), key=lambda label: -counts[label])
    return {labels[label]: round(float(counts[label] / found.size), 5) for label in order}


def _write_picture(folder: Path, path: Path, pixels: Pixels) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{path.stem}.png")


def _write_map(folder: Path, path: Path, found: ClassMap) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(found).save(folder / f"{path.stem}.map.png")


@contextlib.contextmanager
def _lines(output: str | None) -> Iterator[TextIO]:
    """Standard output, or a file that is there only when it is whole."""
    if output is None:
        yield sys.stdout
        return
    draft = Path(f"{output}.partial")
    draft.parent.mkdir(parents=True, exist_ok=True)
    with draft.open("w", encoding="utf-8") as file:
        yield file
    draft.replace(output)


def read_boxes(path: str) -> dict[str, list[Box]]:
    """Boxes (x1, y1, x2, y2) by file name: from JSON lines of a detector's predict, or from a COCO file.

    Raises ConfigError where the file is neither.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        if text.lstrip().startswith("{") and '"annotations"' in text:
            return _coco_boxes(read_json(Path(path)))
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        return {Path(row["path"]).name: [tuple(one["box"]) for one in row["objects"]] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"boxes {path}: not readable ({error}), expected the JSON lines of a detector's `leanvit predict`, or a "
            "COCO file."
        ) from error


def _coco_boxes(document: dict[str, Any]) -> dict[str, list[Box]]:
    names = {image["id"]: Path(image["file_name"]).name for image in document["images"]}
    found: dict[str, list[Box]] = {name: [] for name in names.values()}
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        found[names[entry["image_id"]]].append((x, y, x + width, y + height))
    return found
