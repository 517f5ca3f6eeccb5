"""What annotated pictures hold: objects, boxes, keypoints and class maps of each part, and what is wrong."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np

from leanvit import imaging
from leanvit.annotations import IGNORED, Instance, SceneSet
from leanvit.annotations.load import SceneSplit, count_problems, load_scenes
from leanvit.annotations.maps import load_map
from leanvit.config import DataInspectConfig, Task
from leanvit.errors import DataError, require
from leanvit.inspection.annotated_page import render_scenes
from leanvit.inspection.look import Seen, describe, find_copies, look_at, look_at_all
from leanvit.progress import track

MAPS_COUNTED = 500
SPLITS: tuple[SceneSplit, ...] = ("train", "val")
PIXEL_EDGES = (0, 8, 16, 32, 64, 96, 128, 256, 512, 1024)
RELATIVE_EDGES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
# COCO's limits of small, medium and large: https://cocodataset.org/#detection-eval.
_SMALL, _LARGE = 32**2, 96**2
_VISIBILITY = ("absent", "hidden", "visible")


def inspect_scenes(config: DataInspectConfig, result: dict[str, Any]) -> str:
    """Fill in what both parts of annotated pictures hold, and return the page.

    Raises DataError where a part can't be read at all, MissingDependencyError where masks are to be drawn without
    pycocotools.
    """
    task = cast(Any, config.task)
    if task == "segment":
        require("pycocotools")
    parts = {split: load_scenes(config.data, split, task=task) for split in SPLITS}
    seen = {split: look_at_scenes(scenes) for split, scenes in parts.items()}
    first = parts["train"]
    result |= {
        "task": task,
        "classes": list(first.classes),
        "keypoints": list(first.keypoints.names) if first.keypoints and task == "pose" else [],
        "parts": {split: summarize_scenes(scenes, seen[split], task) for split, scenes in parts.items()},
        "duplicates": find_scene_copies(parts, seen),
    }
    if parts["val"].classes != first.classes:
        result["parts"]["val"]["problems"].insert(0, _other_classes(parts["val"], first))
    for part in result["parts"].values():
        count_problems(part["problems"])
    return render_scenes(result, parts, seen, config)


def _other_classes(found: SceneSet, expected: SceneSet) -> str:
    return (
        f"{found.name}: has classes {', '.join(found.classes[:4])}... ({len(found.classes)}), expected those of "
        f"{expected.name} in the same order: {', '.join(expected.classes[:4])}... ({len(expected.classes)})"
    )


def look_at_scenes(scenes: SceneSet) -> list[Seen]:
    """Decode every picture, in order."""

    def look(index: int) -> Seen:
        path = scenes.scenes[index].path
        return look_at(lambda: imaging.read_file(path), str(path))

    return look_at_all(scenes.name, len(scenes.scenes), look)


def summarize_scenes(scenes: SceneSet, seen: list[Seen], task: Task) -> dict[str, Any]:
    """What one part holds, as JSON values.

    objects: without crowds, which no training uses. boxes: how many have which size, the square root of their area, in
    pixels and as a share of that of the picture. problems: every annotation that is broken, one sentence each.
    keypoints: of each keypoint how often it is absent, hidden and visible. pixels: share of each class, of up to 500
    class maps spread over the part. Parts that the task has not are None.
    """
    problems = list(scenes.problems)
    objects = [one for scene in scenes.scenes for one in scene.instances if not one.crowd]
    found = Counter(one.label for one in objects)
    per_picture = Counter(sum(not one.crowd for one in scene.instances) for scene in scenes.scenes)
    has_objects = task != "semantic"
    return {
        "images": len(scenes.scenes),
        "objects": len(objects),
        "crowds": sum(one.crowd for scene in scenes.scenes for one in scene.instances),
        "per_class": {name: found[label] for label, name in enumerate(scenes.classes)},
        "objects_per_picture": {str(count): per_picture[count] for count in sorted(per_picture)},
        "boxes": _boxes(scenes) if has_objects else None,
        "keypoints": _keypoints(scenes, objects) if task == "pose" else None,
        "pixels": None if has_objects else _pixels(scenes, problems),
        "problems": problems,
        **describe(seen, lambda i: str(scenes.scenes[i].path)),
    }


def _boxes(scenes: SceneSet) -> dict[str, Any]:
    sides, shares, areas = [], [], []
    for scene in scenes.scenes:
        for one in scene.instances:
            if not one.crowd:
                area = (one.box[2] - one.box[0]) * (one.box[3] - one.box[1])
                sides.append(math.sqrt(area))
                shares.append(math.sqrt(area / (scene.size[0] * scene.size[1])))
                areas.append(one.area)
    small, large = sum(area < _SMALL for area in areas), sum(area > _LARGE for area in areas)
    return {
        "pixels": _histogram(sides, PIXEL_EDGES),
        "relative": _histogram(shares, RELATIVE_EDGES),
        "small": small,
        "medium": len(areas) - small - large,
        "large": large,
    }


def _histogram(values: Sequence[float], edges: Sequence[float]) -> dict[str, Any]:
    """Counts from each edge to the next; the last one takes all that is larger."""
    counts, _ = np.histogram(values, [*edges, np.inf])
    median = float(np.median(values)) if values else None
    return {"edges": list(edges), "counts": counts.tolist(), "median": median}


def _keypoints(scenes: SceneSet, objects: Sequence[Instance]) -> dict[str, Any]:
    names = scenes.keypoints.names if scenes.keypoints else ()
    known = [one.keypoints[:, 2] for one in objects if one.keypoints is not None]
    table = np.stack(known) if known else np.zeros((0, len(names)))
    counted = {
        name: {word: int((table[:, k] == value).sum()) for value, word in enumerate(_VISIBILITY)}
        for k, name in enumerate(names)
    }
    return {"objects_without": len(objects) - len(known), "visibility": counted}


def _pixels(scenes: SceneSet, problems: list[str]) -> dict[str, Any]:
    step = max(1, -(-len(scenes.scenes) // MAPS_COUNTED))
    chosen = scenes.scenes[::step]
    counts, maps = np.zeros(IGNORED + 1, np.int64), 0
    for scene in track(chosen, f"counting pixels of {scenes.name}", len(chosen)):
        try:
            counts += np.bincount(load_map(scene, scenes).ravel(), minlength=IGNORED + 1)
            maps += 1
        except DataError as error:
            problems.append(str(error))
    whole = max(1, int(counts.sum()))
    shares = {name: float(counts[label] / whole) for label, name in enumerate(scenes.classes)}
    return {"maps": maps, "shares": shares, "ignored": float(counts[IGNORED] / whole)}


def find_scene_copies(parts: Mapping[SceneSplit, SceneSet], seen: Mapping[SceneSplit, list[Seen]]) -> dict[str, Any]:
    """Groups of pictures with the very same pixels, those in both parts first.

    extra: pictures beyond the first of each group. leaks: groups with a picture of each part.
    """
    return find_copies(
        seen,
        lambda split, index: {"image": str(parts[split].scenes[index].path)},
        lambda splits, images: {"leak": len(set(splits)) > 1},
    )
