"""Data sets: a specification such as 'digits' or a folder becomes images, labels and batches.

Small sets live in memory as uint8 and are augmented in whole batches, which is more than ten times as fast
as image by image; larger ones are decoded on demand. Order and augmentation are pure functions of
(seed, epoch, step), so that a run can be resumed or repeated exactly.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from leanvit import imaging
from leanvit.config import FASHION_MNIST_CLASSES, Preprocess
from leanvit.errors import DataError, ImageError
from leanvit.progress import note, track

Split = Literal["train", "val"]

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
MEMORY_LIMIT_BYTES = 4 * 2**30
_TRAIN_FOLDERS = ("train", "training")
_VAL_FOLDERS = ("val", "validation", "valid", "test")


@dataclass(frozen=True)
class ImageSet:
    """Labelled images that are not decoded yet.

    sources: file paths, or uint8 arrays (height, width, 3).
    labels: (N,) int64 class indices. classes: names in the order of the indices.
    """

    name: str
    sources: list[Path] | list[NDArray[np.uint8]]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.sources)

    def subset(self, indices: NDArray[np.int64]) -> ImageSet:
        """The images at `indices`, in that order."""
        sources: Any = [self.sources[i] for i in indices]
        return replace(self, sources=sources, labels=self.labels[indices])

    def encoded(self, index: int) -> bytes:
        """Encoded bytes of one image: the file's own, or PNG for an embedded array."""
        source = self.sources[index]
        return source.read_bytes() if isinstance(source, Path) else imaging.encode_png(source)

    def pixels(self, index: int, preprocess: Preprocess) -> NDArray[np.uint8]:
        """One image decoded and resized: (*input_size, 3) uint8. Raises ImageError."""
        return imaging.resize(self.decoded(index).pixels, preprocess)

    def decoded(self, index: int) -> imaging.Decoded:
        """One image decoded to RGB. Raises ImageError."""
        source = self.sources[index]
        return imaging.decode(source) if isinstance(source, Path) else imaging.Decoded(source)


def load_split(spec: str, split: Split, *, val_fraction: float = 0.2, seed: int = 0) -> ImageSet:
    """The train or val part of a data set.

    spec: 'digits', 'fashion-mnist[:FOLDER]' or an image folder with one folder a class, either below
        train/ and val/ or all together, then `val_fraction` of every class is held out by `seed`.
    Raises DataError where the folder is missing, has no classes, or a class is empty.
    """
    if spec == "digits":
        return _hold_out(_digits(), split, val_fraction, seed)
    if spec.split(":")[0] == "fashion-mnist":
        return _fashion_mnist(Path(spec.partition(":")[2] or FASHION_MNIST_FOLDER), split)
    root = Path(spec)
    if not root.is_dir():
        raise DataError(
            f"data '{spec}': no such folder, expected an image folder with one folder a class, "
            "'digits' or 'fashion-mnist'. Check --data."
        )
    train = _first_folder(root, _TRAIN_FOLDERS)
    val = _first_folder(root, _VAL_FOLDERS)
    if train and val:
        return _split_folders(root, train, val, split)
    return _hold_out(_image_folder(root), split, val_fraction, seed)


def _first_folder(root: Path, names: tuple[str, ...]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _split_folders(root: Path, train: Path, val: Path, split: Split) -> ImageSet:
    train_set, val_set = _image_folder(train), _image_folder(val)
    if train_set.classes != val_set.classes:
        different = sorted(set(train_set.classes) ^ set(val_set.classes))
        raise DataError(
            f"{root}: classes {', '.join(different[:5])} are not in both {train.name}/ and {val.name}/, "
            "expected the same class folders in both. Add or remove them."
        )
    return train_set if split == "train" else val_set


def _image_folder(root: Path) -> ImageSet:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(folders) < 2:
        raise DataError(
            f"{root}: {len(folders)} class folders found, expected one folder a class and at least two classes. "
            "Move the images into folders named after their classes."
        )
    paths: list[Path] = []
    labels: list[int] = []
    for index, folder in enumerate(folders):
        images = sorted(p for p in folder.rglob("*") if p.suffix.lower() in imaging.SUFFIXES and p.is_file())
        if not images:
            raise DataError(
                f"{folder}: class '{folder.name}' has no images, expected at least one file ending in "
                f"{', '.join(sorted(imaging.SUFFIXES))}. Add images or remove the folder."
            )
        paths += images
        labels += [index] * len(images)
    classes = tuple(folder.name for folder in folders)
    return ImageSet(str(root), paths, np.asarray(labels, np.int64), classes)


def _digits() -> ImageSet:
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    images = list(np.repeat(grey[:, :, :, None], 3, axis=3))
    classes = tuple(str(name) for name in digits.target_names)
    return ImageSet("digits", images, digits.target.astype(np.int64), classes)


def _fashion_mnist(folder: Path, split: Split) -> ImageSet:
    stem = "train" if split == "train" else "t10k"
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels. Install the data set again.")
    if labels.size == 0 or labels.max() >= len(FASHION_MNIST_CLASSES):
        found = f"labels up to {labels.max()}" if labels.size else "no labels"
        raise DataError(f"{folder}: {found}, expected 0 to 9. Install the data set again.")
    rgb = list(np.repeat(images[:, :, :, None], 3, axis=3))
    return ImageSet("fashion-mnist", rgb, labels.astype(np.int64), FASHION_MNIST_CLASSES)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: {getattr(error, 'strerror', None) or error}, expected Fashion-MNIST in IDX format. "
            "Run: apt-get install dataset-fashion-mnist, or give the folder: fashion-mnist:FOLDER"
        ) from error
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != header + math.prod(shape):
        raise DataError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions, expected Fashion-MNIST. "
            "Install the data set again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _hold_out(images: ImageSet, split: Split, fraction: float, seed: int) -> ImageSet:
    """Hold out `fraction` of every class, at least one image."""
    generator = np.random.default_rng(seed)
    kept: list[NDArray[np.int64]] = []
    for label, name in enumerate(images.classes):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        if len(members) < 2:
            raise DataError(
                f"{images.name}: class '{name}' has {len(members)} image, expected at least two to hold one out. "
                "Add images, or give train/ and val/ folders."
            )
        held_out = min(max(1, round(fraction * len(members))), len(members) - 1)
        kept.append(members[:held_out] if split == "val" else members[held_out:])
    return images.subset(np.sort(np.concatenate(kept)))


def check_classes(found: tuple[str, ...], expected: tuple[str, ...], data: str) -> None:
    """Raise DataError where a data set's classes are not the model's, in the same order."""
    if found != expected:
        raise DataError(
            f"{data} has classes {', '.join(found[:4])}... ({len(found)}), the model was trained on "
            f"{', '.join(expected[:4])}... ({len(expected)}), in that order. Use data with the same class folders."
        )


@dataclass
class Loader:
    """Batches of an ImageSet at one preprocessing.

    Iterating gives (images, labels): images (B, H, W, 3) uint8 and labels (B,) int64, in order.
    bad: the images that could not be decoded and were left out, each once.
    """

    images: ImageSet
    preprocess: Preprocess
    batch_size: int
    bad_images: Literal["fail", "skip"] = "fail"
    memory: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        """Decode everything once where it fits into memory."""
        self.bad: list[str] = []
        self._noted: set[str] = set()
        height, width = self.preprocess.input_size
        if self.memory is None and len(self.images) * height * width * 3 <= MEMORY_LIMIT_BYTES:
            self._fill_memory()

    def _fill_memory(self) -> None:
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(self._decode, range(len(self.images)))
            tracked = track(decoded, f"reading {self.images.name}", len(self.images))
            good, pixels = self._keep(np.arange(len(self.images)), tracked)
        if len(good) < len(self.images):
            first = ", ".join(self.bad[:3])
            note(f"{self.images.name}: {len(self.bad)} of {len(self.images)} images left out: {first}")
            self._require_all_classes(good)
            self.images = self.images.subset(good)
        self.memory = np.stack(pixels)

    def _require_all_classes(self, good: NDArray[np.int64]) -> None:
        left = set(self.images.labels[good].tolist())
        lost = [name for i, name in enumerate(self.images.classes) if i not in left]
        if lost:
            raise DataError(f"{self.images.name}: class '{lost[0]}' has no readable image. Replace its files.")

    def _decode(self, index: int) -> imaging.Decoded | None:
        """One image at the input size, or None where it can't be read and is to be skipped."""
        try:
            decoded = self.images.decoded(index)
        except ImageError as error:
            if self.bad_images == "fail":
                raise ImageError(f"{error} To leave such images out: --bad-images skip") from error
            return None
        return replace(decoded, pixels=imaging.resize(decoded.pixels, self.preprocess))

    def _keep(
        self, indices: NDArray[np.int64], images: Iterable[imaging.Decoded | None]
    ) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]]]:
        """The readable ones of `images` and their indices; lists the others, and says once what was converted."""
        good: list[int] = []
        pixels: list[NDArray[np.uint8]] = []
        for index, image in zip(indices.tolist(), images, strict=True):
            source = str(self.images.sources[index]) if image is None or image.notes else ""
            if image is None:
                self.bad += [source] if source not in self.bad else []
                continue
            for sentence in set(image.notes) - self._noted:
                note(f"{source}: {sentence} (the first such image; others are treated alike)")
            self._noted |= set(image.notes)
            good.append(index)
            pixels.append(image.pixels)
        return np.asarray(good, np.int64), pixels

    def fetch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (B, H, W, 3) uint8 and labels (B,) int64 at `indices`; unreadable ones are left out."""
        if self.memory is not None:
            return torch.from_numpy(self.memory[indices]), torch.from_numpy(self.images.labels[indices])
        with ThreadPoolExecutor() as pool:
            good, pixels = self._keep(indices, pool.map(self._decode, indices.tolist()))
        batch = np.stack(pixels) if pixels else np.empty((0, *self.preprocess.input_size, 3), np.uint8)
        return torch.from_numpy(batch), torch.from_numpy(self.images.labels[good])

    def batches(self, order: NDArray[np.int64] | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in `order` (default: as stored), the next one decoded while one is used; none is empty."""
        order = np.arange(len(self.images)) if order is None else order
        chunks = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        with ThreadPoolExecutor(1) as pool:
            pending = pool.submit(self.fetch, chunks[0]) if chunks else None
            for following in [*chunks[1:], None]:
                if pending is not None:
                    batch = pending.result()
                    pending = pool.submit(self.fetch, following) if following is not None else None
                    if len(batch[1]):
                        yield batch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches in stored order."""
        return self.batches()

    def __len__(self) -> int:
        """Number of batches."""
        return math.ceil(len(self.images) / self.batch_size)


def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of one epoch: a pure function of its arguments."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def preprocess_for(model: Any, img_size: int | None = None) -> Preprocess:
    """The preprocessing that a timm model's pretrained_cfg asks for."""
    from timm.data import resolve_model_data_config

    wanted = resolve_model_data_config(model)
    size = (img_size, img_size) if img_size else wanted["input_size"][-2:]
    return Preprocess(
        input_size=size,
        mean=_three(wanted["mean"]),
        std=_three(wanted["std"]),
        interpolation=wanted["interpolation"],
        crop_pct=wanted["crop_pct"],
        crop_mode="squash" if wanted.get("crop_mode") == "squash" else "center",
    )


def _three(values: tuple[float, ...]) -> tuple[float, float, float]:
    values = tuple(float(v) for v in values) * (3 if len(values) == 1 else 1)
    return (values[0], values[1], values[2])


def to_input(images: Tensor, preprocess: Preprocess, device: torch.device | str = "cpu") -> Tensor:
    """uint8 (N, H, W, 3) to normalised float32 (N, 3, H, W) on `device`."""
    x = images.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255.0
    mean = torch.tensor(preprocess.mean, device=x.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocess.std, device=x.device).view(1, 3, 1, 1)
    return (x - mean) / std


def make_augmentation(
    *, crop_scale: tuple[float, float], degrees: float, hflip: float, size: tuple[int, int]
) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Random crop, rotation and flip as one resampling of a whole batch.

    The function that it returns takes normalised images (B, 3, H, W) and a CPU generator, and returns
    (B, 3, *size). Shares above 1 in `crop_scale` zoom out; pixels beyond the border repeat it.
    """

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(5, len(x), generator=generator)
        low, high = crop_scale
        zoom = torch.sqrt(low + (high - low) * uniform[0])
        angle = torch.deg2rad(degrees * (2 * uniform[1] - 1))
        room = (1 - zoom).clamp(min=0)
        flip = torch.where(uniform[4] < hflip, -1.0, 1.0)
        cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
        top = torch.stack([cos * flip, -sin, room * (2 * uniform[2] - 1)], dim=1)
        bottom = torch.stack([sin * flip, cos, room * (2 * uniform[3] - 1)], dim=1)
        theta = torch.stack([top, bottom], dim=1).to(x.device, non_blocking=True)
        grid = F.affine_grid(theta, [len(x), x.shape[1], *size], align_corners=False)
        return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)

    return augment
