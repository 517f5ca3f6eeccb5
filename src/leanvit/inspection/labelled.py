"""What labelled images hold: classes, sizes, balance, and what would harm a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from leanvit import imaging
from leanvit.config import DataInspectConfig
from leanvit.data.sets import SPLITS, ImageSet, Split, find_parts, load_split
from leanvit.inspection.labelled_page import render_images
from leanvit.inspection.look import Seen, describe, find_copies, look_at, look_at_all, seen_pixels
from leanvit.passed_over import names_left_out


def inspect_images(config: DataInspectConfig, result: dict[str, Any]) -> str:
    """Fill in what labelled images hold, and return the page. Raises DataError where they can't be found."""
    parts = load_parts(config)
    seen = {split: examine(images) for split, images in parts.items()}
    result |= {
        "classes": list(next(iter(parts.values())).classes),
        "parts": {split: summarize(images, seen[split]) for split, images in parts.items()},
        "balance": balance(parts["train"], seen["train"]),
        "duplicates": find_duplicates(parts, seen),
        "left_out": list(names_left_out()),
    }
    sheet = _readable(parts["train"], seen["train"])
    return render_images(result, sheet, count=config.images_per_class, seed=config.seed)


def load_parts(config: DataInspectConfig) -> dict[Split, ImageSet]:
    """Training and validation images, and the test images where they are others than those that validate."""
    official = find_parts(config.data)
    wanted = [split for split in SPLITS if split != "test" or ("val" in official and "test" in official)]
    return {
        split: load_split(config.data, split, val_fraction=config.val_fraction, seed=config.seed) for split in wanted
    }


def _readable(images: ImageSet, seen: list[Seen]) -> ImageSet:
    return images.subset(np.asarray([i for i, one in enumerate(seen) if not one.problem], np.int64))


def examine(images: ImageSet) -> list[Seen]:
    """Look at every image, in order."""
    return look_at_all(images.name, len(images), lambda i: look(images, i))


def look(images: ImageSet, index: int) -> Seen:
    """Decode one image."""
    source = images.sources[index]
    if isinstance(source, np.ndarray):
        return seen_pixels(imaging.Decoded(source), "array", "RGB")
    return look_at(lambda: images.encoded(index), images.name_of(index))


def summarize(images: ImageSet, seen: list[Seen]) -> dict[str, Any]:
    """Counts, sizes, kinds and unreadable images of one part, as JSON values."""
    counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    return {
        "images": len(images),
        "per_class": dict(zip(images.classes, counts, strict=True)),
        **describe(seen, images.name_of),
    }


def balance(images: ImageSet, seen: list[Seen]) -> dict[str, Any]:
    """How evenly the readable training images are spread over the classes, and weights that make up for it.

    ratio: images of the largest class for one of the smallest; None where one has none. weights: readable images /
    (classes * images of the class), the 'balanced' ones of scikit-learn: the mean weight of an image is 1.
    """
    good = np.asarray([not one.problem for one in seen], bool)
    counts = np.bincount(images.labels[good], minlength=len(images.classes))
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    weights = [float(counts.sum() / (len(counts) * count)) if count else None for count in counts]
    return {
        "largest": {"class": images.classes[largest], "images": int(counts[largest])},
        "smallest": {"class": images.classes[smallest], "images": int(counts[smallest])},
        "ratio": float(counts[largest] / counts[smallest]) if counts[smallest] else None,
        "weights": dict(zip(images.classes, weights, strict=True)),
    }


def find_duplicates(parts: Mapping[Split, ImageSet], seen: Mapping[Split, list[Seen]]) -> dict[str, Any]:
    """Groups of images with the very same pixels, those that leak from training into another part first.

    extra: images beyond the first of each group. leaks: groups with a training image and one of another part.
    contradictions: groups whose images have different classes.
    """

    def image(split: Split, index: int) -> dict[str, Any]:
        images = parts[split]
        return {"image": images.name_of(index), "class": images.classes[images.labels[index]]}

    def judge(splits: list[Split], images: list[dict[str, Any]]) -> dict[str, Any]:
        classes = {one["class"] for one in images}
        return {"leak": "train" in splits and len(set(splits)) > 1, "contradiction": len(classes) > 1}

    found = find_copies(seen, image, judge)
    return found | {"contradictions": sum(group["contradiction"] for group in found["groups"])}
