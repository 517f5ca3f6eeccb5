"""Pictures of one and of four channels: decoded, resized and normalised as the network takes them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from leanvit import imaging
from leanvit.checkpoint import build, preprocess_for
from leanvit.config import Preprocess
from leanvit.data.loader import to_input
from leanvit.errors import ImageError, ShapeError

GREY = Preprocess((8, 10), (0.4,), (0.2,))
FOUR = Preprocess((8, 10), (0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8))


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_a_colour_picture_is_grey_by_pillows_rule_before_it_is_resized() -> None:
    colour = noise(8, 10, 3)
    wanted = np.asarray(Image.fromarray(colour).convert("L"))[..., None]
    assert np.array_equal(imaging.load(png(colour), GREY), wanted)
    assert np.array_equal(imaging.resize(colour, GREY), wanted)
    larger = noise(40, 50, 3)
    assert np.array_equal(imaging.load(png(larger), GREY), imaging.resize(larger, GREY))


def test_a_grey_picture_stays_as_it_is() -> None:
    grey = noise(8, 10)
    assert np.array_equal(imaging.load(png(grey), GREY), grey[..., None])


def test_the_fourth_band_is_a_channel_and_no_transparency() -> None:
    bands = noise(8, 10, 4)
    bands[..., 3] //= 8
    assert np.array_equal(imaging.load(png(bands), FOUR), bands)
    assert np.array_equal(imaging.decode(png(bands), channels=4).pixels, bands)
    larger = noise(40, 50, 4)
    each = [np.asarray(Image.fromarray(larger[..., i]).resize((10, 8), Image.Resampling.BICUBIC)) for i in range(4)]
    assert np.array_equal(imaging.load(png(larger), FOUR), np.stack(each, 2))
    assert np.array_equal(imaging.resize(larger, FOUR), np.stack(each, 2))


def test_a_four_band_tiff_is_read(tmp_path: Path) -> None:
    bands = noise(8, 10, 4)
    Image.fromarray(bands).save(tmp_path / "x.tif")
    assert np.array_equal(imaging.load(tmp_path / "x.tif", FOUR), bands)


def test_a_colour_picture_for_four_channels_is_refused_with_both_numbers() -> None:
    with pytest.raises(ImageError, match=r"x.png: 3 channels \(RGB\), expected 4"):
        imaging.load(png(noise(8, 10, 3)), FOUR, "x.png")
    with pytest.raises(ImageError, match="has 3 channels, the network takes 4"):
        imaging.resize(noise(8, 10, 3), FOUR)


@pytest.mark.parametrize("preprocess", [GREY, FOUR])
def test_each_channel_has_its_own_mean_and_deviation(preprocess: Preprocess) -> None:
    pixels = noise(2, 8, 10, preprocess.channels)
    mean, std = np.array(preprocess.mean), np.array(preprocess.std)
    wanted = ((pixels / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    assert np.abs(to_input(torch.from_numpy(pixels), preprocess).numpy() - wanted).max() < 1e-5
    assert np.abs(imaging.normalize(pixels, preprocess) - wanted).max() < 1e-5
    with pytest.raises(ShapeError, match="images have 2 channels, the preprocessing has 4"):
        to_input(torch.from_numpy(noise(1, 8, 10, 2)), FOUR)


def test_preprocessing_has_the_channels_and_the_size_that_a_network_is_built_for() -> None:
    found = preprocess_for(build("vit_micro", 2, depth=1, in_chans=1, img_size=(16, 32)))
    assert (found.channels, found.input_size) == (1, (16, 32))
    assert found.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    four = preprocess_for(build("vit_micro", 2, depth=1, in_chans=4))
    assert four.mean[:3] == (0.485, 0.456, 0.406)
    assert four.channels == 4
