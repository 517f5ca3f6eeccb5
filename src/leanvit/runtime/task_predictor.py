"""TaskPredictor: detect, segment or estimate poses with a bundle. Needs onnxruntime, NumPy and Pillow; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leanvit import imaging
from leanvit.annotations import ClassMap, Found, KeypointScheme, Outputs
from leanvit.config import Runtime, from_dict
from leanvit.errors import BundleError, ConfigError, VerificationError
from leanvit.runtime.answers import METRICS, decode_map, decode_objects, decode_pose
from leanvit.runtime.bundle import MODEL_NAME, load_golden, load_golden_records, read_manifest
from leanvit.runtime.decode import Box, crop_region, pose_region
from leanvit.runtime.engines import open_engine
from leanvit.runtime.letterbox import place
from leanvit.runtime.predictor import run_prepared
from leanvit.runtime.task_golden import MATCHED_SHARE, golden_values, matched_share, worst_sqnr_db

SCORE_THRESHOLD = 0.5


class TaskPredictor:
    """A bundle of a task, loaded and checked.

    manifest: what bundle.json says. labels: class names. keypoints: of a pose network, else None.
    """

    def __init__(
        self, bundle: str | Path, *, threads: int = 0, runtime: Runtime = "onnxruntime", check: bool = True
    ) -> None:
        """Load a bundle folder; threads 0: all cores. check: also run two golden pictures and compare.

        Raises BundleError, VerificationError, ConfigError, MissingDependencyError.
        """
        self.folder = Path(bundle)
        self.manifest = read_manifest(self.folder)
        if self.manifest.task == "classify":
            raise BundleError(f"{self.folder} is a classifier, expected another task. Use leanvit.Predictor.")
        if self.manifest.task not in METRICS:
            raise BundleError(
                f"{self.folder} is for task '{self.manifest.task}', expected {', '.join(METRICS)}. Update leanvit."
            )
        self.labels, self.runtime = self.manifest.labels, runtime
        scheme = self.manifest.answers.get("keypoints")
        self.keypoints = from_dict(KeypointScheme, scheme, str(self.folder)) if scheme else None
        self._engine = open_engine(self.folder / MODEL_NAME, runtime, threads)
        if check:
            self._check_golden(2)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return self.manifest.preprocess.input_size

    @property
    def minimum_sqnr_db(self) -> float:
        """Least ratio of golden values to their error in this runtime, in dB."""
        return self.manifest.runtimes.get(self.runtime, self.manifest.minimum_sqnr_db)

    @property
    def minimum_share(self) -> float:
        """Least share of the objects in golden pictures that must be found again."""
        return float(self.manifest.answers.get("matched_share", MATCHED_SHARE))

    def _check_golden(self, count: int) -> None:
        images, expected = load_golden(self.folder)
        outputs = self.outputs(np.stack([self.prepare(image, "golden picture") for image in images[:count]]))
        found = worst_sqnr_db(expected[:count], golden_values(outputs, self.manifest.task))
        if found < self.minimum_sqnr_db:
            raise VerificationError(
                f"{self.folder}: a golden picture gives {found:.1f} dB in {self.runtime} on this machine, expected at "
                f"least {self.minimum_sqnr_db:.0f} dB. Run: leanvit verify {self.folder}"
            )
        share = matched_share(outputs, load_golden_records(self.folder), count)
        if share is not None and share < self.minimum_share:
            raise VerificationError(
                f"{self.folder}: {share:.0%} of the objects in golden pictures are found again in {self.runtime}, "
                f"expected {self.minimum_share:.0%}. Run: leanvit verify {self.folder}"
            )

    def prepare(self, source: str | Path | bytes, name: str | None = None) -> imaging.Pixels:
        """Decode one picture and bring it to the input size as in training: (H, W, 3) uint8. Raises ImageError."""
        return imaging.load(source, self.manifest.preprocess, name)

    def outputs(self, images: imaging.Pixels) -> Outputs:
        """Raw outputs by name for prepared pictures (N, H, W, 3) uint8; shapes: leanvit.annotations.types.Outputs.

        Raises ConfigError for another shape or dtype, BundleError where the graph does not run.
        """
        return run_prepared(self._engine.outputs, images, self.folder, self.size)

    def objects(
        self, pixels: imaging.Pixels, score_threshold: float = SCORE_THRESHOLD, boxes: Sequence[Box] | None = None
    ) -> list[Found]:
        """Objects in one decoded picture (height, width, 3) uint8, best first; tasks detect, segment and pose.

        boxes: (x1, y1, x2, y2) of the objects whose keypoints are wanted (pose); None: the whole picture is one.
        Raises ConfigError for a network of class maps.
        """
        if self.manifest.task == "semantic":
            raise ConfigError(f"{self.folder} gives class maps, expected objects. Use TaskPredictor.class_map.")
        if self.manifest.task == "pose":
            return self._poses(pixels, boxes)
        size = pixels.shape[0], pixels.shape[1]
        outputs = self.outputs(self._whole(pixels)[None])
        return decode_objects(outputs, 0, place(size, self.size), size, score_threshold)

    def class_map(self, pixels: imaging.Pixels) -> ClassMap:
        """Class of every pixel of one decoded picture: (height, width) uint8; task semantic."""
        if self.manifest.task != "semantic":
            raise ConfigError(f"{self.folder} gives objects, expected class maps. Use TaskPredictor.objects.")
        size = pixels.shape[0], pixels.shape[1]
        return decode_map(self.outputs(self._whole(pixels)[None]), 0, place(size, self.size), size)

    def _whole(self, pixels: imaging.Pixels) -> imaging.Pixels:
        return imaging.resize(pixels, self.manifest.preprocess)

    def _poses(self, pixels: imaging.Pixels, boxes: Sequence[Box] | None) -> list[Found]:
        height, width = pixels.shape[:2]
        given: Sequence[Box] = [(0.0, 0.0, float(width), float(height))] if boxes is None else boxes
        if not given:
            return []
        regions = [pose_region(box, self.size[1] / self.size[0]) for box in given]
        outputs = self.outputs(np.stack([crop_region(pixels, region, self.size) for region in regions]))
        found = []
        for row, (box, region) in enumerate(zip(given, regions, strict=True)):
            keypoints = decode_pose(outputs, row, region)
            found.append(Found(0, float(keypoints[:, 2].mean()), box, keypoints=keypoints))
        return found


def plain(found: Found, labels: tuple[str, ...], task: str) -> dict[str, Any]:
    """One object as JSON values: label, score, box, and what else the task gives."""
    values: dict[str, Any] = {"label": labels[found.label], "score": round(found.score, 5)}
    values["box"] = [round(value, 2) for value in found.box]
    if found.mask is not None:
        from leanvit.annotations.masks import encode_mask

        values["segmentation"] = encode_mask(found.mask)
    if found.keypoints is not None:
        values["keypoints"] = np.round(found.keypoints.astype(np.float64), 3).tolist()
        if task == "pose":
            del values["label"]
    return values
