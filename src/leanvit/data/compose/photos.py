"""Backgrounds: parts of real photographs that scikit-image and scikit-learn carry, held apart by split."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from leanvit import imaging
from leanvit.errors import DataError, raise_missing, require
from leanvit.imaging import Pixels

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
COLUMNS: dict[Split, tuple[float, float]] = {"train": (0.0, 0.6), "val": (0.65, 1.0)}
"""First and last column of each split, as shares of a photograph's width. The gap keeps resampling apart as well."""


@dataclass(frozen=True)
class Photo:
    """A photograph inside an installed package. file: below the package's folder. terms: as the package states them."""

    package: str
    file: str
    shows: str
    terms: str


PHOTOS = (
    Photo("skimage", "data/astronaut.png", "Eileen Collins, NASA", "no known copyright restrictions, public domain"),
    Photo("skimage", "data/camera.png", "cameraman, by Lav Varshney", "CC0 by the photographer"),
    Photo("skimage", "data/chelsea.png", "Chelsea the cat, by Stefan van der Walt", "CC0 by the photographer"),
    Photo("skimage", "data/coffee.png", "coffee cup, by Rachel Michetti", "CC0 by the photographer"),
    Photo("skimage", "data/coins.png", "Greek coins, Brooklyn Museum", "no known copyright restrictions"),
    Photo("skimage", "data/rocket.jpg", "launch of DSCOVR, SpaceX", "released in the public domain"),
    Photo("skimage", "data/retina.jpg", "human retina, by Mikael Häggström", "CC0 1.0"),
    Photo("skimage", "data/hubble_deep_field.jpg", "Hubble eXtreme Deep Field, NASA", "freely used, public domain"),
    Photo("skimage", "data/ihc.png", "stained tissue, CMMI", "no known copyright restrictions"),
    Photo("skimage", "data/brick.png", "brick wall, CC0Textures", "CC0"),
    Photo("skimage", "data/grass.png", "grass, by linolafett", "CC0"),
    Photo("skimage", "data/gravel.png", "gravel, CC0Textures", "CC0"),
    Photo("sklearn", "datasets/images/china.jpg", "Chinese temple, by danielbuechele", "CC BY 2.0"),
    Photo("sklearn", "datasets/images/flower.jpg", "flower, by vultilion", "CC BY 2.0"),
)
"""Those of scikit-image are inside its package, so that none is downloaded; pictures of unclear terms are left out."""


def load_photos() -> list[Pixels]:
    """All of PHOTOS in their order: (height, width, 3) uint8 each, sizes differ.

    Raises MissingDependencyError without scikit-image, DataError where an installation lacks a picture.
    """
    require("skimage")
    return [_load(photo) for photo in PHOTOS]


def _load(photo: Photo) -> Pixels:
    found = importlib.util.find_spec(photo.package)
    if found is None or found.origin is None:
        raise_missing(photo.package)
    path = Path(found.origin).parent / photo.file
    if not path.is_file():
        raise DataError(f"{path}: no such file, expected a picture that {photo.package} carries. Install it again.")
    return imaging.decode(path).pixels


def columns_of(width: int, split: Split) -> tuple[int, int]:
    """First column of a split's part of a photograph, and the first after it, in pixels."""
    first, last = COLUMNS[split]
    return int(np.ceil(first * width)), int(np.floor(last * width))


def crop_background(photo: Pixels, split: Split, shape: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """A random part of the split's columns of a photograph, resized, perhaps mirrored, made brighter or darker.

    photo: (height, width, 3) uint8. shape: (height, width) of the result in pixels. The part is 0.6 to 1 times as
    wide as fits into the columns of both splits, so that both are equally sharp. Returns (*shape, 3) uint8.
    """
    first, last = columns_of(photo.shape[1], split)
    aspect = shape[0] / shape[1]
    narrowest = min(end - start for start, end in (columns_of(photo.shape[1], name) for name in SPLITS))
    width = rng.uniform(0.6, 1.0) * min(narrowest, photo.shape[0] / aspect)
    height = width * aspect
    left, top = rng.uniform(0, last - first - width), rng.uniform(0, photo.shape[0] - height)
    part = Image.fromarray(photo[:, first:last])  # cut first: the filter of a resize looks beyond its box
    box = (left, top, min(left + width, part.width), min(top + height, part.height))
    pixels = np.asarray(part.resize(shape[::-1], Image.Resampling.BICUBIC, box=box), np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.clip(np.rint(pixels * rng.uniform(0.6, 1.15)), 0, 255).astype(np.uint8)
