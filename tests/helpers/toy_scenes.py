"""Pictures, class maps and COCO entries that the tests of annotated pictures build their toy sets from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

NOSE = ["nose", "left_eye", "right_eye"]


def picture(path: Path, height: int = 40, width: int = 60) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (90, 120, 60)).save(path)
    return path


def class_map(path: Path, values: Any, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    (image.convert(mode) if mode else image).save(path)
    return path


def annotation(number: int = 1, **changes: Any) -> dict[str, Any]:
    entry = {"id": number, "image_id": 7, "category_id": 20, "bbox": [10, 5, 20, 30], "area": 600, "iscrowd": 0,
             "segmentation": [[10, 5, 30, 5, 30, 35, 10, 35]], "keypoints": [12, 8, 2, 0, 0, 0, 29, 30, 1]}  # fmt: skip
    return {**entry, **changes}


def document(*annotations: Any, **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": list(annotations),
        "categories": [
            {"id": 20, "name": "cat", "keypoints": NOSE, "skeleton": [[1, 2], [1, 3]]},
            {"id": 3, "name": "dog"},
        ],
        **changes,
    }
