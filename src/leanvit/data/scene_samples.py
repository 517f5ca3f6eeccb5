"""One training or validation sample of a task: the network's uint8 input and its targets as tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import tv_tensors

from leanvit import imaging
from leanvit.annotations import BoolMask, Instance, Scene, SceneSet
from leanvit.annotations.maps import load_map
from leanvit.annotations.masks import decode_mask
from leanvit.data.scene_augment import (
    Augmentation,
    Draws,
    Layers,
    areas,
    crop_turned,
    draw,
    flip,
    is_visible,
    jitter_colours,
    jitter_scene,
    lay,
    mask_boxes,
    random_region,
    random_spans,
    swap_sides,
    to_image,
    whole,
)
from leanvit.errors import DataError, ImageError
from leanvit.runtime.decode import Box, crop_region, pose_region
from leanvit.runtime.inputs import Place
from leanvit.runtime.letterbox import Placement, letterbox

Size = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """One picture, or one object of it for pose, as a network sees it.

    image: (3, H, W) uint8, RGB. target: what the task learns, in pixels of the image, by the kind of the sample:
      BOXES: boxes (N, 4) float32 xyxy, labels (N,) int64 from 1 (0 is the background of torchvision's detectors);
      MASKS: also masks (N, H, W) uint8 of 0 and 1;
      CLASS_MAPS: class_map (H, W) int64, 255 where no class is known;
      KEYPOINTS: keypoints (K, 3) float32 of x, y, visibility (0 also where augmentation moved one out of the image);
      all: index () int64 of the sample, image_id () int64.
    placement: of the picture in the image, where it is not augmented. region: of the picture, for pose.
    """

    image: Tensor
    target: dict[str, Tensor]
    image_id: int
    placement: Placement | None = None
    region: Box | None = None


@dataclass
class Pictures:
    """Decoded pictures, masks and class maps of a SceneSet, read when asked for.

    keep: hold what was read, masks as bits. Asking from several threads at once is safe.
    """

    scene_set: SceneSet
    keep: bool = False

    def __post_init__(self) -> None:
        self._pixels: dict[int, imaging.Pixels] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}
        self._maps: dict[int, NDArray[np.uint8]] = {}

    @cached_property
    def objects(self) -> tuple[tuple[int, int], ...]:
        """The samples of pose."""
        return pose_objects(self.scene_set)

    def pixels(self, index: int) -> imaging.Pixels:
        """Scene `index`: (height, width, 3) uint8. Raises ImageError, also where it has not the annotated size."""
        kept = self._pixels.get(index)
        return kept if kept is not None else self._keep(self._pixels, index, _read_pixels(self._scene(index)))

    def masks(self, index: int) -> NDArray[np.uint8]:
        """Of the scene's objects to segment: (N, height, width) uint8 of 0 and 1. Raises DataError."""
        scene = self._scene(index)
        objects = with_masks(scene)
        shape = (len(objects), *scene.size)
        packed = self._masks.get(index)
        if packed is None:
            masks = np.zeros(shape, np.uint8)
            for number, (mask, instance) in enumerate(zip(masks, objects, strict=True)):
                mask[:] = _read_mask(scene, number, instance)
            if self.keep:
                self._masks[index] = np.packbits(masks)
            return masks
        return np.unpackbits(packed, count=int(np.prod(shape))).reshape(shape)

    def class_map(self, index: int) -> NDArray[np.uint8]:
        """Of scene `index`: (height, width) uint8 of labels, 255 where there is none. Raises DataError."""
        kept = self._maps.get(index)
        if kept is not None:
            return kept
        return self._keep(self._maps, index, np.array(load_map(self._scene(index), self.scene_set)))

    def _keep(self, store: dict[int, imaging.Pixels], index: int, value: imaging.Pixels) -> imaging.Pixels:
        if self.keep:
            store[index] = value
        return value

    def _scene(self, index: int) -> Scene:
        return self.scene_set.scenes[index]


def _read_pixels(scene: Scene) -> imaging.Pixels:
    # A copy, for torch wants memory that may be written to.
    pixels = np.array(imaging.decode(scene.path).pixels)
    if pixels.shape[:2] != scene.size:
        found, expected = ("{1} x {0}".format(*size) for size in (pixels.shape, scene.size))
        raise ImageError(
            f"{scene.path}: {found} pixels, expected {expected} as its annotations say. "
            "Correct the annotations, or give the picture they were made for."
        )
    return pixels


def _read_mask(scene: Scene, number: int, instance: Instance) -> BoolMask:
    try:
        return decode_mask(instance.segmentation, scene.size)
    except DataError as error:
        raise DataError(f"{scene.path}, object {number}: {error}. Correct the annotation or leave it out.") from error


def no_crowds(scene: Scene) -> tuple[Instance, ...]:
    """The objects of a scene that are boxes to learn."""
    return tuple(instance for instance in scene.instances if not instance.crowd)


def with_masks(scene: Scene) -> tuple[Instance, ...]:
    """The objects of a scene that are masks to learn."""
    return tuple(instance for instance in no_crowds(scene) if instance.segmentation is not None)


def _has_keypoints(instance: Instance) -> bool:
    return instance.keypoints is not None and bool((instance.keypoints[:, 2] > 0).any())


def pose_objects(scene_set: SceneSet) -> tuple[tuple[int, int], ...]:
    """(index of the scene, index of its instance) of every object with an annotated keypoint, no crowds, in order."""
    return tuple(
        (scene_index, index)
        for scene_index, scene in enumerate(scene_set.scenes)
        for index, instance in enumerate(scene.instances)
        if not instance.crowd and _has_keypoints(instance)
    )


@dataclass(frozen=True)
class SampleKind:
    """What one sample of a task is, and how it is read out of annotated pictures. Those there are: scene_kinds.

    scenes: (pictures) -> the scene of every sample, in order. read: (pictures, index, size, augmentation, draws) ->
        the sample, with index and image_id still to come.
    place: (pictures, index, size) -> where the image of a sample lies in its picture, where it is not augmented.
    check: (pictures) -> None; raises DataError where nothing can be learned from them.
    extra_bytes: (scene) -> bytes of what is decoded beside the pixels.
    """

    scenes: Callable[[Pictures], Sequence[int]]
    read: Callable[[Pictures, int, Size, Augmentation | None, Draws], Sample]
    place: Callable[[Pictures, int, Size], Place]
    check: Callable[[Pictures], None]
    extra_bytes: Callable[[Scene], int]


def read_sample(
    scene_set: SceneSet,
    index: int,
    kind: SampleKind,
    size: Size,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    *,
    epoch: int = 0,
    pictures: Pictures | None = None,
) -> Sample:
    """One sample; a pure function of its arguments.

    index: of the sample: for KEYPOINTS of the object in `pose_objects`, else of the scene. size: (height, width) of
    the network's input. augmentation: None for the picture as it is, letterboxed (KEYPOINTS: the region around the
    object). pictures: where decoded ones are held. Crowds are no targets; objects of which less than 2 pixels a side or
    10% are in the image are left out. Raises ImageError for a picture that can't be read, DataError for annotations
    that can't.
    """
    pictures = pictures or Pictures(scene_set)
    sample = kind.read(pictures, index, size, augmentation, draw(seed, epoch, index))
    sample.target["index"] = torch.tensor(index)
    sample.target["image_id"] = torch.tensor(sample.image_id)
    return sample


def laid(
    pictures: Pictures, index: int, layers: Layers, size: Size, augmentation: Augmentation | None, drawn: Draws
) -> tuple[Tensor, dict[str, Tensor], Placement | None, float]:
    """A whole picture and its annotations in the network's input, changed at random or letterboxed.

    layers: annotations of scene `index`. Returns the image, the layers, the placement of a letterboxed picture, and
    the pixels of the image for a pixel of the picture.
    """
    scene = pictures.scene_set.scenes[index]
    pixels = pictures.pixels(index)
    found = None
    if augmentation is None:
        letterboxed, found = letterbox(pixels, size)
        down, across = (whole(*axis) for axis in zip(scene.size, found.size, size, strict=True))
        placed = lay(layers, down, across) | {"image": to_image(letterboxed)}
    else:
        down, across = random_spans(scene.size, size, augmentation, drawn)
        placed = jitter_scene({"image": to_image(pixels), **layers}, down, across, augmentation, drawn)
    target = plain(placed)
    return target.pop("image").contiguous(), target, found, down.scale * across.scale


def read_objects(
    pictures: Pictures, index: int, size: Size, augmentation: Augmentation | None, drawn: Draws, *, masks: bool
) -> Sample:
    """A picture with the boxes of its objects, and with their masks where these are asked for."""
    scene = pictures.scene_set.scenes[index]
    objects = with_masks(scene) if masks else no_crowds(scene)
    boxes = torch.tensor([instance.box for instance in objects], dtype=torch.float32).reshape(-1, 4)
    layers: Layers = {"boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=scene.size)}
    if masks:
        layers["masks"] = tv_tensors.Mask(torch.from_numpy(pictures.masks(index)))
    image, target, found, zoom = laid(pictures, index, layers, size, augmentation, drawn)
    target["labels"] = torch.tensor([instance.label + 1 for instance in objects], dtype=torch.int64)
    return Sample(image, _visible(target, plain(layers), zoom), scene.image_id, found)


def read_class_map(
    pictures: Pictures, index: int, size: Size, augmentation: Augmentation | None, drawn: Draws
) -> Sample:
    """A picture with the class of every pixel."""
    layers: Layers = {"class_map": tv_tensors.Mask(torch.from_numpy(pictures.class_map(index))[None])}
    image, target, found, _ = laid(pictures, index, layers, size, augmentation, drawn)
    target["class_map"] = target["class_map"][0].long()
    return Sample(image, target, pictures.scene_set.scenes[index].image_id, found)


def plain(layers: Layers) -> dict[str, Tensor]:
    """Layers as plain tensors."""
    return {name: value.as_subclass(Tensor) for name, value in layers.items()}


def _visible(target: dict[str, Tensor], before: dict[str, Tensor], zoom: float) -> dict[str, Tensor]:
    """The target without objects that are hardly in the image.

    before: boxes and masks in the whole picture. zoom: pixels of the image for one of the picture.
    """
    left, full = areas(target["boxes"]), areas(before["boxes"]) * zoom
    if "masks" in target:
        # What is left of a box that was cut may be larger than what is left of its object.
        cut = left < 0.999 * full
        target["boxes"] = torch.where(cut[:, None], mask_boxes(target["masks"]), target["boxes"])
        left, full = _count(target["masks"]), _count(before["masks"]) * zoom
    kept = is_visible(target["boxes"], left, full) & (left > 0)
    return target if bool(kept.all()) else {name: value[kept] for name, value in target.items()}


def _count(masks: Tensor) -> Tensor:
    """(N,) pixels of masks (N, H, W)."""
    return masks.flatten(1).sum(1)


def read_keypoints(
    pictures: Pictures, index: int, size: Size, augmentation: Augmentation | None, drawn: Draws
) -> Sample:
    """The region around one object with its keypoints."""
    scene_index, instance_index = pictures.objects[index]
    scene = pictures.scene_set.scenes[scene_index]
    instance = scene.instances[instance_index]
    known = torch.from_numpy(np.array(instance.keypoints, np.float32))
    pixels = pictures.pixels(scene_index)
    region = pose_region(instance.box, size[1] / size[0])
    if augmentation is None:
        x1, y1, x2, y2 = region
        image = to_image(np.array(crop_region(pixels, region, size))).as_subclass(Tensor)
        known[:, :2] = (known[:, :2] - torch.tensor([x1, y1])) / torch.tensor([x2 - x1, y2 - y1])
        known[:, :2] *= torch.tensor([float(size[1]), float(size[0])])
        return Sample(image.contiguous(), {"keypoints": known}, scene.image_id, region=region)
    moved = random_region(region, augmentation, drawn)
    degrees = augmentation.rotation * (2 * drawn.angle - 1)
    layers = crop_turned(pixels, known[:, :2], moved, degrees, size)
    flipped = drawn.flip < augmentation.hflip
    changed = plain(flip(layers) if flipped else layers)
    keypoints = torch.cat([changed["keypoints"], known[:, 2:]], 1)
    if flipped:
        keypoints = swap_sides(keypoints, _scheme_sides(pictures.scene_set, len(keypoints)))
    image = jitter_colours(changed["image"], augmentation, drawn).contiguous()
    return Sample(image, {"keypoints": _inside(keypoints, size)}, scene.image_id)


def _scheme_sides(scene_set: SceneSet, count: int) -> tuple[int, ...]:
    scheme = scene_set.keypoints
    if scheme is None or len(scheme.swapped) != count:
        found = "no scheme" if scheme is None else f"a scheme of {len(scheme.swapped)}"
        raise DataError(
            f"{scene_set.name}: an object with {count} keypoints but {found}, expected one that names each keypoint "
            "and its mirror. Add it to the data set, or set hflip to 0."
        )
    return scheme.swapped


def _inside(keypoints: Tensor, size: tuple[int, int]) -> Tensor:
    """Keypoints (K, 3) with visibility 0 where they are not in the image of `size` (height, width)."""
    points = keypoints[:, :2]
    seen = (points >= 0).all(1) & (points < torch.tensor([float(size[1]), float(size[0])])).all(1)
    keypoints[:, 2] *= seen
    return keypoints
