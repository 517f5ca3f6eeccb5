"""What a user names as data of a task becomes annotated pictures: composed folders, COCO, YOLO, ADE20K, Cityscapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from leanvit.annotations.checks import OnProblem, is_remark, settle
from leanvit.annotations.coco import read_document, scenes_of_document
from leanvit.annotations.maps import read_class_names, read_maps
from leanvit.annotations.types import Scene, SceneSet
from leanvit.annotations.yolo import read_yolo
from leanvit.errors import DataError
from leanvit.image_paths import real_path
from leanvit.passed_over import left_out, note_once

Task = Literal["detect", "segment", "semantic", "pose"]
SceneSplit = Literal["train", "val"]
_COMPOSE = "Or make practice data: leanvit data compose"


def load_scenes(
    spec: str | Path, split: SceneSplit, *, task: Task = "detect", on_problem: OnProblem = "skip"
) -> SceneSet:
    """The annotated pictures of one split, from a folder or a YOLO data.yaml.

    task 'semantic' reads class maps: images/{train,val} and masks/{train,val} with classes.txt, ADE20K's or
    Cityscapes' folders (see `read_maps`); labels are then those of the maps, and scenes have no instances.
    The others read objects, in this order: FOLDER/{train,val}.json in COCO's form with the pictures in images/SPLIT,
    SPLIT, images or FOLDER itself; COCO's annotations/instances_SPLIT2017.json (person_keypoints_SPLIT2017.json for
    'pose') with SPLIT2017/ or images/SPLIT2017/, 2017 or another ending; data.yaml of YOLO. Beside {train,val}.json,
    masks/SPLIT/STEM.png are taken as class maps, with map_values for the lines of classes.txt, which are another list
    than the classes of the objects.

    'segment' leaves out objects without a mask and names them. on_problem: as in `read_coco`. Raises DataError where
    nothing of this is there, where no picture is left, or where the annotations have not what the task needs.
    """
    root = Path(spec)
    if not root.exists():
        raise DataError(f"{spec}: no such file or folder, expected annotated pictures. Check the path. {_COMPOSE}")
    if task == "semantic":
        return _semantic(root, split, on_problem)
    scene_set = _for_task(_objects(root, split, task, on_problem), task, on_problem)
    if not scene_set.scenes:
        first = f" First problem: {scene_set.problems[0]}." if scene_set.problems else ""
        raise DataError(f"{scene_set.name}: no picture is left, expected at least one.{first} Correct the annotations.")
    return scene_set


def _semantic(root: Path, split: SceneSplit, on_problem: OnProblem) -> SceneSet:
    if not root.is_dir():
        raise DataError(
            f"{root}: a file, expected a folder with class maps, which semantic segmentation learns from. Give the "
            f"folder with images/ and masks/. {_COMPOSE}"
        )
    return read_maps(root, split, on_problem=on_problem)


def _objects(root: Path, split: SceneSplit, task: Task, on_problem: OnProblem) -> SceneSet:
    if root.is_file():
        if root.suffix not in (".yaml", ".yml"):
            raise DataError(f"{root}: expected a folder, or a data.yaml of YOLO. Give the folder of the file.")
        return read_yolo(root, split, on_problem)
    if (root / "train.json").is_file() or (root / "val.json").is_file():
        return _composed(root, split, on_problem)
    if (root / "annotations").is_dir() and any((root / "annotations").glob("*.json")):
        return _coco_layout(root, split, "person_keypoints" if task == "pose" else "instances", on_problem)
    if (root / "data.yaml").is_file():
        return read_yolo(root / "data.yaml", split, on_problem)
    raise DataError(
        f"{root}: no annotations found, expected {split}.json, annotations/instances_{split}2017.json or data.yaml. "
        f"Check the folder. {_COMPOSE}"
    )


def _composed(root: Path, split: SceneSplit, on_problem: OnProblem) -> SceneSet:
    path = root / f"{split}.json"
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected the annotations of '{split}' in COCO's form. {_COMPOSE}")
    document = read_document(path)
    folder = _pictures_folder(document, path, [root / "images" / split, root / split, root / "images", root])
    scene_set = scenes_of_document(document, path, folder, on_problem)
    if not (root / "classes.txt").is_file():
        return scene_set
    values = {value: value for value in range(len(read_class_names(root / "classes.txt")))}
    scenes = tuple(_with_map(scene, root / "masks" / split) for scene in scene_set.scenes)
    return replace(scene_set, scenes=scenes, map_values=values)


def _with_map(scene: Scene, folder: Path) -> Scene:
    path = folder / f"{scene.path.stem}.png"
    return replace(scene, class_map=path if path.is_file() else None)


def _pictures_folder(document: dict[str, Any], path: Path, folders: Sequence[Path]) -> Path:
    """The first of `folders` that holds a picture of the file, one of the first hundred."""
    entries = [entry for entry in document["images"][:100] if isinstance(entry, dict)]
    names = [str(entry["file_name"]) for entry in entries if entry.get("file_name")]
    for folder in folders:
        if any(real_path(folder, name).is_file() for name in names):
            return folder
    looked = ", ".join(str(folder) for folder in folders)
    raise DataError(
        f"{path}: its pictures are not there, expected e.g. '{names[0] if names else 'file_name'}' in one of {looked}. "
        f"Move them there. {_COMPOSE}"
    )


def _coco_layout(root: Path, split: SceneSplit, kind: str, on_problem: OnProblem) -> SceneSet:
    start = f"{kind}_{split}"
    files = sorted((root / "annotations").glob(f"{start}*.json"))
    path = next((file for file in files if file.stem == f"{start}2017"), files[0] if len(files) == 1 else None)
    if path is None:
        found = ", ".join(file.name for file in files) or "none"
        raise DataError(
            f"{root / 'annotations'}: {found} of {start}*.json found, expected {start}2017.json or one other. "
            "Download COCO's annotations, or keep one file."
        )
    name = path.stem.removeprefix(f"{kind}_")
    document = read_document(path)
    folder = _pictures_folder(document, path, [root / name, root / "images" / name, root / split, root / "images"])
    return scenes_of_document(document, path, folder, on_problem)


def _for_task(scene_set: SceneSet, task: Task, on_problem: OnProblem) -> SceneSet:
    if task == "pose" and scene_set.keypoints is None:
        raise DataError(
            f"{scene_set.name}: no category has keypoints, expected their names in the file, because the task is "
            "pose. Add 'keypoints' to the categories (kpt_shape to data.yaml)."
        )
    return _with_masks(scene_set, on_problem) if task == "segment" else scene_set


def _with_masks(scene_set: SceneSet, on_problem: OnProblem) -> SceneSet:
    """Only the objects that have a mask. Raises DataError where none has."""
    problems: list[str] = []
    scenes = []
    for scene in scene_set.scenes:
        kept = tuple(instance for instance in scene.instances if instance.segmentation is not None)
        if without := len(scene.instances) - len(kept):
            problems.append(f"{scene_set.name}: {without} objects of {scene.path.name} without a mask; left out")
        scenes.append(replace(scene, instances=kept))
    if problems and not any(scene.instances for scene in scenes):
        raise DataError(
            f"{scene_set.name}: no object has a mask, expected polygons or run lengths, because the task is segment. "
            "Add 'segmentation', or choose the task detect."
        )
    return replace(scene_set, scenes=tuple(scenes), problems=scene_set.problems + settle(problems, on_problem))


def note_problems(scenes: SceneSet, shown: int = 20) -> None:
    """Name the annotations and pictures that were left out, the first ones each, and count them."""
    for problem in scenes.problems[:shown]:
        note_once(f"{'' if is_remark(problem) else 'left out: '}{problem}")
    if len(scenes.problems) > shown:
        note_once(
            f"left out: {len(scenes.problems) - shown} more of {scenes.name}; leanvit data inspect names them all"
        )
    count_problems(scenes.problems)


def count_problems(problems: Sequence[str]) -> None:
    """Count those by which something is lost in the exit code; they are said elsewhere."""
    left_out([problem for problem in problems if not is_remark(problem)], "annotations", said=True)


def require_classes(labels: tuple[str, ...], scenes: SceneSet) -> None:
    """Raise DataError where a split has other classes than a network, or in another order."""
    if scenes.classes != labels:
        raise DataError(
            f"{scenes.name} has classes {', '.join(scenes.classes[:4])}... ({len(scenes.classes)}), the network has "
            f"{', '.join(labels[:4])}... ({len(labels)}), expected the same in the same order."
        )
