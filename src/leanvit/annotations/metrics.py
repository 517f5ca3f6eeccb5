"""Metrics of detection, segmentation and pose. No torch; faster-coco-eval for the COCO ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations.masks import encode_mask
from leanvit.annotations.types import IGNORED, ClassMap, Found, Instance, KeypointScheme, Scene, SceneSet
from leanvit.errors import ConfigError, DataError, NumericalError, require

Kind = Literal["bbox", "segm", "keypoints"]
Floats = NDArray[np.float64]

# --- objects ---


def coco_metrics(scene_set: SceneSet, found: Mapping[int, Sequence[Found]], kind: Kind) -> dict[str, Any]:
    """COCO metrics of what was found in a whole set: `CocoScores` for results that fit in memory.

    found: {image_id: objects}; a picture that is absent has none. Returns and raises as `CocoScores` does.
    """
    scores = CocoScores(scene_set, kind)
    for image_id, objects in found.items():
        scores.update(image_id, objects)
    return scores.result()


@dataclass
class CocoScores:
    """COCO metrics of boxes, masks or keypoints, filled picture by picture; masks are held as run lengths only.

    Crowds, and objects without a keypoint for "keypoints", count neither as missed nor as found. At most 100 objects
    a picture and class are counted, 20 for "keypoints".
    Raises ConfigError where "keypoints" is asked for and the set has none.
    Source: cocoeval.py of pycocotools, https://cocodataset.org/#detection-eval.
    """

    scene_set: SceneSet
    kind: Kind
    _results: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False)
    _left: dict[int, Scene] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Check what can't be counted before the first picture is."""
        if self.kind == "keypoints" and self.scene_set.keypoints is None:
            raise ConfigError(f"{self.scene_set.name}: no keypoints in this set, expected a scheme. Use bbox or segm.")
        self._left = {scene.image_id: scene for scene in self.scene_set.scenes}

    def update(self, image_id: int, found: Sequence[Found]) -> None:
        """Add the objects found in one picture.

        Raises DataError for a picture that is not in the set or was added before, an unknown label, a mask of
        another size than the picture and a missing mask or keypoints; NumericalError for values that are not finite.
        """
        scene = self._left.pop(image_id, None)
        if scene is None:
            raise DataError(
                f"picture {image_id}: not in {self.scene_set.name}, or added twice, expected each picture once. "
                "Use the image ids of the set."
            )
        self._results.extend(self._result_of(scene, one) for one in found)

    def result(self) -> dict[str, Any]:
        """The metrics so far, each 0 to 1, None where the set has nothing to measure it on.

        AP (mean over IoU or OKS 0.50 to 0.95), AP50, AP75; APs, APm, APl (objects below 32^2, to 96^2 and above, in
        pixels); AR100 (AR20 for "keypoints"); per_class: {class: its AP50}.
        Raises DataError where "segm" meets an object without mask, MissingDependencyError without faster-coco-eval.
        """
        coco = require("faster_coco_eval")
        truth = coco.COCO(self._truth())
        scheme = self.scene_set.keypoints
        evaluation = coco.COCOeval_faster(
            truth, truth.loadRes(self._results), self.kind, kpt_oks_sigmas=list(scheme.sigmas) if scheme else None
        )
        # The package leaves out classes without objects for keypoints only; here the place of a class is fixed.
        categories = sorted(self.scene_set.coco_ids)
        evaluation.params.catIds = categories
        evaluation.run()
        return {**_summary(evaluation.stats, self.kind), "per_class": self._per_class(evaluation, categories)}

    def _per_class(self, evaluation: Any, categories: list[int]) -> dict[str, float | None]:
        precision = evaluation.eval["precision"][0, :, :, 0, -1].mean(axis=0)
        place = [categories.index(category) for category in self.scene_set.coco_ids]
        return {name: _known(precision[k]) for name, k in zip(self.scene_set.classes, place, strict=True)}

    def _truth(self) -> dict[str, Any]:
        categories = self.scene_set.coco_ids
        pairs = [(scene, instance) for scene in self.scene_set.scenes for instance in scene.instances]
        return {
            "images": [{"id": s.image_id, "height": s.size[0], "width": s.size[1]} for s in self.scene_set.scenes],
            "categories": [
                {"id": id, "name": name} for id, name in zip(categories, self.scene_set.classes, strict=True)
            ],
            "annotations": [
                {"id": number, "category_id": categories[instance.label], **self._object(scene, instance)}
                for number, (scene, instance) in enumerate(pairs, start=1)  # 0 means "not matched"
            ],
        }

    def _object(self, scene: Scene, instance: Instance) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "image_id": scene.image_id,
            "bbox": _corner_and_sides(instance.box),
            "area": instance.area,
            "iscrowd": int(instance.crowd),
        }
        if self.kind == "segm":
            if instance.segmentation is None:
                raise DataError(
                    f"{scene.path}: an object without mask, expected one for each object. Add them or use bbox."
                )
            entry["segmentation"] = instance.segmentation
        if self.kind == "keypoints" and self.scene_set.keypoints:
            points = instance.keypoints
            if points is None:
                points = np.zeros((len(self.scene_set.keypoints.names), 3), np.float32)
            entry["keypoints"] = points.astype(np.float64).ravel().tolist()
            entry["num_keypoints"] = int((points[:, 2] > 0).sum())
        return entry

    def _result_of(self, scene: Scene, one: Found) -> dict[str, Any]:
        _check_found(scene, one, len(self.scene_set.classes))
        entry: dict[str, Any] = {
            "image_id": scene.image_id,
            "category_id": self.scene_set.coco_ids[one.label],
            "score": one.score,
        }
        if self.kind == "bbox":
            return {**entry, "bbox": _corner_and_sides(one.box)}
        if self.kind == "segm":
            return {**entry, "segmentation": _run_lengths(scene, one)}
        return {**entry, "keypoints": _flat_keypoints(scene, one, self.scene_set.keypoints)}


def _corner_and_sides(box: tuple[float, float, float, float]) -> list[float]:
    x1, y1, x2, y2 = (float(value) for value in box)
    return [x1, y1, x2 - x1, y2 - y1]


def _check_found(scene: Scene, one: Found, classes: int) -> None:
    if not 0 <= one.label < classes:
        raise DataError(f"{scene.path}: label {one.label} found, expected 0 to {classes - 1}. Use this set's classes.")
    if not np.isfinite((one.score, *one.box)).all():
        raise NumericalError(
            f"{scene.path}: score {one.score} or box {one.box} is not finite. Check the network's outputs."
        )


def _run_lengths(scene: Scene, one: Found) -> dict[str, Any]:
    shape = None if one.mask is None else one.mask.shape
    if one.mask is None or shape != scene.size:
        raise DataError(f"{scene.path}: mask of shape {shape} found, expected {scene.size}. Use the picture's size.")
    return encode_mask(one.mask)


def _flat_keypoints(scene: Scene, one: Found, scheme: KeypointScheme | None) -> list[float]:
    wanted = (len(scheme.names) if scheme else 0, 3)
    shape = None if one.keypoints is None else one.keypoints.shape
    if one.keypoints is None or shape != wanted:
        raise DataError(f"{scene.path}: keypoints of shape {shape} found, expected {wanted}. Use this set's scheme.")
    if not np.isfinite(one.keypoints).all():
        raise NumericalError(f"{scene.path}: keypoints are not finite. Check the network's outputs.")
    flat: list[float] = one.keypoints.astype(np.float64).ravel().tolist()
    return flat


def _summary(stats: Sequence[float], kind: Kind) -> dict[str, float | None]:
    values = [_known(value) for value in stats]
    named = dict(zip(("AP", "AP50", "AP75"), values[:3], strict=True))
    if kind == "keypoints":  # COCO has no small objects with keypoints
        return {**named, "APs": None, "APm": values[3], "APl": values[4], "AR20": values[5]}
    return {**named, "APs": values[3], "APm": values[4], "APl": values[5], "AR100": values[8]}


def _known(value: float) -> float | None:
    return float(value) if value > -1 else None


# --- class maps ---


@dataclass
class SegmentationScores:
    """Metrics of class maps, filled picture by picture; pixels whose truth is IGNORED are left out.

    confusion: (num_classes, num_classes + 1) int64, pixels of a true class (row) by the class found (column); the
    last column counts pixels for which no class was found.
    """

    num_classes: int
    confusion: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        """Start with no pixels."""
        self.confusion = np.zeros((self.num_classes, self.num_classes + 1), np.int64)

    def update(self, truth: ClassMap, found: ClassMap) -> None:
        """Add one picture: both (height, width) uint8. A value of `found` that is no class counts as wrong.

        Raises DataError where the sizes differ or `truth` has a value that is neither a class nor IGNORED.
        """
        if truth.shape != found.shape:
            raise DataError(f"class map of shape {found.shape} found, expected {truth.shape}. Use the picture's size.")
        known = truth != IGNORED
        rows, columns = truth[known].astype(np.int64), np.minimum(found[known].astype(np.int64), self.num_classes)
        if rows.max(initial=0) >= self.num_classes:
            raise DataError(
                f"value {rows.max()} in a class map, expected 0 to {self.num_classes - 1} or {IGNORED} where unknown. "
                "Map the file's values to labels."
            )
        places = rows * (self.num_classes + 1) + columns
        self.confusion += np.bincount(places, minlength=self.confusion.size).reshape(self.confusion.shape)

    def result(self) -> dict[str, Any]:
        """The metrics so far, each 0 to 1, None where there is no pixel to measure it on.

        miou: mean of the known per_class. per_class: intersection over union of each class, None for one that is
        neither true nor found anywhere. pixel_accuracy: share of pixels. mean_accuracy: mean over the true classes.
        """
        right = np.diagonal(self.confusion).astype(np.float64)
        true, found = self.confusion.sum(axis=1), self.confusion[:, :-1].sum(axis=0)
        union = true + found - right
        shares = _ratio(right, union)
        return {
            "miou": _mean(shares),
            "pixel_accuracy": float(right.sum() / true.sum()) if true.sum() else None,
            "mean_accuracy": _mean(_ratio(right, true)),
            "per_class": shares,
        }


def _ratio(parts: NDArray[Any], wholes: NDArray[Any]) -> list[float | None]:
    return [float(part / whole) if whole else None for part, whole in zip(parts, wholes, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- keypoints ---


def pck(
    truth: NDArray[Any], found: NDArray[Any], sizes: NDArray[Any], alpha: float = 0.1, hidden: bool = False
) -> dict[str, Any]:
    """Share of correct keypoints: those at most alpha times the object's size away from the truth.

    truth: (N, K, 3) x, y, visibility. found: (N, K, 3) x, y, score; the score is not used. sizes: (N,) pixels, the
    longer side of the object's box. hidden: count keypoints of visibility 1 as well as those of 2.
    Returns pck: share of all counted keypoints, per_keypoint: that of each of the K, mean: mean of those; 0 to 1,
    None where no keypoint is counted.
    Source: Yang and Ramanan, Articulated Human Detection with Flexible Mixtures of Parts, TPAMI 2013.
    """
    counted = truth[:, :, 2] >= (1 if hidden else 2)
    apart = np.linalg.norm(truth[:, :, :2].astype(np.float64) - found[:, :, :2], axis=2)
    right = counted & (apart <= alpha * np.asarray(sizes, np.float64)[:, None])
    each = _ratio(right.sum(axis=0), counted.sum(axis=0))
    return {
        "pck": float(right.sum() / counted.sum()) if counted.any() else None,
        "mean": _mean(each),
        "per_keypoint": each,
    }


def oks(truth: NDArray[Any], found: NDArray[Any], areas: NDArray[Any], sigmas: Sequence[float]) -> Floats:
    """Object keypoint similarity of each object with what was found of it, 0 to 1; NaN where no keypoint is annotated.

    truth: (N, K, 3) x, y, visibility; those above 0 count. found: (N, K, 3) x, y, score. areas: (N,) pixels.
    sigmas: (K,) tolerances as in KeypointScheme. Returns (N,) float64.
    Source: https://cocodataset.org/#keypoints-eval.
    """
    counted = truth[:, :, 2] > 0
    squared = ((truth[:, :, :2].astype(np.float64) - found[:, :, :2]) ** 2).sum(axis=2)
    variances = (2 * np.asarray(sigmas, np.float64)) ** 2
    exponents = squared / variances / (np.asarray(areas, np.float64)[:, None] + np.spacing(1)) / 2
    total = (np.exp(-exponents) * counted).sum(axis=1)
    number = counted.sum(axis=1)
    return np.where(number > 0, total / np.maximum(number, 1), np.nan)
