"""YOLO data sets: a data.yaml, pictures, and a text file of normalised boxes, polygons or keypoints for each.

Source of the format: https://docs.ultralytics.com/datasets/detect/ (and /segment/, /pose/)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from leanvit import imaging
from leanvit.annotations.checks import Box, BrokenAnnotation, OnProblem, check_box, picture_size, settle, shorten
from leanvit.annotations.keypoints import COCO_NAMES, check_keypoints, is_mirror, keypoint_scheme, swapped_by_name
from leanvit.annotations.masks import check_segmentation
from leanvit.annotations.types import Instance, KeypointScheme, Scene, SceneSet
from leanvit.errors import DataError, ImageError
from leanvit.image_paths import images_below, is_hidden, leave_out_foreign, read_lines, real_path
from leanvit.progress import track


def read_yolo(data_yaml: str | Path, split: str, on_problem: OnProblem = "skip") -> SceneSet:
    """Read one split (train, val or test) of a YOLO data set.

    Labels of a/images/b/c.jpg stand in a/labels/b/c.txt (the last 'images' of the path is replaced), one object a
    row: class cx cy w h, or class x1 y1 x2 y2 ... (a polygon), or, where data.yaml has kpt_shape, class cx cy w h and
    x y [visibility] of each keypoint; all as shares of the picture's width and height. A picture without a label file
    shows no object. Without visibility, a keypoint at (0, 0) is not annotated. Mirrored pairs are those of flip_idx,
    else left_ and right_ in kpt_names, else none. Pictures are numbered from 1 in the order of their paths.

    on_problem: 'skip' leaves broken rows and pictures out and names each in SceneSet.problems, 'fail' raises
    DataError with the first. Raises DataError where data.yaml or what it names is missing or can't be used.
    """
    path = Path(data_yaml)
    settings = _read_settings(path)
    names = _names(settings.get("names"), path)
    reader = _Rows(len(names), _scheme(settings, path), _values_per_keypoint(settings, path))
    pictures = sorted(set(_pictures(settings, split, path)))
    if not any(label_path(picture).is_file() for picture in pictures):
        raise DataError(
            f"{path}: no label files for '{split}', expected e.g. {label_path(pictures[0])}. "
            "Put a text file for each picture below 'labels' where the pictures are below 'images'."
        )
    problems = _labels_alone(pictures)
    found = (reader.scene(picture, problems) for picture in track(pictures, f"checking {path}", len(pictures)))
    scenes = tuple(Scene(p, i, size, rows) for i, (p, size, rows) in enumerate(filter(None, found), 1))
    return SceneSet(
        str(path), scenes, names, tuple(range(len(names))), reader.scheme, problems=settle(problems, on_problem)
    )


def label_path(picture: Path) -> Path:
    """The label file of a picture: 'labels' for the last folder 'images', else beside the picture."""
    parts = list(picture.parts)
    for place in reversed(range(len(parts) - 1)):
        if parts[place] == "images":
            parts[place] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _labels_alone(pictures: list[Path]) -> list[str]:
    """Problems of label files whose picture is not there, in the folders that hold the labels of `pictures`."""
    folders = {label_path(picture).parent: picture.parent for picture in pictures}
    problems = []
    for labels, images in sorted(folders.items()):
        if labels == images or not labels.is_dir():
            continue
        # All files of the folder: a list may name a part of them, and pictures of other formats are named elsewhere.
        there = {path.stem for path in images.iterdir()} | {"classes"}
        alone = sorted(path for path in labels.glob("*.txt") if path.stem not in there and not is_hidden(path.name))
        problems += [f"{path}: no picture of these labels in {images}; left out" for path in alone]
    return problems


# --- data.yaml ---


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected YOLO's data.yaml. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: no YAML in UTF-8 ({reason}). Correct the file.") from error
    if not isinstance(settings, dict):
        raise DataError(f"{path}: {shorten(settings)} found, expected YOLO's path, train, val and names. Correct it.")
    return settings


def _names(names: Any, path: Path) -> tuple[str, ...]:
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: names is {shorten(names)}, expected a list, or a dictionary from 0 on. Correct it.")
    return tuple(str(name) for name in names)


def _values_per_keypoint(settings: dict[str, Any], path: Path) -> int:
    shape = settings.get("kpt_shape")
    if shape is None:
        return 0
    valid = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int for n in shape)
    if not valid or shape[0] < 1 or shape[1] not in (2, 3):
        raise DataError(f"{path}: kpt_shape is {shorten(shape)}, expected [keypoints, 2 or 3]. Correct it.")
    return int(shape[1])


def _scheme(settings: dict[str, Any], path: Path) -> KeypointScheme | None:
    if not _values_per_keypoint(settings, path):
        return None
    count, swapped = settings["kpt_shape"][0], settings.get("flip_idx")
    if swapped is not None and not is_mirror(swapped, count):
        raise DataError(f"{path}: flip_idx is {shorten(swapped)}, expected {count} indices that exchange pairs.")
    names = settings.get("kpt_names")
    if isinstance(names, dict):  # one list for each class; their order is the same
        names = next(iter(names.values()), None)
    if names is None:
        is_person = count == len(COCO_NAMES) and swapped is not None and tuple(swapped) == swapped_by_name(COCO_NAMES)
        names = COCO_NAMES if is_person else [f"keypoint_{number}" for number in range(1, count + 1)]
    if not isinstance(names, list | tuple) or len(names) != count:
        raise DataError(f"{path}: kpt_names is {shorten(names)}, expected {count} names as in kpt_shape. Correct it.")
    return keypoint_scheme(tuple(map(str, names)), swapped=tuple(swapped) if swapped else None)


def _pictures(settings: dict[str, Any], split: str, path: Path) -> Iterator[Path]:
    """Pictures of one split. Raises DataError where data.yaml does not name it, or names nothing that is there."""
    sources = settings.get(split)
    sources = sources if isinstance(sources, list) else [sources]
    if not sources or not all(isinstance(source, str) and source for source in sources):
        raise DataError(f"{path}: {split} is {shorten(settings.get(split))}, expected a folder or list of pictures.")
    for source in sources:
        place = _find(source, str(settings.get("path") or ""), path)
        yield from _listed(place) if place.suffix == ".txt" else _in_folder(place)


def _find(source: str, root: str, path: Path) -> Path:
    # Roboflow writes ../train/images for what stands beside data.yaml.
    root, source = root.replace("\\", "/"), source.replace("\\", "/")
    places = [path.parent / root / source, path.parent / source, path.parent / source.removeprefix("../")]
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise DataError(f"{path}: {places[0]} is not there, expected a folder or a .txt list. Correct 'path' or it.")
    return place


def _listed(path: Path) -> Iterator[Path]:
    lines = [line.strip() for line in read_lines(path) if line.strip()]
    if not lines:
        raise DataError(f"{path}: an empty list, expected the path of a picture in each line.")
    return (real_path(path.parent, line) for line in lines)


def _in_folder(folder: Path) -> Iterator[Path]:
    pictures = leave_out_foreign(images_below(folder))
    if not pictures:
        raise DataError(f"{folder}: no pictures found, expected files ending in {imaging.ENDINGS}.")
    return iter(pictures)


# --- rows ---


@dataclass(frozen=True)
class _Rows:
    """Reads label files. per_keypoint: values of a keypoint in a row, 0 where rows have none."""

    classes: int
    scheme: KeypointScheme | None
    per_keypoint: int

    def scene(self, picture: Path, problems: list[str]) -> tuple[Path, tuple[int, int], tuple[Instance, ...]] | None:
        """A picture, its size and its objects; None where the picture or its label file can't be read."""
        labels = label_path(picture)
        try:
            size = picture_size(picture)
            text = labels.read_text(encoding="utf-8-sig") if labels.exists() else ""
        except ImageError as error:
            problems.append(f"{picture}: {error}; left out with its labels")
            return None
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{labels}: can't be read ({error}), expected the labels of {picture.name}; left out")
            return None
        rows = [(number, row) for number, row in enumerate(text.splitlines(), 1) if row.strip()]
        return picture, size, tuple(self._instances(rows, size, f"{labels}, labels of {picture.name}", problems))

    def _instances(
        self, rows: list[tuple[int, str]], size: tuple[int, int], file: str, problems: list[str]
    ) -> Iterator[Instance]:
        seen: set[str] = set()
        for number, row in rows:
            where = f"{file}, line {number}"
            try:
                if row.strip() in seen:
                    raise BrokenAnnotation("the same row was there before, expected each object once")
                seen.add(row.strip())
                instance, remark = self._instance(row.split(), size)
            except BrokenAnnotation as error:
                problems.append(f"{where}: {error}; left out")
                continue
            if remark:
                problems.append(f"{where}: {remark}")
            yield instance

    def _instance(self, fields: list[str], size: tuple[int, int]) -> tuple[Instance, str | None]:
        values = [_number(field) for field in fields]
        label = values[0]
        if label not in range(self.classes):
            raise BrokenAnnotation(f"class {label:g} is unknown, expected 0 to {self.classes - 1}")
        if self.per_keypoint:
            return self._posed(values, size)
        if len(values) >= 7 and len(values) % 2:
            return _outlined(int(label), values[1:], size)
        if len(values) != 5:
            raise BrokenAnnotation(f"{len(values)} values, expected class cx cy w h, or class and at least 3 points")
        return _boxed(int(label), values[1:], size)

    def _posed(self, values: list[float], size: tuple[int, int]) -> tuple[Instance, str | None]:
        count = len(self.scheme.names) if self.scheme else 0
        expected = 5 + count * self.per_keypoint
        if len(values) != expected:
            raise BrokenAnnotation(f"{len(values)} values, expected {expected} (a box and {count} keypoints)")
        instance, remark = _boxed(int(values[0]), values[1:5], size)
        flat: list[float] = []
        for start in range(5, expected, self.per_keypoint):
            x, y, *visible = values[start : start + self.per_keypoint]
            flat += [x * size[1], y * size[0], *(visible or [2.0 if x or y else 0.0])]
        keypoints = check_keypoints(flat, count, size)
        return Instance(instance.label, instance.box, keypoints=keypoints, area=instance.area), remark


def _number(field: str) -> float:
    try:
        value = float(field)
    except ValueError:
        raise BrokenAnnotation(f"{shorten(field)} found, expected numbers") from None
    if not -1e6 < value < 1e6:  # NaN is neither
        raise BrokenAnnotation(f"{field} found, expected finite numbers from 0 to 1")
    return value


def _boxed(label: int, values: list[float], size: tuple[int, int]) -> tuple[Instance, str | None]:
    cx, cy, width, height = (value * side for value, side in zip(values, size[::-1] * 2, strict=True))
    box, remark = check_box((cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2), size)
    return Instance(label, box, area=_area(box)), remark


def _outlined(label: int, values: list[float], size: tuple[int, int]) -> tuple[Instance, str | None]:
    polygon = [value * size[1 - place % 2] for place, value in enumerate(values)]
    xs, ys = polygon[0::2], polygon[1::2]
    box, remark = check_box((min(xs), min(ys), max(xs), max(ys)), size)
    return Instance(label, box, [polygon], area=check_segmentation([polygon], size)), remark


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
