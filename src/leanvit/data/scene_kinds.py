"""The kinds of samples that tasks learn: boxes, masks, class maps, keypoints. A new kind is one value of SampleKind."""

from __future__ import annotations

from functools import partial

from leanvit.annotations import Scene
from leanvit.data.scene_samples import (
    Pictures,
    SampleKind,
    Size,
    no_crowds,
    read_class_map,
    read_keypoints,
    read_objects,
    with_masks,
)
from leanvit.errors import DataError
from leanvit.progress import note
from leanvit.runtime.decode import pose_region
from leanvit.runtime.inputs import Place
from leanvit.runtime.letterbox import place


def every_scene(pictures: Pictures) -> range:
    """A sample is a whole picture."""
    return range(len(pictures.scene_set.scenes))


def of_picture(pictures: Pictures, index: int, size: Size) -> Place:
    """Where a letterboxed picture lies."""
    return Place(index, place(pictures.scene_set.scenes[index].size, size))


def _of_object(pictures: Pictures, index: int, size: Size) -> Place:
    scene, instance = pictures.objects[index]
    box = pictures.scene_set.scenes[scene].instances[instance].box
    return Place(scene, region=pose_region(box, size[1] / size[0]), instance=instance, box=box)


def every_object(pictures: Pictures) -> list[int]:
    """A sample is an object with keypoints."""
    return [scene for scene, _ in pictures.objects]


def no_check(pictures: Pictures) -> None:
    """Any picture will do."""


def _check_keypoints(pictures: Pictures) -> None:
    if not pictures.objects:
        raise DataError(f"{pictures.scene_set.name}: no object with keypoints, expected some for pose. Annotate them.")


def _check_maps(pictures: Pictures) -> None:
    scene_set = pictures.scene_set
    without = [scene for scene in scene_set.scenes if scene.class_map is None]
    if without:
        raise DataError(
            f"{scene_set.name}: {len(without)} of {len(scene_set.scenes)} pictures have no class map "
            f"(the first is {without[0].path}), expected one for each. Add the maps, or leave the pictures out."
        )


def _check_masks(pictures: Pictures) -> None:
    scene_set = pictures.scene_set
    objects = sum(len(no_crowds(scene)) for scene in scene_set.scenes)
    masks = sum(len(with_masks(scene)) for scene in scene_set.scenes)
    if not masks:
        raise DataError(f"{scene_set.name}: no object with a mask, expected some. Annotate them, or use task detect.")
    if masks < objects:
        note(f"{scene_set.name}: {objects - masks} of {objects} objects have no mask and are left out")


def no_bytes(scene: Scene) -> int:
    """Boxes and keypoints take no memory worth counting."""
    return 0


def _mask_bytes(scene: Scene) -> int:
    return len(with_masks(scene)) * scene.size[0] * scene.size[1] // 8


def _map_bytes(scene: Scene) -> int:
    return scene.size[0] * scene.size[1]


BOXES = SampleKind(every_scene, partial(read_objects, masks=False), of_picture, no_check, no_bytes)
MASKS = SampleKind(every_scene, partial(read_objects, masks=True), of_picture, _check_masks, _mask_bytes)
CLASS_MAPS = SampleKind(every_scene, read_class_map, of_picture, _check_maps, _map_bytes)
KEYPOINTS = SampleKind(every_object, read_keypoints, _of_object, _check_keypoints, no_bytes)
