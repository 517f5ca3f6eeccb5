"""Practice pictures with exact annotations: cut-outs placed on parts of photographs, written as COCO and class maps."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from leanvit.annotations.masks import encode_mask
from leanvit.annotations.types import BoolMask, ClassMap, KeypointScheme
from leanvit.config import DataComposeConfig, from_dict, load_yaml, save_yaml
from leanvit.data.compose.garments import UNIT, Cutout, CutoutSet, load_cutouts, load_garments
from leanvit.data.compose.photos import PHOTOS, SPLITS, Split, crop_background, load_photos
from leanvit.errors import ConfigError, DataError
from leanvit.files import explain_os_error, write_atomic
from leanvit.imaging import Pixels
from leanvit.progress import Bar

TRIES = 30
SCENE_TRIES = 10
NEAR = 2.0
"""Pixels between a keypoint and its object's visible mask up to which it counts as visible."""


@dataclass(frozen=True)
class Sprite:
    """A cut-out at its size and rotation.

    left, top: its place in the picture, in whole pixels; parts of it may be outside.
    pixels: (height, width, 4) uint8 RGBA. keypoints: (K, 2) float64 of x, y in pixels of the picture, or None.
    """

    left: int
    top: int
    pixels: Pixels
    label: int
    keypoints: NDArray[np.float64] | None

    @property
    def mask(self) -> BoolMask:
        """(height, width) bool: at least half covered."""
        return self.pixels[:, :, 3] >= 128


@dataclass(frozen=True)
class Composed:
    """A picture and its objects.

    picture: (height, width, 3) uint8. owner: (height, width) int16, index into `sprites` of the object seen at a
    pixel, -1 for the photograph.
    """

    picture: Pixels
    owner: NDArray[np.int16]
    sprites: tuple[Sprite, ...]

    @property
    def class_map(self) -> ClassMap:
        """(height, width) uint8: 0 for the photograph, 1 + label of the object seen."""
        values = np.asarray([*(1 + sprite.label for sprite in self.sprites), 0], np.uint8)
        return values[self.owner]

    def annotations(self) -> list[dict[str, Any]]:
        """COCO annotations without ids, of what is seen of each object: boxes, RLE, areas, keypoints."""
        return [self._annotation(index, sprite) for index, sprite in enumerate(self.sprites)]

    def _annotation(self, index: int, sprite: Sprite) -> dict[str, Any]:
        mask = self.owner == index
        y, x = np.nonzero(mask)
        left, top = int(x.min()), int(y.min())
        result: dict[str, Any] = {
            "category_id": 1 + sprite.label,
            "bbox": [left, top, int(x.max()) + 1 - left, int(y.max()) + 1 - top],
            "area": len(x),
            "segmentation": encode_mask(mask),
            "iscrowd": 0,
        }
        if sprite.keypoints is not None:
            points = [keypoint_entry(point, x, y, mask.shape) for point in sprite.keypoints]
            result["keypoints"] = [value for point in points for value in point]
            result["num_keypoints"] = sum(point[2] > 0 for point in points)
        return result


def keypoint_entry(
    point: NDArray[np.float64], x: NDArray[np.int64], y: NDArray[np.int64], shape: tuple[int, ...]
) -> tuple[float, float, int]:
    """x, y and visibility of a keypoint: 0 outside the picture, 2 near the visible pixels x, y of its object, else 1.

    point: (2,) float64 in pixels. x, y: (N,) int64. shape: (height, width) of the picture.
    """
    across, down = float(point[0]), float(point[1])
    if not (0 <= across < shape[1] and 0 <= down < shape[0]):
        return 0.0, 0.0, 0
    near = bool((np.hypot(x + 0.5 - across, y + 0.5 - down) <= NEAR).any())
    return round(across, 2), round(down, 2), 2 if near else 1


def transform(cutout: Cutout, scale: float, degrees: float, centre: tuple[float, float]) -> Sprite:
    """Scale a cut-out, rotate it (clockwise as one sees it) and put its middle at `centre` of the picture.

    scale: on 28 pixels. centre: x, y in pixels. Colour, mask and keypoints go through one affine map; where it
    shrinks, several samples are taken for a pixel.
    """
    factor = scale * UNIT / cutout.unit
    turn = math.radians(degrees)
    forward = factor * np.asarray([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    middle, target = np.full(2, cutout.pixels.shape[0] / 2), np.asarray(centre)
    reach = np.abs(forward) @ middle
    first = np.floor(target - reach).astype(int)
    size = np.ceil(target + reach).astype(int) - first
    samples = math.ceil(1 / factor)
    back = np.linalg.inv(forward)
    offset = back @ (first - target) + middle
    matrix = np.column_stack([back / samples, offset]).ravel()
    image = Image.fromarray(cutout.pixels).transform(
        tuple((size * samples).tolist()), Image.Transform.AFFINE, matrix.tolist(), Image.Resampling.BILINEAR
    )
    pixels = np.asarray(image.reduce(samples) if samples > 1 else image)
    points = None if cutout.keypoints is None else (cutout.keypoints - middle) @ forward.T + target
    return Sprite(int(first[0]), int(first[1]), pixels, cutout.label, points)


def compose(background: Pixels, sprites: list[Sprite]) -> Composed:
    """Blend sprites onto a background in their order: later ones hide earlier ones.

    background: (height, width, 3) uint8.
    """
    picture = background.astype(np.float64)
    owner = np.full(background.shape[:2], -1, np.int16)
    for index, sprite in enumerate(sprites):
        there, here = _overlap(sprite, owner.shape)
        alpha = sprite.pixels[here][:, :, 3:] / 255.0
        picture[there] += alpha * (sprite.pixels[here][:, :, :3] - picture[there])
        owner[there][sprite.mask[here]] = index
    return Composed(np.rint(picture).astype(np.uint8), owner, tuple(sprites))


def _overlap(sprite: Sprite, shape: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where picture and sprite meet: as rows and columns of the picture, and of the sprite."""
    there, here = [], []
    for start, length, limit in zip((sprite.top, sprite.left), sprite.pixels.shape, shape, strict=False):
        low, high = max(start, 0), max(min(start + length, limit), 0)
        there.append(slice(low, max(high, low)))
        here.append(slice(low - start, max(high, low) - start))
    return (there[0], there[1]), (here[0], here[1])


# --- drawing lots ---


@dataclass(frozen=True)
class Source:
    """All that scenes are made of: loaded once a process."""

    config: DataComposeConfig
    photos: list[Pixels]
    cutouts: dict[Split, CutoutSet]

    def scene(self, split: Split, index: int) -> Composed:
        """The scene of this number: it depends on the seed, the split and the number only.

        Raises DataError where the objects don't fit into the picture.
        """
        config = self.config
        rng = np.random.default_rng([config.seed, SPLITS.index(split), index])
        for _ in range(SCENE_TRIES):
            photo = self.photos[rng.integers(len(self.photos))]
            background = crop_background(photo, split, config.shape, rng)
            wanted = int(rng.integers(config.min_objects, config.max_objects + 1))
            sprites = self._sprites(split, wanted, rng)
            if len(sprites) >= config.min_objects:
                return compose(background, sprites)
        raise DataError(
            f"scene {index} of '{split}': {config.min_objects} objects don't fit into {config.shape[0]} x "
            f"{config.shape[1]} pixels. Give a larger --size or --occlusion, or a smaller --scale or --min-objects."
        )

    def _sprites(self, split: Split, wanted: int, rng: np.random.Generator) -> list[Sprite]:
        """Up to `wanted` sprites; one that would hide too much of another or of itself is drawn again."""
        config = self.config
        owner = np.full(config.shape, -1, np.int16)
        sprites: list[Sprite] = []
        areas: list[int] = []
        for _ in range(TRIES * wanted):
            if len(sprites) == wanted:
                break
            centre = (rng.uniform(0, config.shape[1]), rng.uniform(0, config.shape[0]))
            scale, degrees = rng.uniform(*config.scale), rng.uniform(-config.rotation, config.rotation)
            sprite = transform(self.cutouts[split].draw(rng), scale, degrees, centre)
            there, here = _overlap(sprite, owner.shape)
            covered = owner.copy()
            covered[there][sprite.mask[here]] = len(sprites)
            new_areas = [*areas, int(sprite.mask.sum())]
            seen = np.bincount(covered.ravel() + 1, minlength=len(new_areas) + 1)[1:]
            if (seen > 0).all() and (seen >= (1 - config.occlusion) * np.asarray(new_areas)).all():
                owner, areas = covered, new_areas
                sprites.append(sprite)
        return sprites


def load_source(config: DataComposeConfig) -> Source:
    """Photographs and objects. Raises DataError, MissingDependencyError."""
    cutouts = load_cutouts(config.cutouts) if config.cutouts else load_garments(kind=config.classes)
    return Source(config, load_photos(), cutouts)


# --- writing ---


@dataclass(frozen=True)
class Written:
    """What a run of `data compose` has made. pictures, objects: numbers of each split."""

    folder: Path
    pictures: dict[Split, int]
    objects: dict[Split, int]


def run(config: DataComposeConfig) -> Written | None:
    """Compose both splits and write the folder; it is whole or absent. None where it is there already.

    Raises ConfigError where the folder holds something else, DataError, EnvironmentProblem.
    """
    folder = Path(config.output)
    if _is_done(folder, config):
        return None
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        objects = _write_all(config, staging)
        os.replace(staging, folder)
    except OSError as error:
        raise explain_os_error(error, folder) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return Written(folder, {"train": config.train, "val": config.val}, objects)


def _is_done(folder: Path, config: DataComposeConfig) -> bool:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        old = from_dict(DataComposeConfig, load_yaml(folder / "config.yaml"), str(folder))
    except ConfigError:
        old = None
    if old is None:
        raise ConfigError(f"{folder}: holds something that 'data compose' has not written. Choose another folder.")
    if replace(old, output=config.output, workers=config.workers) != config:
        raise ConfigError(f"{folder}: composed with other options, see config.yaml in it. Choose another folder.")
    return True


def _write_all(config: DataComposeConfig, folder: Path) -> dict[Split, int]:
    source = load_source(config)
    cutouts = source.cutouts["train"]
    for split in SPLITS:
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
    objects = {split: _write_split(source, split, folder) for split in SPLITS}
    write_atomic(folder / "classes.txt", "\n".join(["background", *cutouts.classes, ""]).encode())
    write_atomic(folder / "SOURCES.md", sources_page(config).encode())
    save_yaml(config, folder / "config.yaml")
    return objects


def _write_split(source: Source, split: Split, folder: Path) -> int:
    """Write pictures, class maps and annotations of a split; returns the number of objects."""
    height, width = source.config.shape
    cutouts = source.cutouts[split]
    images, annotations = [], []
    for index, found in enumerate(_written_scenes(source, split, folder)):
        name = f"images/{split}/{index:05}.png"
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        annotations += [{"id": 0, "image_id": index + 1, **one} for one in found]
    for number, annotation in enumerate(annotations, 1):
        annotation["id"] = number
    values = {
        "info": {"description": "composed by leanvit: see SOURCES.md", "version": "1"},
        "images": images,
        "annotations": annotations,
        "categories": categories(cutouts.classes, cutouts.keypoints),
    }
    write_atomic(folder / f"{split}.json", json.dumps(values, allow_nan=False).encode())
    return len(annotations)


def categories(classes: tuple[str, ...], keypoints: KeypointScheme | None) -> list[dict[str, Any]]:
    """COCO's categories, ids from 1; a skeleton counts keypoints from 1 there."""
    entries: list[dict[str, Any]] = [{"id": 1 + label, "name": name} for label, name in enumerate(classes)]
    if keypoints:
        skeleton = [[1 + start, 1 + end] for start, end in keypoints.skeleton]
        for entry in entries:
            entry |= {"keypoints": list(keypoints.names), "skeleton": skeleton}
    return entries


_of_process: list[Source] = []


def _prepare(config: DataComposeConfig) -> None:
    _of_process.append(load_source(config))


def _write_scene(job: tuple[Split, int, Path]) -> list[dict[str, Any]]:
    return _write_files(_of_process[0], *job)


def _write_files(source: Source, split: Split, index: int, folder: Path) -> list[dict[str, Any]]:
    composed = source.scene(split, index)
    Image.fromarray(composed.picture).save(folder / "images" / split / f"{index:05}.png")
    Image.fromarray(composed.class_map).save(folder / "masks" / split / f"{index:05}.png")
    return composed.annotations()


def _written_scenes(source: Source, split: Split, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """Annotations of each scene in order, whoever has made it."""
    config = source.config
    total = config.train if split == "train" else config.val
    jobs = [(split, index, folder) for index in range(total)]
    with Bar(f"composing {split}", total) as bar:
        for found in _in_processes(config, jobs) if config.workers > 1 else (_write_files(source, *j) for j in jobs):
            bar.advance()
            yield found


def _in_processes(config: DataComposeConfig, jobs: list[tuple[Split, int, Path]]) -> Iterator[list[dict[str, Any]]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.workers, context, initializer=_prepare, initargs=(config,)) as pool:
        yield from pool.map(_write_scene, jobs, chunksize=16)


def sources_page(config: DataComposeConfig) -> str:
    """SOURCES.md: where objects and backgrounds come from, and their terms."""
    if config.cutouts:
        objects = f"cut-outs of the folder `{config.cutouts}`; its terms are those of whoever made them."
    else:
        objects = "Fashion-MNIST (Zalando, MIT licence): train from its 60,000 images, val from its 10,000."
    lines = [
        "# Sources", "",
        "These pictures are composed, they are not real photographs of garments.", "",
        f"Objects: {objects}", "",
        "Backgrounds: the left 60% of each photograph for train, the right 35% for val.", "",
        "| photograph | shows | terms as the package states them |", "|---|---|---|",
        *(f"| {photo.package}/{photo.file} | {photo.shows} | {photo.terms} |" for photo in PHOTOS), "",
    ]  # fmt: skip
    return "\n".join(lines)


def describe(written: Written | None, config: DataComposeConfig) -> str:
    """One line about a run, for people."""
    if written is None:
        return f"{config.output}: composed already with these options, nothing to do"
    counts = [f"{written.pictures[split]} {split} ({written.objects[split]} objects)" for split in SPLITS]
    return f"{written.folder}: {', '.join(counts)}"
