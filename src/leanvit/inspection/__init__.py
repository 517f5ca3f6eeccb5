"""`leanvit data inspect`: what a data set holds, and what would harm a training on it, before the training."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from leanvit._version import __version__
from leanvit.config import DataInspectConfig, save_yaml
from leanvit.datasets import SPLITS, ImageSet, Split, find_parts, load_split
from leanvit.files import only_writer, write_atomic, write_json
from leanvit.inspection.examine import Seen, balance, examine, find_duplicates, summarize
from leanvit.inspection.page import render

__all__ = ["PAGE_NAME", "RESULT_NAME", "run"]

RESULT_NAME = "inspect.json"
PAGE_NAME = "inspect.html"


def run(config: DataInspectConfig) -> dict[str, Any]:
    """Decode every image once; write inspect.json and the page with the contact sheet, and return what the JSON holds.

    Raises DataError where the data can't be found, RunLockedError where another process writes to the folder. Images
    that can't be read are part of the result.
    """
    parts = load_parts(config)
    seen = {split: examine(images) for split, images in parts.items()}
    result = {
        "data": config.data,
        "leanvit": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "classes": list(next(iter(parts.values())).classes),
        "parts": {split: summarize(images, seen[split]) for split, images in parts.items()},
        "balance": balance(parts["train"], seen["train"]),
        "duplicates": find_duplicates(parts, seen),
    }
    folder = Path(config.output)
    with only_writer(folder):
        save_yaml(config, folder / "config.yaml")
        write_json(folder / RESULT_NAME, result)
        sheet = _readable(parts["train"], seen["train"])
        page = render(result, sheet, count=config.images_per_class, seed=config.seed)
        # A file name need not be UTF-8.
        write_atomic(folder / PAGE_NAME, page.encode("utf-8", "replace"))
    return result


def load_parts(config: DataInspectConfig) -> dict[Split, ImageSet]:
    """Training and validation images, and the test images where they are others than those that validate."""
    official = find_parts(config.data)
    wanted = [split for split in SPLITS if split != "test" or ("val" in official and "test" in official)]
    return {
        split: load_split(config.data, split, val_fraction=config.val_fraction, seed=config.seed) for split in wanted
    }


def _readable(images: ImageSet, seen: list[Seen]) -> ImageSet:
    return images.subset(np.asarray([i for i, one in enumerate(seen) if not one.problem], np.int64))
