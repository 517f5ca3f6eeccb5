"""`leanvit data inspect`: what a data set holds, and what would harm a training on it, before the training."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from leanvit._version import __version__
from leanvit.config import DataInspectConfig, save_yaml
from leanvit.data.sets import SPLITS, ImageSet, Split, find_parts, load_split
from leanvit.errors import PartialError
from leanvit.files import only_writer, write_atomic, write_json
from leanvit.inspection.annotated import inspect_scenes
from leanvit.inspection.annotated_page import PROBLEMS_SHOWN
from leanvit.inspection.examine import Seen, balance, examine, find_duplicates, summarize
from leanvit.inspection.page import render

__all__ = ["PAGE_NAME", "PROBLEMS_SHOWN", "RESULT_NAME", "require_readable", "run"]

RESULT_NAME = "inspect.json"
PAGE_NAME = "inspect.html"


def run(config: DataInspectConfig) -> dict[str, Any]:
    """Decode every image once; write inspect.json and the page with the contact sheet, and return what the JSON holds.

    Raises DataError where the data can't be found, RunLockedError where another process writes to the folder,
    MissingDependencyError where masks are to be drawn without pycocotools. Images that can't be read, and annotations
    that are broken, are part of the result.
    """
    folder = Path(config.output)
    with only_writer(folder):
        result: dict[str, Any] = {
            "data": config.data,
            "leanvit": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        page = _inspect_images(config, result) if config.task == "classify" else inspect_scenes(config, result)
        save_yaml(config, folder / "config.yaml")
        write_json(folder / RESULT_NAME, result)
        # A file name need not be UTF-8.
        write_atomic(folder / PAGE_NAME, page.encode("utf-8", "replace"))
    return result


def _inspect_images(config: DataInspectConfig, result: dict[str, Any]) -> str:
    """Fill in what labelled images hold, and return the page."""
    parts = load_parts(config)
    seen = {split: examine(images) for split, images in parts.items()}
    result |= {
        "classes": list(next(iter(parts.values())).classes),
        "parts": {split: summarize(images, seen[split]) for split, images in parts.items()},
        "balance": balance(parts["train"], seen["train"]),
        "duplicates": find_duplicates(parts, seen),
    }
    sheet = _readable(parts["train"], seen["train"])
    return render(result, sheet, count=config.images_per_class, seed=config.seed)


def require_readable(result: dict[str, Any]) -> None:
    """Raise PartialError naming the images that can't be read, where there are some; the result is written then."""
    corrupt = [one["image"] for part in result["parts"].values() for one in part["corrupt"]]
    if corrupt:
        named = ", ".join(corrupt[:3]) + (f" and {len(corrupt) - 3} more" if len(corrupt) > 3 else "")
        total = sum(part["images"] for part in result["parts"].values())
        raise PartialError(
            f"{len(corrupt)} of {total} images can't be read: {named}; all others were looked at. "
            "Replace or remove them, or train with --bad-images skip."
        )


def load_parts(config: DataInspectConfig) -> dict[Split, ImageSet]:
    """Training and validation images, and the test images where they are others than those that validate."""
    official = find_parts(config.data)
    wanted = [split for split in SPLITS if split != "test" or ("val" in official and "test" in official)]
    return {
        split: load_split(config.data, split, val_fraction=config.val_fraction, seed=config.seed) for split in wanted
    }


def _readable(images: ImageSet, seen: list[Seen]) -> ImageSet:
    return images.subset(np.asarray([i for i, one in enumerate(seen) if not one.problem], np.int64))
