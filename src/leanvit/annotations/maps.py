"""Pictures with class maps in folders: the layouts of ADE20K and Cityscapes, and a plain one with classes.txt."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leanvit import imaging
from leanvit.annotations.checks import OnProblem, picture_size, settle
from leanvit.annotations.types import IGNORED, ClassMap, Scene, SceneSet
from leanvit.errors import DataError, ImageError
from leanvit.image_paths import images_below, leave_out_foreign
from leanvit.passed_over import few, note_once
from leanvit.progress import note, track

MapLayout = Literal["auto", "ade20k", "cityscapes", "plain"]
MapSplit = Literal["train", "val"]
VALUES_CHECKED = 2000
Result = TypeVar("Result")
CITYSCAPES_CLASSES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
"""The 19 classes that count, by value in labelIds. Source: cityscapesScripts, helpers/labels.py."""
_CHANNELS = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")


@dataclass(frozen=True)
class _Layout:
    """Where one split is. ignored: values that mean no class on purpose. *_end: what stands after the shared stem."""

    pictures: Path
    maps: Path
    classes: tuple[str, ...]
    map_values: dict[int, int]
    ignored: frozenset[int]
    picture_end: str = ""
    map_end: str = ""


def read_maps(
    root: str | Path,
    split: MapSplit,
    layout: MapLayout = "auto",
    *,
    on_problem: OnProblem = "skip",
    values_checked: int = VALUES_CHECKED,
) -> SceneSet:
    """Read pictures and their class maps (PNG, one channel, one value a pixel) below `root`.

    plain: images/{train,val} and masks/{train,val} with the same stems, classes.txt whose line i, from 0, names value
    i; 255 is ignored. ade20k: images/{training,validation} and annotations/{training,validation}, value 0 ignored,
    names from objectInfo150.txt or classes.txt (line 1 names value 1), else class_1 up to the highest value.
    cityscapes: leftImg8bit/SPLIT/CITY/*_leftImg8bit.png and gtFine/SPLIT/CITY/*_gtFine_labelIds.png, of which the 19
    training classes count, or _labelTrainIds.png.

    on_problem: 'skip' names every picture without a map, map without a picture, unreadable file and map of another
    size, and leaves it out; pixels of a value that is no class are named and ignored; 'fail' raises DataError.
    values_checked: how many maps, spread over the split, are decoded to look at their values. Pictures are numbered
    from 1 in the order of their paths. Raises DataError where folders or names are missing.
    """
    place = _LAYOUTS[find_layout(Path(root)) if layout == "auto" else layout](Path(root), split)
    problems: list[str] = []
    pairs = list(_pairs(place, problems))
    measured = (_measured(scene, problems) for scene in track(pairs, f"checking {place.pictures}", len(pairs)))
    scenes = [scene for scene in measured if scene]
    if values_checked:
        scenes = _with_readable_maps(scenes, values_checked, place, problems)
    if not scenes:
        first = f" First problem: {problems[0]}." if problems else ""
        raise DataError(f"{place.pictures}: no picture with a class map, expected some with their maps below "
                        f"{place.maps}.{first} Add them.")  # fmt: skip
    return SceneSet(
        str(root), tuple(scenes), place.classes, map_values=place.map_values, problems=settle(problems, on_problem)
    )


def load_map(scene: Scene, scene_set: SceneSet) -> ClassMap:
    """Labels of the pixels of a scene: (height, width) uint8, IGNORED (255) where the value is no class.

    Raises DataError where the scene has no map, or one that can't be read or has another size than the picture.
    """
    if scene.class_map is None:
        raise DataError(f"{scene.path}: no class map, expected one for each picture. Read the set with its maps.")
    values = _read_values(scene.class_map)
    if values.shape != scene.size:
        raise DataError(f"{_size_problem(scene, values.shape)}. Resize it without interpolation, or leave it out.")
    table = np.full(257, IGNORED, np.uint8)
    for value, label in scene_set.map_values.items():
        table[value] = label
    return table[values if values.dtype == np.uint8 else np.where((values < 0) | (values > 255), 256, values)]


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Names of classes, one a line; empty lines at the end don't count.

    Raises DataError where the file can't be read, a line between is empty, or there are none or more than 255.
    """
    lines = [line.strip() for line in _read_text(Path(path)).rstrip().splitlines()]
    if not 1 <= len(lines) <= IGNORED or "" in lines:
        found = f"line {lines.index('') + 1} is empty" if lines and "" in lines else f"{len(lines)} names"
        raise DataError(f"{path}: {found}, expected 1 to {IGNORED} names of classes, one a line. Correct the file.")
    return tuple(lines)


def find_layout(root: Path) -> Literal["ade20k", "cityscapes", "plain"]:
    """Which layout `root` has, by the folders in it. Raises DataError where it is none of them."""
    if (root / "leftImg8bit").is_dir():
        return "cityscapes"
    if (root / "images" / "training").is_dir() or (root / "images" / "validation").is_dir():
        return "ade20k"
    if (root / "masks").is_dir():
        return "plain"
    raise DataError(
        f"{root}: no pictures with class maps found, expected images/train and masks/train with classes.txt, ADE20K's "
        "images/training and annotations/training, or Cityscapes' leftImg8bit and gtFine. Check the folder."
    )


# --- layouts ---


def _plain(root: Path, split: MapSplit) -> _Layout:
    names = read_class_names(root / "classes.txt")
    return _Layout(
        root / "images" / split, root / "masks" / split, names, {i: i for i in range(len(names))}, frozenset({IGNORED})
    )


def _ade20k(root: Path, split: MapSplit) -> _Layout:
    folder = {"train": "training", "val": "validation"}[split]
    names = _ade20k_names(root)
    values = {label + 1: label for label in range(len(names))}
    return _Layout(root / "images" / folder, root / "annotations" / folder, names, values, frozenset({0, IGNORED}))


def _ade20k_names(root: Path) -> tuple[str, ...]:
    if (root / "objectInfo150.txt").is_file():
        return _object_info(root / "objectInfo150.txt")
    if (root / "classes.txt").is_file():
        return read_class_names(root / "classes.txt")
    # Of both splits: training and validation must agree on the number of classes.
    maps = sorted((root / "annotations").rglob("*.png"))
    highest = max(map(_highest_value, track(maps, f"counting the classes of {root}", len(maps))), default=0)
    if not 1 <= highest < IGNORED:
        raise DataError(
            f"{root}: the highest value in the class maps is {highest}, expected 1 to {IGNORED - 1}. Add "
            "objectInfo150.txt, or classes.txt with a name a line."
        )
    return tuple(f"class_{value}" for value in range(1, highest + 1))


def _highest_value(path: Path) -> int:
    try:
        values = _read_values(path)
    except DataError:  # named where its split is read
        return 0
    return int(values.max(where=values != IGNORED, initial=0))


def _object_info(path: Path) -> tuple[str, ...]:
    rows = [line.split("\t") for line in _read_text(path).splitlines()[1:] if line.strip()]
    names = tuple(row[-1].strip() for row in rows)
    if not names or any(row[0].strip() != str(number) for number, row in enumerate(rows, 1)):
        raise DataError(f"{path}: not ADE20K's table of classes, expected columns Idx to Name. Download it again.")
    return names


def _cityscapes(root: Path, split: MapSplit) -> _Layout:
    maps = root / "gtFine" / split
    by_id = next(maps.rglob("*_gtFine_labelIds.png"), None) is not None
    values = list(CITYSCAPES_CLASSES) if by_id else list(range(len(CITYSCAPES_CLASSES)))
    others = set(range(34)).difference(values) if by_id else set()
    return _Layout(
        root / "leftImg8bit" / split,
        maps,
        tuple(CITYSCAPES_CLASSES.values()),
        {value: label for label, value in enumerate(values)},
        frozenset(others | {IGNORED}),
        "_leftImg8bit",
        "_gtFine_labelIds" if by_id else "_gtFine_labelTrainIds",
    )


_LAYOUTS: dict[str, Callable[[Path, MapSplit], _Layout]] = {
    "ade20k": _ade20k, "cityscapes": _cityscapes, "plain": _plain,
}  # fmt: skip


# --- pairs and checks ---


def _pairs(place: _Layout, problems: list[str]) -> Iterator[Scene]:
    pictures = _by_stem(place.pictures, place.picture_end, imaging.SUFFIXES, problems)
    maps = _by_stem(place.maps, place.map_end, frozenset({".png"}), problems)
    for stem in sorted(maps.keys() - pictures.keys()):
        problems.append(f"{maps[stem]}: no picture {place.pictures / stem}{place.picture_end}.*; left out")
    number = 0
    for stem, path in sorted(pictures.items()):
        if stem in maps:
            number += 1
            yield Scene(path, number, (0, 0), class_map=maps[stem])
        else:
            problems.append(f"{path}: no class map {place.maps / stem}{place.map_end}.png; left out")


def _by_stem(folder: Path, end: str, suffixes: frozenset[str], problems: list[str]) -> dict[str, Path]:
    """Files below a folder, found by their path in it without `end` and suffix."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder, expected the files of this split. Check the folder and the split.")
    files: dict[str, Path] = {}
    found = images_below(folder)
    for path in leave_out_foreign(found) if suffixes is imaging.SUFFIXES else found:
        if path.is_dir():
            problems.append(f"{path}: a folder that can't be read, expected the right to; left out")
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix.lower() not in suffixes or not stem.endswith(end):
            continue
        key = stem[: len(stem) - len(end)]
        if key in files:
            problems.append(f"{path}: same stem as {files[key].name}, expected one file for each; left out")
        files.setdefault(key, path)
    return files


def _measured(scene: Scene, problems: list[str]) -> Scene | None:
    """The scene with the size of its picture; None where a file can't be read or the sizes differ."""
    try:
        scene = replace(scene, size=picture_size(scene.path))
    except ImageError as error:
        problems.append(f"{scene.path}: {error}; left out with its class map")
        return None
    try:
        size = _with_map(scene.class_map, lambda image: image.size)
    except DataError as error:
        problems.append(f"{error} Left out.")
        return None
    if size[::-1] == scene.size:
        return scene
    problems.append(f"{_size_problem(scene, size[::-1])}; left out")
    return None


def _size_problem(scene: Scene, found: tuple[int, ...]) -> str:
    return (
        f"{scene.class_map}: the class map has {found[1]} x {found[0]} pixels, expected {scene.size[1]} x "
        f"{scene.size[0]} as {scene.path.name} has"
    )


def _with_readable_maps(scenes: list[Scene], values_checked: int, place: _Layout, problems: list[str]) -> list[Scene]:
    """The scenes without those whose map turned out to be damaged; values that are no class are named."""
    chosen = scenes[:: max(1, -(-len(scenes) // values_checked))]
    if len(chosen) < len(scenes):
        note(f"{place.maps}: values checked in {len(chosen)} of {len(scenes)} class maps")
    damaged = set()
    present: set[int] = set()
    for scene in track(chosen, f"checking values in {place.maps}", len(chosen)):
        try:
            values = _values_in(_read_values(scene.class_map))
        except DataError as error:
            problems.append(f"{error} Left out.")
            damaged.add(scene.image_id)
            continue
        present |= values
        if strange := sorted(values.difference(place.map_values, place.ignored)):
            problems.append(
                f"{scene.class_map}: {', '.join(map(str, strange[:5]))} in the map of {scene.path.name} is no class, "
                f"expected values of {len(place.classes)} classes or {max(place.ignored)}; these pixels are ignored"
            )
    if len(chosen) > len(damaged):
        _note_empty_classes(present, place, len(chosen) - len(damaged))
    return [scene for scene in scenes if scene.image_id not in damaged]


def _note_empty_classes(present: set[int], place: _Layout, maps: int) -> None:
    """Name classes without a pixel: nothing can be learned of them, whatever the metric says."""
    empty = [place.classes[label] for value, label in place.map_values.items() if value not in present]
    if not empty:
        return
    of = f"{len(empty)} of {len(place.classes)} classes"
    line = f"{place.maps}: {of} have no pixel in the {maps} class maps looked at: {few(empty)}"
    if IGNORED in present and IGNORED in place.ignored:
        line += f"; {IGNORED} means that no class is known, a class is written as its number"
    note_once(line)


def _values_in(values: NDArray[Any]) -> set[int]:
    # Counting bytes takes a tenth of the time of sorting them.
    present = np.flatnonzero(np.bincount(values.ravel())) if values.dtype == np.uint8 else np.unique(values)
    return set(present.tolist())


def _read_values(path: Path | None) -> NDArray[Any]:
    values = _with_map(path, np.asarray)
    return values.astype(np.uint8) if values.dtype == np.bool_ else values


def _with_map(path: Path | None, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of an opened class map. Raises DataError where it can't be read or has several channels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path or "", formats=imaging.FORMATS) as image:
                mode = image.mode
                if mode in _CHANNELS:
                    return use(image)
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged data
        raise DataError(
            f"{path}: the class map can't be read ({type(error).__name__}), expected a PNG file. Replace it."
        ) from error
    raise DataError(
        f"{path}: the class map has mode {mode}, expected one channel with the value of a class in each pixel. "
        "Convert it."
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text in UTF-8"
        raise DataError(f"{path}: {reason}, expected the names of the classes, one a line. Add the file.") from error
