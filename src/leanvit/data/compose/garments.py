"""What is pasted: real Fashion-MNIST garments cut out along their silhouette, or cut-outs from a folder."""

from __future__ import annotations

import colorsys
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from scipy import ndimage

from leanvit import imaging
from leanvit.annotations.types import BoolMask, KeypointScheme
from leanvit.data.compose.photos import SPLITS, Split
from leanvit.data.sets import FASHION_MNIST_FOLDER, ImageSet
from leanvit.data.sets.local import class_folders, fashion_mnist_parts
from leanvit.errors import DataError
from leanvit.imaging import Pixels

UNIT = 28
"""Pixels of an object at scale 1: the side of a Fashion-MNIST image."""
MARGIN = 2
"""Transparent pixels around a cut-out, so that resampling fades out on every side."""
FOREGROUND_LEVEL = 8
"""Grey levels above this are garment; below are what is left of the background after Fashion-MNIST's resize."""
MIN_PIXELS = 60
CUTOUT_SIDE = 84

KEYPOINTS = KeypointScheme(
    names=("top_left", "top_right", "bottom_left", "bottom_right", "top", "bottom"),
    swapped=(1, 0, 3, 2, 4, 5),
    sigmas=(0.05,) * 6,
    skeleton=((0, 4), (4, 1), (1, 3), (3, 5), (5, 2), (2, 0)),
)
"""Extreme points of a silhouette, and the outline through them."""


GROUPS = {
    "top": ("T-shirt/top", "Pullover", "Coat", "Shirt"),
    "trouser": ("Trouser",),
    "dress": ("Dress",),
    "shoe": ("Sandal", "Sneaker", "Ankle boot"),
    "bag": ("Bag",),
}
"""Fashion-MNIST's ten classes in five that differ in shape: at 28 grey pixels tops are hard to tell apart."""


@dataclass(frozen=True)
class Cutout:
    """One object before it is placed.

    pixels: (side, side, 4) uint8 RGBA with straight alpha. label: index into CutoutSet.classes.
    unit: pixels of `pixels` that are 28 pixels of the picture at scale 1.
    keypoints: (K, 2) float64 of x, y in pixels of `pixels`, corner of the first at (0, 0); None where there are none.
    """

    pixels: Pixels
    label: int
    unit: float = UNIT
    keypoints: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class CutoutSet:
    """Objects of one split. by_class: for each class the numbers that `read` turns into a cut-out.

    read: from a number and a generator of random numbers (for a tint) to a cut-out, or None where it is of no use.
    """

    classes: tuple[str, ...]
    by_class: tuple[NDArray[np.int64], ...]
    read: Callable[[int, np.random.Generator], Cutout | None]
    keypoints: KeypointScheme | None = None

    def draw(self, rng: np.random.Generator) -> Cutout:
        """A random object: every class is equally likely."""
        while True:
            members = self.by_class[rng.integers(len(self.by_class))]
            cutout = self.read(int(members[rng.integers(len(members))]), rng)
            if cutout is not None:
                return cutout


def foreground(grey: NDArray[np.uint8]) -> BoolMask:
    """The silhouette of a garment: brighter than the background, small gaps closed, dark insides filled.

    grey: (height, width) uint8. Loose specks of fewer than 12 pixels are left out. A large hole that is purely black
    stays open: it is what one sees through the handle of a bag. Returns (height, width) bool.
    """
    padded = np.pad(grey, MARGIN)
    bright = padded > FOREGROUND_LEVEL
    # What is purely black was background: closing would fill the corners of a silhouette with it.
    mask = bright | (ndimage.binary_closing(bright) & (padded > 0))
    holes, count = ndimage.label(~mask)
    numbers = np.arange(1, count + 1)
    sizes = ndimage.sum_labels(np.ones_like(padded), holes, numbers)
    open_holes = (sizes > 12) & (ndimage.mean(padded, holes, numbers) < 1)
    open_holes[holes[0, 0] - 1] = True
    mask = ~np.isin(holes, numbers[open_holes])
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    if count > 1:
        sizes = np.bincount(parts.ravel(), minlength=count + 1)[1:]
        mask = np.isin(parts, 1 + np.flatnonzero((sizes >= 12) | (sizes == sizes.max())))
    return mask[MARGIN:-MARGIN, MARGIN:-MARGIN]


def keypoints_of(mask: BoolMask) -> NDArray[np.float64]:
    """The extreme points of a silhouette in the order of KEYPOINTS, each the mean of the pixels that tie for it.

    mask: (height, width) bool, not empty. The corners minimise or maximise x + y and x - y; top and bottom are
    the highest and lowest pixel of the columns within 2.5 pixels of the middle of the silhouette's box.
    Returns (6, 2) float64 of x, y in pixels, the middle of the first pixel at (0.5, 0.5).
    """
    y, x = np.nonzero(mask)
    away = np.abs(x - (x.min() + x.max()) / 2)
    middle = away <= max(2.5, away.min())
    points = []
    for value, chosen in (
        (x + y, None), (y - x, None), (x - y, None), (-x - y, None), (y, middle), (-y, middle),
    ):  # fmt: skip
        least = value.min() if chosen is None else value[chosen].min()
        ties = (value == least) if chosen is None else (value == least) & chosen
        points.append((x[ties].mean() + 0.5, y[ties].mean() + 0.5))
    return np.asarray(points, np.float64)


def cut_out(grey: NDArray[np.uint8], label: int, tint: NDArray[np.float64]) -> Cutout | None:
    """A garment in colour. grey: (28, 28) uint8. tint: (3,) float64 of RGB, 0 to 1; black becomes 0.3 of it.

    Returns None where the silhouette has fewer than 60 pixels.
    """
    mask = foreground(grey)
    if mask.sum() < MIN_PIXELS:
        return None
    # Lifted, because a black garment on a night sky would be seen by nobody.
    shade = 0.3 + 0.7 * grey.astype(np.float64) / 255.0
    colour = np.rint(255.0 * shade[:, :, None] * tint).astype(np.uint8)
    pixels = np.dstack([colour, mask.astype(np.uint8) * 255])
    pixels = np.pad(pixels, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)))
    return Cutout(pixels, label, keypoints=keypoints_of(mask) + MARGIN)


def random_tint(rng: np.random.Generator) -> NDArray[np.float64]:
    """(3,) float64 of RGB, 0 to 1: any hue, weak to strong, bright."""
    return np.asarray(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.2, 0.9), rng.uniform(0.75, 1.0)))


def load_garments(
    folder: str | Path = FASHION_MNIST_FOLDER, kind: Literal["all", "groups"] = "all"
) -> dict[Split, CutoutSet]:
    """Fashion-MNIST in IDX files: its 60,000 images to train on, its 10,000 to validate on.

    kind: its ten classes, or the five GROUPS. Raises DataError where files are missing or damaged.
    """
    parts = fashion_mnist_parts(Path(folder))
    return {"train": _garments(parts["train"](), kind), "val": _garments(parts["test"](), kind)}


def _garments(images: ImageSet, kind: Literal["all", "groups"]) -> CutoutSet:
    labels, classes = images.labels, images.classes
    if kind == "groups":
        classes = tuple(GROUPS)
        group_of = {name: index for index, names in enumerate(GROUPS.values()) for name in names}
        labels = np.asarray([group_of[name] for name in images.classes], np.int64)[images.labels]

    def read(index: int, rng: np.random.Generator) -> Cutout | None:
        grey = np.asarray(images.sources[index], np.uint8)[:, :, 0]
        return cut_out(grey, int(labels[index]), random_tint(rng))

    by_class = tuple(np.flatnonzero(labels == label) for label in range(len(classes)))
    return CutoutSet(classes, by_class, read, KEYPOINTS)


# --- cut-outs from a folder ---


def load_cutouts(folder: str | Path) -> dict[Split, CutoutSet]:
    """RGBA PNG files below one folder a class; a fifth of the file names validates, chosen by hash.

    The hash is of the name without its folder, so that the same object in two classes is on one side.
    Raises DataError where there are fewer than two classes, or a class has no file for one of the splits.
    """
    folders = class_folders(Path(folder))
    files = [sorted(path for path in one.rglob("*.png") if path.is_file()) for one in folders]
    flat = [(path, label) for label, paths in enumerate(files) for path in paths]
    classes = tuple(one.name for one in folders)
    return {split: _cutouts(flat, classes, split, str(folder)) for split in SPLITS}


def _cutouts(files: list[tuple[Path, int]], classes: tuple[str, ...], split: Split, folder: str) -> CutoutSet:
    chosen = [(index, label) for index, (path, label) in enumerate(files) if split_of(path.name) == split]
    by_class = tuple(np.asarray([i for i, one in chosen if one == label], np.int64) for label in range(len(classes)))
    for name, members in zip(classes, by_class, strict=True):
        if not len(members):
            raise DataError(
                f"{folder}/{name}: no PNG files for '{split}', expected some of every class in both splits (a fifth "
                "of the names validates, chosen by hash). Add files or remove the folder."
            )
    return CutoutSet(classes, by_class, lambda index, rng: read_cutout(*files[index]))


def split_of(name: str) -> Split:
    """The split of a file name: a fifth of all names is for validation, the same on every machine."""
    return "val" if hashlib.blake2b(name.encode(), digest_size=4).digest()[0] % 5 == 0 else "train"


def read_cutout(path: Path, label: int) -> Cutout:
    """An RGBA PNG, cut to what is opaque and reduced to 84 pixels on its longer side.

    Raises DataError where it is no image, has no transparency, or nothing is opaque.
    """
    try:
        opened = Image.open(io.BytesIO(imaging.read_file(path)), formats=("PNG",))
        with_alpha = "A" in opened.mode or "transparency" in opened.info
        image = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path}: not a PNG that can be read ({error}). Replace or remove it.") from error
    box = image.getchannel("A").point(lambda value: 255 * (value >= 128)).getbbox()
    if not with_alpha or box is None:
        found = "nothing opaque" if with_alpha else "no transparency"
        raise DataError(f"{path}: {found}, expected an RGBA cut-out. Replace or remove it.")
    image = image.crop(box)
    image.thumbnail((CUTOUT_SIDE, CUTOUT_SIDE), Image.Resampling.BICUBIC)
    side = max(image.size)
    canvas = Image.new("RGBA", (side + 2 * MARGIN, side + 2 * MARGIN))
    canvas.paste(image, ((canvas.width - image.width) // 2, (canvas.height - image.height) // 2))
    return Cutout(np.asarray(canvas), label, unit=side)
