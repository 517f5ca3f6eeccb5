"""Corrupted images, against the formulas they come from, SciPy, Pillow and colorsys; the same whatever the batches."""

from __future__ import annotations

import colorsys
import io
import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from common import smooth
from leanvit.errors import ConfigError
from leanvit.evaluation import CORRUPTIONS, corrupt
from leanvit.evaluation.corruptions import parameter_set

SMALL, LARGE = 28, 80  # below and above the size that separates the two sets of parameters
SEVERITIES = (1, 2, 3, 4, 5)
names = pytest.mark.parametrize("name", CORRUPTIONS)
severities = pytest.mark.parametrize("severity", SEVERITIES)
sizes = pytest.mark.parametrize("side", [SMALL, LARGE])


def pictures(side: int, count: int = 2) -> np.ndarray:
    """Smooth pictures with a texture, so that both a blur and a loss of colour change them."""
    rng = np.random.default_rng(side)
    base = np.stack([smooth(side, side, seed) for seed in range(count)]).astype(float)
    return np.clip(0.7 * base + 0.3 * rng.integers(0, 256, base.shape), 0, 255).astype(np.uint8)


def grey(level: int, side: int, count: int = 8) -> np.ndarray:
    return np.full((count, side, side, 3), level, np.uint8)


def within(found: np.ndarray, expected: np.ndarray, levels: float) -> bool:
    """Whether no value differs by more than `levels`; expected is float in 0 to 1, and may leave it."""
    return bool(np.abs(found - 255.0 * np.clip(expected, 0, 1)).max() <= levels)


# --- what holds for every corruption -------------------------------------------------------------------------


@names
@given(
    count=st.integers(1, 3),
    height=st.integers(8, 24),
    width=st.integers(8, 24),
    severity=st.sampled_from(SEVERITIES),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=12, deadline=None)
def test_an_image_is_corrupted_alike_in_every_batch(
    name: str, count: int, height: int, width: int, severity: int, seed: int
) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    before = images.copy()
    whole = corrupt(images, name, severity, seed=seed, first_index=5)
    assert whole.shape == images.shape
    assert whole.dtype == np.uint8
    assert np.array_equal(images, before)
    single = [corrupt(images[i : i + 1], name, severity, seed=seed, first_index=5 + i) for i in range(count)]
    assert np.array_equal(np.concatenate(single), whole)


@names
@sizes
def test_more_severity_is_more_distortion(name: str, side: int) -> None:
    images = np.stack([smooth(side, side, seed) for seed in range(3)])
    if name in ("gaussian_blur", "defocus_blur"):
        images = pictures(side)
    errors = [np.abs(corrupt(images, name, s).astype(float) - images).mean() for s in SEVERITIES]
    assert errors[0] > 0.05
    # Saturate takes colour away in severities 1 and 2 and adds some in the others.
    for part in [errors[:2], errors[2:]] if name == "saturate" else [errors]:
        assert all(b > 0.99 * a for a, b in itertools.pairwise(part)), errors
        assert part[-1] > part[0]


@names
def test_seed_and_index_matter_where_something_is_random(name: str) -> None:
    image = pictures(SMALL, 1)
    variants = [
        corrupt(image, name, 3, seed=seed, first_index=index) for seed, index in ((0, 0), (1, 0), (0, 1), (0, 0))
    ]
    random = name.endswith("noise") or name == "motion_blur"
    assert np.array_equal(variants[0], variants[3])
    assert np.array_equal(variants[0], variants[1]) == np.array_equal(variants[0], variants[2]) == (not random)


@names
def test_black_and_white_images_are_no_trouble(name: str) -> None:
    for level in (0, 255):
        found = corrupt(grey(level, SMALL, 1), name, 5)
        if not name.endswith("noise") and name not in ("brightness", "saturate"):
            assert np.abs(found.astype(int) - level).max() <= 1


def test_no_image_gives_no_image() -> None:
    assert corrupt(np.zeros((0, 8, 8, 3), np.uint8), "motion_blur", 1).shape == (0, 8, 8, 3)


def test_the_size_decides_whose_parameters_count() -> None:
    assert [parameter_set(size) for size in ((28, 28), (64, 64), (64, 65), (224, 224))] == [
        "CIFAR-10-C", "CIFAR-10-C", "ImageNet-C", "ImageNet-C",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((np.zeros((1, 8, 8, 3), np.uint8), "gausian_noise", 1), r"unknown corruption 'gausian_noise'.*Did you mean"),
        ((np.zeros((1, 8, 8, 3), np.uint8), "contrast", 0), "severity is 0, expected 1, 2, 3, 4 or 5"),
        (
            (np.zeros((8, 8, 3), np.uint8), "contrast", 1),
            r"images are uint8 \(8, 8, 3\), expected uint8 \(N, H, W, 3\)",
        ),
        ((np.zeros((1, 8, 8, 3), np.float32), "contrast", 1), "images are float32"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        corrupt(*arguments)


# --- noise: mean and spread as the formulas say, strengths as published ----------------------------------------

GAUSSIAN = {SMALL: (0.04, 0.06, 0.08, 0.09, 0.10), LARGE: (0.08, 0.12, 0.18)}  # no clipping at middle grey
SHOT = {SMALL: (500, 250, 100, 75, 50), LARGE: (60, 25)}
IMPULSE = {SMALL: (0.01, 0.02, 0.03, 0.05, 0.07), LARGE: (0.03, 0.06, 0.09, 0.17, 0.27)}


@sizes
def test_gaussian_noise_has_the_published_deviation(side: int) -> None:
    for severity, deviation in enumerate(GAUSSIAN[side], 1):
        noise = corrupt(grey(128, side), "gaussian_noise", severity) / 255 - 128 / 255
        assert abs(noise.mean()) < 5 * deviation / math.sqrt(noise.size)
        assert noise.std() == pytest.approx(deviation, rel=0.02)


@sizes
def test_shot_noise_is_poisson(side: int) -> None:
    for severity, photons in enumerate(SHOT[side], 1):
        level = 90 / 255
        found = corrupt(grey(90, side), "shot_noise", severity) / 255
        assert found.mean() == pytest.approx(level, rel=0.02)
        assert found.std() == pytest.approx(math.sqrt(level / photons), rel=0.03)


@sizes
def test_impulse_noise_is_salt_and_pepper_in_equal_shares(side: int) -> None:
    for severity, share in enumerate(IMPULSE[side], 1):
        found = corrupt(grey(100, side, 16), "impulse_noise", severity)
        assert set(np.unique(found)) == {0, 100, 255}
        deviation = math.sqrt(share / 2 / found.size)
        for value in (0, 255):
            assert abs((found == value).mean() - share / 2) < 5 * deviation


def test_noise_of_another_severity_is_the_same_noise_stronger() -> None:
    weak, strong = (corrupt(grey(128, SMALL), "gaussian_noise", s).astype(float) - 128 for s in (1, 5))
    assert np.abs(strong - 2.5 * weak).max() <= 0.5 + 2.5 * 0.5 + 0.01


def test_channels_are_noisy_on_their_own() -> None:
    for name in ("gaussian_noise", "shot_noise", "impulse_noise"):
        noise = corrupt(grey(128, SMALL), name, 3).astype(float).reshape(-1, 3)
        assert np.abs(np.corrcoef(noise.T) - np.eye(3)).max() < 0.1


# --- blur: against SciPy and sums written out --------------------------------------------------------------------

DISKS = {SMALL: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
         LARGE: ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))}  # fmt: skip


def disk(radius: float, deviation: float) -> np.ndarray:
    """The kernel point by point: each point of the disk spread over its neighbours by Gaussian weights."""
    soft = 1 if radius <= 8 else 2
    side = 2 * (math.floor(radius) + soft) + 1
    kernel = np.zeros((side, side))
    for y in range(-side, side + 1):
        for x in range(-side, side + 1):
            if x * x + y * y > radius * radius:
                continue
            for dy in range(-soft, soft + 1):
                for dx in range(-soft, soft + 1):
                    kernel[y + dy + side // 2, x + dx + side // 2] += math.exp(
                        -(dx * dx + dy * dy) / (2 * deviation**2)
                    )
    return kernel / kernel.sum()


@sizes
@severities
def test_defocus_is_a_convolution_with_a_soft_disk(side: int, severity: int) -> None:
    images = pictures(side, 1)
    kernel = disk(*DISKS[side][severity - 1])
    expected = ndimage.convolve(images[0] / 255.0, kernel[:, :, None], mode="mirror")
    assert within(corrupt(images, "defocus_blur", severity)[0], expected, 0.51)


@pytest.mark.parametrize(
    ("side", "severity", "sigma"), [(SMALL, 1, 0.4), (SMALL, 5, 1.0), (LARGE, 1, 1), (LARGE, 5, 6)]
)
def test_gaussian_blur_is_a_weighted_mean_of_rows_and_columns(side: int, severity: int, sigma: float) -> None:
    images = pictures(side, 1)
    reach = int(4 * sigma + 0.5)
    taps = np.array([math.exp(-(i**2) / (2 * sigma**2)) for i in range(-reach, reach + 1)])
    taps /= taps.sum()
    padded = np.pad(images[0] / 255.0, ((reach, reach), (reach, reach), (0, 0)), "edge")
    rows = sum(tap * padded[i : i + side] for i, tap in enumerate(taps))
    expected = sum(tap * rows[:, i : i + side] for i, tap in enumerate(taps))
    assert within(corrupt(images, "gaussian_blur", severity)[0], expected, 0.51)


MOTIONS = {SMALL: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)), LARGE: ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))}


@sizes
@severities
def test_motion_blur_is_a_correlation_with_a_line_from_the_pixel_on(side: int, severity: int) -> None:
    images = pictures(side, 3)
    radius, sigma = MOTIONS[side][severity - 1]
    found = corrupt(images, "motion_blur", severity, seed=7, first_index=40)
    angles = []
    for index, image in enumerate(images):
        angle = math.radians(np.random.default_rng((7, 40 + index)).uniform(-45, 45))
        reach = 2 * radius
        kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
        for i in range(2 * radius + 1):
            down, right = math.ceil(i * math.sin(angle) - 0.5), math.ceil(i * math.cos(angle) - 0.5)
            kernel[reach + down, reach + right] += math.exp(-i * i / (2 * sigma**2))
        expected = ndimage.correlate(image / 255.0, (kernel / kernel.sum())[:, :, None], mode="nearest")
        assert within(found[index], expected, 0.51)
        angles.append(angle)
    assert len(set(angles)) == 3


ZOOMS = {SMALL: ((1.06, 0.01), (1.26, 0.01)), LARGE: ((1.11, 0.01), (1.31, 0.03))}


@sizes
@pytest.mark.parametrize("severity", [1, 5])
def test_zoom_blur_is_the_mean_of_enlarged_images(side: int, severity: int) -> None:
    images = np.stack([smooth(side, side, 1)])
    end, step = ZOOMS[side][severity == 5]
    factors = np.arange(1, end, step)
    middle = (side - 1) / 2
    total = images[0] / 255.0
    for factor in factors:
        matrix = np.array([1 / factor, 1 / factor, 1.0])
        offset = np.array([middle - middle / factor, middle - middle / factor, 0.0])
        total = total + ndimage.affine_transform(images[0] / 255.0, matrix, offset, order=1, mode="nearest")
    # Each enlarged image is rounded to whole levels before the mean.
    assert within(corrupt(images, "zoom_blur", severity)[0], total / (len(factors) + 1), 1.0)


# --- light and digital loss --------------------------------------------------------------------------------------

LIGHT = {SMALL: (0.05, 0.1, 0.15, 0.2, 0.3), LARGE: (0.1, 0.2, 0.3, 0.4, 0.5)}
COLOUR = {SMALL: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
          LARGE: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))}  # fmt: skip
CONTRAST = {SMALL: (0.75, 0.5, 0.4, 0.3, 0.15), LARGE: (0.4, 0.3, 0.2, 0.1, 0.05)}
PIXELS = {SMALL: (0.95, 0.9, 0.85, 0.75, 0.65), LARGE: (0.6, 0.5, 0.4, 0.3, 0.25)}
QUALITY = {SMALL: (80, 65, 58, 50, 40), LARGE: (25, 18, 15, 10, 7)}
SWATCH = np.array([(0, 0, 0), (255, 255, 255), (90, 90, 90), (255, 0, 0), (3, 200, 90), (250, 251, 10), (10, 20, 30),
                   (200, 100, 100)], np.uint8)  # fmt: skip


def swatches(side: int) -> np.ndarray:
    return np.tile(SWATCH, (side * side // len(SWATCH) + 1, 1))[: side * side].reshape(1, side, side, 3)


@sizes
@severities
def test_brightness_and_saturation_are_those_of_hsv(side: int, severity: int) -> None:
    image = swatches(side)
    light = LIGHT[side][severity - 1]
    factor, added = COLOUR[side][severity - 1]
    brighter, coloured = [], []
    for pixel in SWATCH / 255.0:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        brighter.append(colorsys.hsv_to_rgb(hue, saturation, min(1.0, value + light)))
        coloured.append(colorsys.hsv_to_rgb(hue, min(1.0, saturation * factor + added), value))
    for name, expected in (("brightness", brighter), ("saturate", coloured)):
        found = corrupt(image, name, severity).reshape(-1, 3)[: len(SWATCH)]
        assert within(found, np.array(expected), 0.51), name


@sizes
@severities
def test_contrast_draws_values_to_the_mean_of_their_channel(side: int, severity: int) -> None:
    images = pictures(side)
    x = images / 255.0
    means = x.reshape(len(x), -1, 3).mean(1)[:, None, None]
    assert within(corrupt(images, "contrast", severity), means + CONTRAST[side][severity - 1] * (x - means), 0.51)


@sizes
@severities
def test_jpeg_and_pixelate_are_pillow_s(side: int, severity: int) -> None:
    images = pictures(side)
    coarse = int(side * PIXELS[side][severity - 1])
    for index, pixels in enumerate(images):
        image = Image.fromarray(pixels)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=QUALITY[side][severity - 1])
        assert np.array_equal(corrupt(images, "jpeg_compression", severity)[index], np.asarray(Image.open(file)))
        small = image.resize((coarse, coarse), Image.Resampling.BOX).resize((side, side), Image.Resampling.BOX)
        assert np.array_equal(corrupt(images, "pixelate", severity)[index], np.asarray(small))
