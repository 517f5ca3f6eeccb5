"""COCO annotation files: read with every broken entry named and left out, written, and results in COCO's form.

Source of the format: https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations.checks import (
    BrokenAnnotation,
    OnProblem,
    check_box,
    check_number,
    check_numbers,
    picture_size,
    settle,
    shorten,
)
from leanvit.annotations.keypoints import check_keypoints, is_mirror, keypoint_scheme
from leanvit.annotations.masks import check_segmentation, encode_mask
from leanvit.annotations.types import Found, Instance, KeypointScheme, Scene, SceneSet
from leanvit.errors import DataError
from leanvit.files import write_atomic
from leanvit.image_paths import real_path
from leanvit.passed_over import note_once
from leanvit.progress import Bar


def read_coco(
    json_path: str | Path, images_folder: str | Path, on_problem: OnProblem = "skip", check_files: bool = True
) -> SceneSet:
    """Read a COCO file: boxes, polygons or run lengths, crowds and keypoints; classes in the order of category ids.

    images_folder: where file_name begins. on_problem: 'skip' leaves broken entries out and names each in
    SceneSet.problems (a box partly outside is clipped and named), 'fail' raises DataError with the first.
    check_files: whether every picture must exist with the stated size, read from the head of its file.
    Raises DataError where the file is missing, damaged, or has no usable categories.
    """
    return scenes_of_document(read_document(json_path), json_path, images_folder, on_problem, check_files)


def read_document(json_path: str | Path) -> dict[str, Any]:
    """The JSON of a COCO file. Raises DataError where it is missing, damaged, or lacks one of COCO's three lists."""
    try:
        document = json.loads(Path(json_path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"{json_path}: {error.strerror}, expected a COCO annotation file. Check the path.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{json_path}, line {error.lineno}: damaged JSON ({error.msg}, column {error.colno}), expected a COCO "
            "annotation file. Write or download it again."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{json_path}: no JSON in UTF-8 ({error}). Write or download it again.") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(key), list):
            raise DataError(
                f"{json_path}: no list '{key}', expected COCO's images, annotations and categories. Check the file."
            )
    return dict(document)


def scenes_of_document(
    document: dict[str, Any],
    json_path: str | Path,
    images_folder: str | Path,
    on_problem: OnProblem = "skip",
    check_files: bool = True,
) -> SceneSet:
    """What `read_coco` makes of JSON that `read_document` has read."""
    _number_ids(document, str(json_path))
    reader = _Reader(str(json_path), Path(images_folder), check_files)
    reader.read_categories(document["categories"])
    with Bar(f"checking {json_path}", len(document["images"]) + len(document["annotations"])) as bar:
        for entry in document["images"]:
            reader.read_picture(entry)
            bar.advance()
        for entry in document["annotations"]:
            reader.read_annotation(entry)
            bar.advance()
    return SceneSet(
        str(json_path), reader.scenes(), reader.names, tuple(reader.labels), reader.scheme,
        problems=settle(reader.problems, on_problem),
    )  # fmt: skip


@dataclass(frozen=True)
class _Picture:
    name: str
    path: Path
    size: tuple[int, int]
    instances: list[Instance] = field(default_factory=list)


@dataclass
class _Reader:
    """What is known of one COCO file so far; labels: {category id: label}, pictures: None where one is left out."""

    path: str
    folder: Path
    check_files: bool
    names: tuple[str, ...] = ()
    labels: dict[int, int] = field(default_factory=dict)
    scheme: KeypointScheme | None = None
    posed: set[int] = field(default_factory=set)
    pictures: dict[int, _Picture | None] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)

    def scenes(self) -> tuple[Scene, ...]:
        """The pictures that are left, in the order of the file."""
        kept = ((number, picture) for number, picture in self.pictures.items() if picture)
        return tuple(Scene(p.path, number, p.size, tuple(p.instances)) for number, p in kept)

    def read_categories(self, entries: list[Any]) -> None:
        """Names, labels and the one scheme of keypoints. Raises DataError where ids or names can't be used."""
        for entry in entries:
            if not isinstance(entry, dict) or not _is_id(entry.get("id")) or not isinstance(entry.get("name"), str):
                raise DataError(
                    f"{self.path}: category {shorten(entry)}, expected a whole number as id and a name. Correct it."
                )
        ordered = sorted(entries, key=lambda entry: entry["id"])
        self.labels = {entry["id"]: label for label, entry in enumerate(ordered)}
        self.names = tuple(entry["name"] for entry in ordered)
        if len(self.labels) != len(ordered) or not ordered:
            raise DataError(
                f"{self.path}: {len(ordered)} categories with {len(self.labels)} ids, expected at least one and an id "
                "of its own for each. Correct the categories."
            )
        for entry in ordered:
            self._read_scheme(entry)

    def _read_scheme(self, category: dict[str, Any]) -> None:
        if not category.get("keypoints"):
            return
        where = f"{self.path}: category {category['id']} ({category['name']})"
        try:
            scheme = _scheme(category)
        except BrokenAnnotation as error:
            self.problems.append(f"{where}: {error}; its keypoints are left out")
            return
        if self.scheme is None or scheme.names == self.scheme.names:
            self.scheme = self.scheme or scheme
            self.posed.add(category["id"])
        else:
            self.problems.append(
                f"{where}: keypoints {shorten(scheme.names)}, expected those of the first category that has some; "
                "its keypoints are left out"
            )

    def read_picture(self, entry: Any) -> None:
        """Take one entry of 'images', or name what is wrong with it."""
        number = entry.get("id") if isinstance(entry, dict) else None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        where = f"{self.path}: image {shorten(number)} ({name if isinstance(name, str) else 'no file name'})"
        if not _is_id(number) or not isinstance(name, str) or not name:
            self.problems.append(
                f"{where}: found {shorten(entry)}, expected a whole number as id and a file_name; left out"
            )
        elif number in self.pictures:
            self.problems.append(f"{where}: this id was there before, expected an id of its own; left out")
        else:
            self.pictures[number] = None
            try:
                path = real_path(self.folder, name)
                self.pictures[number] = _Picture(name, path, _picture_size(entry, path, self.check_files))
            except DataError as error:
                self.problems.append(f"{where}: {error}; left out with its annotations")

    def read_annotation(self, entry: Any) -> None:
        """Take one entry of 'annotations', or name what is wrong with it."""
        number = entry.get("id") if isinstance(entry, dict) else None
        image = entry.get("image_id") if isinstance(entry, dict) else None
        picture = self.pictures.get(image) if _is_id(image) else None
        where = f"{self.path}: annotation {shorten(number)}" + (f" of {picture.name}" if picture else "")
        try:
            if not _is_id(number):
                raise BrokenAnnotation(f"found {shorten(entry)}, expected a dictionary with a whole number as id")
            if number in self.seen:
                raise BrokenAnnotation("this id was there before, expected an id of its own")
            self.seen.add(number)
            if not _is_id(image) or image not in self.pictures:
                raise BrokenAnnotation(f"image_id {shorten(image)} is not among the images, expected one of them")
            if picture:
                instance, remark = self._instance(entry, picture.size)
                picture.instances.append(instance)
                if remark:
                    self.problems.append(f"{where}: {remark}")
        except BrokenAnnotation as error:
            self.problems.append(f"{where}: {error}; left out")

    def _instance(self, entry: dict[str, Any], size: tuple[int, int]) -> tuple[Instance, str | None]:
        category = entry.get("category_id")
        if not _is_id(category) or category not in self.labels:
            ids = shorten(list(self.labels))
            raise BrokenAnnotation(f"category {shorten(category)} is unknown, expected one of {ids}")
        x, y, width, height = check_numbers(entry.get("bbox"), "bbox", 4)
        box, remark = check_box((x, y, x + width, y + height), size)
        segmentation = entry.get("segmentation") or None
        area = check_segmentation(segmentation, size) if segmentation else (box[2] - box[0]) * (box[3] - box[1])
        # Converters of boxes write area 0 where they know no mask.
        if entry.get("area") is not None and (segmentation or entry["area"] != 0):
            area = check_number(entry["area"], "area")
        if area <= 0:
            raise BrokenAnnotation(f"area is {area:g}, expected more than 0")
        keypoints = self._keypoints(entry, category, size)
        crowd = bool(entry.get("iscrowd", 0))
        return Instance(self.labels[category], box, segmentation, keypoints, area, crowd), remark

    def _keypoints(self, entry: dict[str, Any], category: int, size: tuple[int, int]) -> NDArray[np.float32] | None:
        if self.scheme is None or category not in self.posed or entry.get("keypoints") is None:
            return None
        return check_keypoints(entry["keypoints"], len(self.scheme.names), size)


def _number_ids(document: dict[str, Any], path: str) -> None:
    """Make whole numbers of ids that a program wrote as text throughout: their value, else their place in the file."""
    for name, uses in _IDS.items():
        entries = [entry for entry in document[name] if isinstance(entry, dict)]
        ids = [entry.get("id") for entry in entries]
        if not ids or not all(isinstance(one, str) and one for one in ids):
            continue  # a single one is a slip, which the reader names
        numeric = all(str(one).isdecimal() for one in ids)
        numbers = {one: int(one) if numeric else place for place, one in enumerate(dict.fromkeys(map(str, ids)), 1)}
        if not numeric and uses:
            note_once(f"{path}: ids of {name} are names, e.g. {shorten(ids[0])}: they are numbered from 1")
        for entry in entries:
            entry["id"] = numbers[entry["id"]]
        for entry in document["annotations"] if uses else ():
            if isinstance(entry, dict) and isinstance(entry.get(uses), str | int):
                entry[uses] = numbers.get(str(entry[uses]), entry[uses])


_IDS = {"images": "image_id", "annotations": ""}
"""The lists with ids, and what annotations call those."""


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _picture_size(entry: dict[str, Any], path: Path, check_files: bool) -> tuple[int, int]:
    height, width = entry.get("height"), entry.get("width")
    if not _is_id(height) or not _is_id(width) or min(height, width) <= 0:
        raise BrokenAnnotation(f"height and width are {shorten((height, width))}, expected whole numbers above 0")
    if check_files and (real := picture_size(path)) != (height, width):
        raise BrokenAnnotation(f"the file has {real[1]} x {real[0]} pixels, expected {width} x {height} as stated")
    return height, width


def _scheme(category: dict[str, Any]) -> KeypointScheme:
    names = category["keypoints"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BrokenAnnotation(f"keypoints {shorten(names)}, expected a list of names")
    places = set(range(1, len(names) + 1))
    skeleton = category.get("skeleton") or []
    pairs = isinstance(skeleton, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in skeleton)
    if not pairs or not all(_is_id(end) and end in places for pair in skeleton for end in pair):
        raise BrokenAnnotation(f"skeleton {shorten(skeleton)}, expected pairs of numbers from 1 to {len(names)}")
    swapped, sigmas = category.get("swapped"), category.get("sigmas")
    if swapped is not None and not is_mirror(swapped, len(names)):
        raise BrokenAnnotation(f"swapped {shorten(swapped)}, expected {len(names)} indices that exchange pairs")
    if sigmas is not None and min(check_numbers(sigmas, "sigmas", len(names))) <= 0:
        raise BrokenAnnotation(f"sigmas {shorten(sigmas)}, expected numbers above 0")
    return keypoint_scheme(
        tuple(names),
        tuple((first - 1, second - 1) for first, second in skeleton),
        tuple(swapped) if swapped else None,
        tuple(map(float, sigmas)) if sigmas else None,
    )


# --- writing ---


def write_coco(scene_set: SceneSet, json_path: str | Path, images_folder: str | Path) -> None:
    """Write a COCO file with the image ids and category ids of `scene_set`; pictures stay where they are.

    images_folder: the folder above every picture, where file_name begins. Annotations are numbered from 1. Sigmas
    and mirrored pairs that the names of the keypoints don't tell stand in the category as 'sigmas' and 'swapped'.
    Raises DataError where a picture is elsewhere, EnvironmentProblem where the file can't be written.
    """
    ids = scene_set.coco_ids
    found = [(scene, instance) for scene in scene_set.scenes for instance in scene.instances]
    document = {
        "images": [_image_entry(scene, Path(images_folder)) for scene in scene_set.scenes],
        "annotations": [
            {"id": number, "image_id": scene.image_id, "category_id": ids[instance.label], **_instance_entry(instance)}
            for number, (scene, instance) in enumerate(found, 1)
        ],
        "categories": [
            {"id": number, "name": name, **_scheme_entry(scene_set.keypoints)}
            for number, name in zip(ids, scene_set.classes, strict=True)
        ],
    }
    write_atomic(Path(json_path), json.dumps(document, allow_nan=False).encode())


def _image_entry(scene: Scene, folder: Path) -> dict[str, Any]:
    if not scene.path.is_relative_to(folder):
        raise DataError(f"{scene.path}: not below {folder}, expected every picture there. Give the folder above all.")
    name = scene.path.relative_to(folder).as_posix()
    return {"id": scene.image_id, "file_name": name, "height": scene.size[0], "width": scene.size[1]}


def _instance_entry(instance: Instance) -> dict[str, Any]:
    x1, y1, x2, y2 = map(float, instance.box)
    area = float(instance.area) or (x2 - x1) * (y2 - y1)
    entry = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": area, "iscrowd": int(instance.crowd)}
    if instance.segmentation is not None:
        entry["segmentation"] = instance.segmentation
    if instance.keypoints is not None:
        entry["keypoints"] = _flat(instance.keypoints)
        entry["num_keypoints"] = int((instance.keypoints[:, 2] > 0).sum())
    return entry


def _flat(keypoints: NDArray[np.float32]) -> list[float]:
    return [float(value) for value in keypoints.ravel()]


def _scheme_entry(scheme: KeypointScheme | None) -> dict[str, Any]:
    if scheme is None:
        return {}
    told = keypoint_scheme(scheme.names)
    entry: dict[str, Any] = {
        "keypoints": list(scheme.names),
        "skeleton": [[first + 1, second + 1] for first, second in scheme.skeleton],
    }
    if scheme.swapped != told.swapped:
        entry["swapped"] = list(scheme.swapped)
    if scheme.sigmas != told.sigmas:
        entry["sigmas"] = list(scheme.sigmas)
    return entry


def results_to_coco(scene_set: SceneSet, found: Mapping[int, Sequence[Found]]) -> list[dict[str, Any]]:
    """What a network found, {image id: objects}, as COCO's list of results with the category ids of the file.

    bbox is x, y, width, height in pixels; masks become compressed run lengths; keypoints a flat list of x, y, score.
    Raises DataError for an image id or a label that `scene_set` does not have.
    """
    ids = scene_set.coco_ids
    known = {scene.image_id for scene in scene_set.scenes}
    unknown = [number for number in found if number not in known]
    if unknown:
        raise DataError(
            f"{scene_set.name}: results for image {unknown[0]}, expected image ids of the set. Predict on its pictures."
        )
    return [_result(number, one, ids) for number, objects in found.items() for one in objects]


def _result(image_id: int, found: Found, ids: tuple[int, ...]) -> dict[str, Any]:
    if not 0 <= found.label < len(ids):
        raise DataError(
            f"image {image_id}: label {found.label} found, expected 0 to {len(ids) - 1}. "
            "Evaluate on the classes that the network was trained on."
        )
    x1, y1, x2, y2 = map(float, found.box)
    result: dict[str, Any] = {
        "image_id": image_id, "category_id": ids[found.label], "bbox": [x1, y1, x2 - x1, y2 - y1],
        "score": float(found.score),
    }  # fmt: skip
    if found.mask is not None:
        result["segmentation"] = encode_mask(found.mask)
    if found.keypoints is not None:
        result["keypoints"] = _flat(found.keypoints)
    return result
