"""Pose: keypoints of given objects, a crop an object. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Found, KeypointScheme, Outputs, Scene, SceneSet
from leanvit.annotations.metrics import coco_metrics, pck
from leanvit.config import Preprocess, from_dict
from leanvit.errors import DataError
from leanvit.imaging import Pixels
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.decode import Box, crop_region, heatmap_keypoints, pose_region
from leanvit.runtime.inputs import Inputs, Options, Place, region_of
from leanvit.runtime.tasks import objects
from leanvit.runtime.tasks.objects import Batches, each_row

PCK_SHARE = 0.1
"""A keypoint is right within this share of its object's longer side: PCK@0.1, as the animal pose papers report it."""


def inputs(pixels: Pixels, preprocess: Preprocess, options: Options) -> Inputs:
    """A crop for each of `options.boxes`, or one for the whole picture (height, width, 3) uint8."""
    height, width = pixels.shape[:2]
    boxes: Sequence[Box] = [(0.0, 0.0, float(width), float(height))] if options.boxes is None else options.boxes
    size = preprocess.input_size
    regions = [pose_region(box, size[1] / size[0]) for box in boxes]
    images = np.empty((len(boxes), *size, 3), np.uint8)
    for image, region in zip(images, regions, strict=True):
        image[:] = crop_region(pixels, region, size)
    pairs = zip(regions, boxes, strict=True)
    places = tuple(Place(region=region, instance=i, box=box) for i, (region, box) in enumerate(pairs))
    return Inputs(images, places, (height, width))


def given(scene: Scene) -> list[int]:
    """Indices of the scene's objects that are measured: those with an annotated keypoint, no crowds."""
    return [
        number
        for number, one in enumerate(scene.instances)
        if not one.crowd and one.keypoints is not None and bool((one.keypoints[:, 2] > 0).any())
    ]


def decode(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> list[Found]:
    """An object with keypoints (K, 3) of x, y in the picture and score, for each box that was given."""
    found = []
    for row, place in enumerate(inputs.places):
        region = region_of(place)
        keypoints = heatmap_keypoints(outputs["heatmaps"][row], region)
        found.append(Found(0, float(keypoints[:, 2].mean()), place.box or region, keypoints=keypoints))
    return found


def scheme_of(manifest: Manifest) -> KeypointScheme | None:
    """What the keypoints of a bundle are."""
    values = manifest.answers.get("keypoints")
    return from_dict(KeypointScheme, values, "bundle.json") if values else None


def line(found: list[Found], manifest: Manifest) -> dict[str, Any]:
    """What a JSON line says of one picture; a pose network does not tell classes apart."""
    plain = [objects.plain(one, manifest.labels) for one in found]
    return {"objects": [{key: value for key, value in one.items() if key != "label"} for one in plain]}


def text(found: list[Found], manifest: Manifest) -> str:
    """One picture in words."""
    return f"{len(found)} object{'s' if len(found) > 1 else ''}" if found else "nothing"


COLUMNS = ("object", "score", "keypoint", "x", "y", "keypoint_score")


def rows(found: list[Found], manifest: Manifest) -> list[list[Any]]:
    """One picture as rows of a table: one a keypoint, in the order of COLUMNS; objects count from 0."""
    scheme = scheme_of(manifest)
    table: list[list[Any]] = []
    for number, one in enumerate(found):
        points: NDArray[Any] = np.zeros((0, 3)) if one.keypoints is None else one.keypoints
        names = scheme.names if scheme else [str(k) for k in range(len(points))]
        for name, (x, y, score) in zip(names, points.tolist(), strict=True):
            table.append([number, f"{one.score:.5f}", name, f"{x:.3f}", f"{y:.3f}", f"{score:.3f}"])
    return table


def draw(pixels: Pixels, found: list[Found], manifest: Manifest) -> dict[str, Pixels]:
    """The picture (height, width, 3) uint8 with boxes, keypoints and skeletons."""
    from leanvit.runtime.draw import draw_found

    return {"drawn": draw_found(pixels, found, ("object",) * len(manifest.labels), scheme_of(manifest))}


def measure(data: SceneSet, batches: Batches) -> dict[str, Any]:
    """Share of correct keypoints and COCO metrics of keypoints, `pck@0.1` among them, each 0 to 1.

    Raises DataError where no object has keypoints.
    """
    truths, outputs_of, sizes = [], [], []
    found: dict[int, list[Found]] = {scene.image_id: [] for scene in data.scenes}
    for outputs, row, place in each_row(batches):
        scene = data.scenes[place.index]
        instance = scene.instances[place.instance]
        if instance.keypoints is None:
            continue
        keypoints = heatmap_keypoints(outputs["heatmaps"][row], region_of(place))
        truths.append(instance.keypoints)
        outputs_of.append(keypoints)
        sizes.append(max(instance.box[2] - instance.box[0], instance.box[3] - instance.box[1]))
        score = float(keypoints[:, 2].mean())
        found[scene.image_id].append(Found(instance.label, score, instance.box, keypoints=keypoints))
    if not truths:
        raise DataError(f"{data.name}: no object with keypoints, expected some. Give annotations with keypoints.")
    share = pck(np.stack(truths), np.stack(outputs_of), np.asarray(sizes), PCK_SHARE)
    oks = {f"oks_{key}": value for key, value in coco_metrics(data, found, "keypoints").items()}
    return {"pck@0.1": share["pck"], "pck_per_keypoint": share["per_keypoint"], **oks, "objects": len(truths)}
