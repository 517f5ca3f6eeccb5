"""Corrupted images, computed when they are needed: noise, blur, light and digital loss in five severities.

Definitions and parameters are those of ImageNet-C and CIFAR-10-C: Hendrycks and Dietterich, Benchmarking Neural
Network Robustness to Common Corruptions and Perturbations, ICLR 2019, arXiv 1903.12261. Images up to 64 pixels a side
take the parameters of CIFAR-10-C (32 pixels), larger ones those of ImageNet-C (224 pixels), both in pixels as they are.
Randomness is a function of (seed, index of the image), the same in all severities, so that these differ in strength
alone and not in luck. Left out: frost, snow, fog, spatter, glass and elastic, which need pictures of frost or as much
program again.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, signal

from leanvit.config import Corruption
from leanvit.errors import ConfigError, did_you_mean

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]
Severities = tuple[Any, Any, Any, Any, Any]

CORRUPTIONS: tuple[str, ...] = tuple(name for name in get_args(Corruption) if name != "all")
SMALL_SIDE = 64
"""Largest side in pixels that takes the parameters of CIFAR-10-C."""

_CIFAR: dict[str, Severities] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "shot_noise": (500, 250, 100, 75, 50),
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),
    "jpeg_compression": (80, 65, 58, 50, 40),
}
_IMAGENET: dict[str, Severities] = {
    "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
    "shot_noise": (60, 25, 12, 5, 3),
    "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
    "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    "gaussian_blur": (1, 2, 3, 4, 6),
    "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
    "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
    "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    "pixelate": (0.6, 0.5, 0.4, 0.3, 0.25),
    "jpeg_compression": (25, 18, 15, 10, 7),
}


def corrupt(images: Pixels, name: str, severity: int, *, seed: int = 0, first_index: int = 0) -> Pixels:
    """A batch of images, corrupted: a pure function of the arguments, whatever the batches are.

    images: (N, H, W, 3) uint8, RGB, prepared. name: one of CORRUPTIONS. severity: 1 to 5.
    first_index: place of the first image in its data set; image i takes the noise of (seed, first_index + i).
    Returns (N, H, W, 3) uint8. Raises ConfigError for an unknown name or severity, or images of another kind.
    """
    if name not in _DEGRADE:
        raise ConfigError(
            f"unknown corruption '{name}', expected one of {', '.join(CORRUPTIONS)}.{did_you_mean(name, CORRUPTIONS)}"
        )
    if severity not in (1, 2, 3, 4, 5):
        raise ConfigError(f"severity is {severity}, expected 1, 2, 3, 4 or 5")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ConfigError(f"images are {images.dtype} {images.shape}, expected uint8 (N, H, W, 3)")
    if not len(images):
        return images.copy()
    amount = parameters(images.shape[1:3])[name][severity - 1]
    generators = [np.random.default_rng((seed, first_index + i)) for i in range(len(images))]
    degraded = _DEGRADE[name](images, amount, generators)
    return np.rint(np.clip(degraded, 0.0, 1.0) * 255.0).astype(np.uint8)


def parameters(size: tuple[int, int]) -> dict[str, Severities]:
    """Strength of every corruption in the five severities for images of `size` (H, W) in pixels."""
    return _CIFAR if max(size) <= SMALL_SIDE else _IMAGENET


def parameter_set(size: tuple[int, int]) -> str:
    """Name of the data set whose parameters images of `size` (H, W) take."""
    return "CIFAR-10-C" if parameters(size) is _CIFAR else "ImageNet-C"


def _unit(images: Pixels) -> Floats:
    return images.astype(np.float32) / np.float32(255.0)


def _gaussian_noise(images: Pixels, deviation: float, generators: Sequence[Generator]) -> Floats:
    noise = [rng.standard_normal(images.shape[1:], np.float32) for rng in generators]
    return _unit(images) + np.float32(deviation) * np.stack(noise)


def _shot_noise(images: Pixels, photons: float, generators: Sequence[Generator]) -> Floats:
    """Photons that arrive are Poisson distributed; `photons` is their mean number at white."""
    counts = [rng.poisson(x * photons) for x, rng in zip(_unit(images), generators, strict=True)]
    return (np.stack(counts) / photons).astype(np.float32)


def _impulse_noise(images: Pixels, share: float, generators: Sequence[Generator]) -> Floats:
    """A share of all values becomes 0 or 1, as often the one as the other, each channel of its own."""
    draws = np.stack([rng.random(images.shape[1:], np.float32) for rng in generators])
    x = _unit(images)
    x[draws < share] = 0.0
    x[draws < share / 2] = 1.0
    return x


def _defocus_blur(images: Pixels, lens: tuple[float, float], generators: Sequence[Generator]) -> NDArray[np.float64]:
    kernel = defocus_kernel(*lens)
    margin = len(kernel) // 2
    # In float64, because in float32 the rounding of the transform depends on the number of images.
    padded = np.pad(images / 255.0, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "reflect")
    # In the frequency domain: the largest disk has 441 taps.
    blurred = signal.fftconvolve(padded, kernel[None, :, :, None], mode="valid", axes=(1, 2))
    return np.asarray(blurred)


def defocus_kernel(radius: float, deviation: float) -> NDArray[np.float64]:
    """A disk of `radius` pixels with edges softened by a Gaussian: (side, side) float64 that sums to 1."""
    reach, soft = math.floor(radius), 1 if radius <= 8 else 2
    grid = np.arange(-reach, reach + 1)
    disk = (grid[:, None] ** 2 + grid[None, :] ** 2 <= radius**2).astype(np.float64)
    taps = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * deviation**2))
    kernel = signal.convolve2d(disk, np.outer(taps, taps))
    return np.asarray(kernel / kernel.sum(), np.float64)


def _gaussian_blur(images: Pixels, deviation: float, generators: Sequence[Generator]) -> Floats:
    sigma = (0, deviation, deviation, 0)
    return np.asarray(ndimage.gaussian_filter(_unit(images), sigma, mode="nearest", truncate=4.0), np.float32)


def _motion_blur(images: Pixels, motion: tuple[int, float], generators: Sequence[Generator]) -> Floats:
    radius, deviation = motion
    angles = [math.radians(rng.uniform(-45, 45)) for rng in generators]
    return np.stack([_moved(x, radius, deviation, angle) for x, angle in zip(_unit(images), angles, strict=True)])


def _moved(image: Floats, radius: int, deviation: float, angle: float) -> Floats:
    """Weighted sum of shifted images, borders repeated; (H, W, 3) in 0 to 1."""
    steps, weights = motion_path(radius, deviation, angle)
    reach = int(np.abs(steps).max())
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), "edge")
    height, width = image.shape[:2]
    blurred = np.zeros_like(image)
    for (down, right), weight in zip((steps + reach).tolist(), weights, strict=True):
        blurred += weight * padded[down : down + height, right : right + width]
    return blurred


def motion_path(radius: int, deviation: float, angle: float) -> tuple[NDArray[np.int64], Floats]:
    """Where a pixel was while the shutter was open, as ImageMagick's motion blur has it.

    Returns offsets (2 radius + 1, 2) of whole pixels, down and right, on one side of the pixel in the direction
    `angle` (radians), and their weights: half a Gaussian of `deviation` pixels, which sum to 1.
    """
    distance = np.arange(2 * radius + 1)
    offsets = np.stack([distance * math.sin(angle), distance * math.cos(angle)], axis=1)
    weights = np.exp(-(distance**2) / (2 * deviation**2))
    return np.ceil(offsets - 0.5).astype(np.int64), (weights / weights.sum()).astype(np.float32)


def _zoom_blur(images: Pixels, zooms: tuple[float, float], generators: Sequence[Generator]) -> Floats:
    """Mean of the image and of itself enlarged in steps about its middle, which stays where it is."""
    end, step = zooms
    factors = np.arange(1, end, step)
    height, width = images.shape[1:3]
    total = _unit(images)
    for factor in factors.tolist():
        across, down = width / factor, height / factor
        left, top = (width - across) / 2, (height - down) / 2
        resize = partial(_resize_box, box=(left, top, left + across, top + down))
        total += _unit(_each(images, resize))
    return total / np.float32(len(factors) + 1)


def _resize_box(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def _brightness(images: Pixels, amount: float, generators: Sequence[Generator]) -> Floats:
    """More value in the HSV model: all channels grow by one factor; black becomes grey."""
    x = _unit(images)
    value = x.max(axis=3, keepdims=True)
    brighter = np.clip(value + np.float32(amount), 0, 1)
    return np.where(value > 0, x * (brighter / np.maximum(value, 1e-12)), brighter)


def _contrast(images: Pixels, amount: float, generators: Sequence[Generator]) -> Floats:
    x = _unit(images)
    means = x.mean(axis=(1, 2), keepdims=True)
    return (x - means) * np.float32(amount) + means


def _saturate(images: Pixels, change: tuple[float, float], generators: Sequence[Generator]) -> Floats:
    """Another saturation in the HSV model; grey, whose hue counts as red, turns reddish where something is added."""
    factor, added = change
    x = _unit(images)
    value = x.max(axis=3, keepdims=True)
    chroma = value - x.min(axis=3, keepdims=True)
    saturation = chroma / np.maximum(value, 1e-12)
    wanted = np.clip(saturation * np.float32(factor) + np.float32(added), 0, 1)
    red = np.array([0, 1, 1], np.float32)
    missing = np.where(chroma > 0, (value - x) / np.maximum(chroma, 1e-12), red)
    return value * (1 - wanted * missing)


def _pixelate(images: Pixels, scale: float, generators: Sequence[Generator]) -> Floats:
    height, width = images.shape[1:3]
    coarse = (max(1, int(width * scale)), max(1, int(height * scale)))
    box = Image.Resampling.BOX
    return _unit(_each(images, lambda x: x.resize(coarse, box).resize((width, height), box)))


def _jpeg_compression(images: Pixels, quality: int, generators: Sequence[Generator]) -> Floats:
    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _unit(_each(images, compress))


def _each(images: Pixels, change: Callable[[Image.Image], Image.Image]) -> Pixels:
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


_DEGRADE: dict[str, Callable[[Pixels, Any, Sequence[Generator]], NDArray[np.floating]]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "gaussian_blur": _gaussian_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "brightness": _brightness,
    "contrast": _contrast,
    "saturate": _saturate,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
