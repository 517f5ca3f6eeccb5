"""Images: decoding against formulas in float64, resizing against torchvision and timm, damage against one error."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from torchvision import transforms

from common import save_image, smooth
from leanvit import imaging
from leanvit.config import Preprocess
from leanvit.errors import ImageError
from leanvit.imaging import crop_resize, decode, encode_png, load, normalize, random_box, resize

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (23, 37, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray, format: str, **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# --- decode: the formats -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "options"),
    [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})],
)
def test_lossless_formats_give_the_very_pixels(format: str, options: dict[str, Any]) -> None:
    decoded = decode(encode(NOISE, format, **options))
    assert decoded.pixels.dtype == np.uint8
    assert decoded.notes == ()
    np.testing.assert_array_equal(decoded.pixels, NOISE)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_give_the_picture(format: str) -> None:
    picture = smooth(60, 80, seed=1)
    found = decode(encode(picture, format, quality=95)).pixels
    assert np.abs(found.astype(int) - picture).mean() < 4
    assert decode(encode(picture, format, quality=95)).notes == ()


def test_grey_and_black_and_white_become_three_equal_channels() -> None:
    grey = NOISE[:, :, 0]
    np.testing.assert_array_equal(decode(encode(grey, "PNG")).pixels, np.repeat(grey[:, :, None], 3, axis=2))
    black_and_white = Image.fromarray(grey > 127)
    assert black_and_white.mode == "1"
    expected = np.repeat(np.where(grey > 127, 255, 0)[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(decode(encode(black_and_white, "PNG")).pixels, expected)


def test_path_and_bytes_give_the_same(tmp_path: Path) -> None:
    path = save_image(tmp_path / "a.png", NOISE)
    for source in (path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(decode(source).pixels, NOISE)


@pytest.mark.parametrize("format", ["WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_several_is_used(format: str) -> None:
    first, second = (Image.fromarray(np.full((8, 9, 3), value, np.uint8)) for value in (30, 200))
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(first, format, save_all=True, append_images=[second], **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 2
    np.testing.assert_array_equal(decode(data).pixels, np.full((8, 9, 3), 30))


# --- decode: what Pillow would do in silence -----------------------------------------------------------------

ALL_16_BIT = np.arange(65536, dtype=np.uint16).reshape(256, 256)


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_every_16_bit_value_is_scaled_to_the_nearest_8_bit_one(format: str) -> None:
    decoded = decode(encode(ALL_16_BIT, format))
    truth = np.rint(ALL_16_BIT.astype(np.float64) / 65535.0 * 255.0)
    for channel in range(3):
        np.testing.assert_array_equal(decoded.pixels[:, :, channel], truth)
    assert decoded.notes == ("16-bit image scaled to 8 bits",)


def test_a_big_endian_16_bit_tiff_is_scaled_as_well() -> None:
    image = Image.frombytes("I;16B", (256, 256), ALL_16_BIT.astype(">u2").tobytes())
    truth = np.rint(ALL_16_BIT.astype(np.float64) / 65535.0 * 255.0)
    np.testing.assert_array_equal(decode(encode(image, "TIFF")).pixels[:, :, 0], truth)


def test_a_floating_point_tiff_is_stretched_over_its_own_range() -> None:
    values = np.linspace(-2.5, 7.5, 35, dtype=np.float32).reshape(5, 7)
    decoded = decode(encode(values, "TIFF"))
    truth = np.rint((values.astype(np.float64) + 2.5) / 10.0 * 255.0)
    assert np.abs(decoded.pixels[:, :, 1] - truth).max() <= 1
    assert decoded.notes == ("floating-point image scaled to 8 bits",)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_floating_point_tiff_that_is_not_finite_still_gives_pixels(value: float) -> None:
    values = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
    values[2, 2] = value
    assert decode(encode(values, "TIFF")).pixels.shape == (5, 7, 3)


def test_cmyk_is_converted_by_the_formula_without_a_profile() -> None:
    cmyk = RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    decoded = decode(encode(Image.fromarray(cmyk, "CMYK"), "TIFF"))
    ink = cmyk.astype(np.float64) / 255.0
    truth = 255.0 * (1 - ink[:, :, :3]) * (1 - ink[:, :, 3:])
    assert np.abs(decoded.pixels - truth).max() <= 1
    assert decoded.notes == ("CMYK image converted to RGB without its colour profile",)


@pytest.mark.parametrize("ink", [(255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255), (0, 0, 0, 0)])
def test_a_cmyk_jpeg_is_not_inverted(ink: tuple[int, int, int, int]) -> None:
    decoded = decode(encode(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95))
    truth = [255 * (1 - c / 255) * (1 - ink[3] / 255) for c in ink[:3]]
    assert np.abs(decoded.pixels.astype(float) - truth).max() <= 4
    assert len(decoded.notes) == 1


def orient(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """How a viewer shows stored pixels with this EXIF orientation."""
    shown: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
        8: np.rot90,
    }
    return shown[orientation](pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_the_orientation_tag_is_obeyed(orientation: int, format: str) -> None:
    picture = smooth(24, 40, seed=2)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 98, "subsampling": 0}}.get(format, {})
    found = decode(encode(picture, format, exif=exif, **options)).pixels
    truth = orient(picture, orientation)
    assert found.shape == truth.shape
    assert np.abs(found.astype(int) - truth).max() <= (16 if format == "JPEG" else 0)


def laid_on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha.astype(np.float64)[:, :, None] / 255.0
    return share * colour + (1 - share) * 255.0


def test_transparency_is_laid_on_white() -> None:
    rgba = RNG.integers(0, 256, (16, 16, 4), dtype=np.uint8)
    decoded = decode(encode(rgba, "PNG"))
    assert np.abs(decoded.pixels - laid_on_white(rgba[:, :, :3], rgba[:, :, 3])).max() <= 1
    assert decoded.notes == ("transparent image laid on white",)


def test_grey_with_transparency_is_laid_on_white() -> None:
    la = RNG.integers(0, 256, (16, 16, 2), dtype=np.uint8)
    decoded = decode(encode(Image.fromarray(la, "LA"), "PNG"))
    assert np.abs(decoded.pixels - laid_on_white(la[:, :, :1], la[:, :, 1])).max() <= 1


def test_an_alpha_channel_without_transparency_is_not_worth_a_note() -> None:
    rgba = np.dstack([NOISE, np.full(NOISE.shape[:2], 255, np.uint8)])
    decoded = decode(encode(rgba, "PNG"))
    np.testing.assert_array_equal(decoded.pixels, NOISE)
    assert decoded.notes == ()


@pytest.mark.parametrize("transparency", [None, 2, bytes([255, 128, 0, 10])])
def test_a_palette_gives_its_colours_and_its_transparent_entries_white(transparency: int | bytes | None) -> None:
    colours = np.array([(10, 20, 30), (200, 100, 0), (5, 250, 90), (70, 70, 70)], np.uint8)
    indices = RNG.integers(0, 4, (12, 15), dtype=np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    decoded = decode(encode(image, "PNG", **options))
    alpha = np.full(4, 255)
    if isinstance(transparency, int):
        alpha[transparency] = 0
    elif transparency is not None:
        alpha = np.frombuffer(transparency, np.uint8)
    assert np.abs(decoded.pixels - laid_on_white(colours[indices], alpha[indices])).max() <= 1
    assert bool(decoded.notes) == (transparency is not None)


# --- decode: what is refused ---------------------------------------------------------------------------------


def png_header(width: int, height: int) -> bytes:
    """A PNG that says how large it is and ends before its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + struct.pack(">I", 9) + b"IDAT"


@pytest.mark.parametrize("size", [(10_001, 10_000), (20_000, 20_000), (2_000_000_000, 2)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(size: tuple[int, int]) -> None:
    with pytest.raises(ImageError, match=r"^bomb: .*expected at most 100,000,000 .*Downscale it first"):
        decode(png_header(*size), "bomb")


def test_a_hundred_million_pixels_are_not_too_many() -> None:
    with pytest.raises(ImageError, match="damaged"):
        decode(png_header(10_000, 10_000))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1)])
def test_a_side_of_one_pixel_is_refused(height: int, width: int) -> None:
    with pytest.raises(ImageError, match=f"^dot: {width} x {height} pixels, expected at least 2 on each side"):
        decode(encode(np.zeros((height, width, 3), np.uint8), "PNG"), "dot")


def test_two_by_two_pixels_are_enough() -> None:
    assert decode(encode(np.zeros((2, 2, 3), np.uint8), "PNG")).pixels.shape == (2, 2, 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", encode(NOISE, "GIF"), encode(NOISE, "PPM"), b"%!PS"],
)
def test_a_file_of_another_kind_is_refused(data: bytes) -> None:
    with pytest.raises(ImageError, match=r"^x: not an image .*, expected JPEG, PNG, WebP, BMP or TIFF"):
        decode(data, "x")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none.png: No such file or directory"):
        decode(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Is a directory"):
        decode(tmp_path)


PICTURE = smooth(33, 47, seed=3)
REAL = {
    "png": encode(PICTURE, "PNG"),
    "jpeg": encode(PICTURE, "JPEG"),
    "progressive": encode(PICTURE, "JPEG", progressive=True),
    "webp": encode(PICTURE, "WEBP"),
    "bmp": encode(PICTURE, "BMP"),
    "tiff": encode(PICTURE, "TIFF"),
    "lzw": encode(PICTURE, "TIFF", compression="tiff_lzw"),
    "deep": encode(ALL_16_BIT[:40], "PNG"),
    "palette": encode(Image.fromarray(PICTURE).quantize(16), "PNG", transparency=3),
    "cmyk": encode(Image.fromarray(PICTURE).convert("CMYK"), "JPEG"),
    "exif": encode(PICTURE, "JPEG", exif=bytes.fromhex("4578696600004d4d002a00000008000101120003000000010006")),
}


def pixels_or_image_error(data: bytes) -> None:
    try:
        pixels = decode(data, "some image").pixels
    except ImageError as error:
        line = str(error)
        assert line.startswith("some image: ")
        assert "\n" not in line
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3
    assert min(pixels.shape) >= 2


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged headers must not make a fuzz test allocate gigabytes."""
    monkeypatch.setattr(imaging, "MAX_PIXELS", 1_000_000)


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("kind", REAL)
def test_an_image_cut_anywhere_gives_pixels_or_an_image_error(kind: str) -> None:
    data = REAL[kind]
    for length in range(0, len(data), max(1, len(data) // 60)):
        pixels_or_image_error(data[:length])


@pytest.mark.usefixtures("small_limit")
@pytest.mark.parametrize("kind", REAL)
def test_changed_bytes_give_pixels_or_an_image_error(kind: str) -> None:
    data, rng = REAL[kind], np.random.default_rng(len(REAL[kind]))
    for number in range(150):
        damaged = bytearray(data)
        # Half of the damage goes to the header, where it does most.
        end = len(data) if number % 2 else min(len(data), 120)
        for position in rng.integers(0, end, rng.integers(1, 6)):
            damaged[position] = rng.integers(0, 256)
        pixels_or_image_error(bytes(damaged))


@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x40\0\0\0WEBP", b"BM", b"II*\0"]),
    rest=st.binary(max_size=200),
)
def test_any_bytes_give_pixels_or_an_image_error(start: bytes, rest: bytes) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(imaging, "MAX_PIXELS", 1_000_000)
        pixels_or_image_error(start + rest)


# --- resize, load, normalize ---------------------------------------------------------------------------------

MODES = {
    "bilinear": transforms.InterpolationMode.BILINEAR,
    "bicubic": transforms.InterpolationMode.BICUBIC,
    "lanczos": transforms.InterpolationMode.LANCZOS,
    "nearest": transforms.InterpolationMode.NEAREST,
}
Filter = Literal["nearest", "bilinear", "bicubic", "lanczos"]


@settings(max_examples=80, deadline=None)
@given(
    height=st.integers(2, 150),
    width=st.integers(2, 150),
    size=st.sampled_from([7, 32, 33, 64]),
    interpolation=st.sampled_from(list(MODES)),
)
def test_resize_and_crop_are_those_of_torchvision(height: int, width: int, size: int, interpolation: Filter) -> None:
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    steps = [transforms.Resize(size, MODES[interpolation]), transforms.CenterCrop(size)]
    truth = np.asarray(transforms.Compose(steps)(Image.fromarray(pixels)))
    found = resize(pixels, Preprocess(input_size=(size, size), interpolation=interpolation))
    assert np.abs(found.astype(int) - truth).max() <= 1


@pytest.mark.parametrize("crop_pct", [0.875, 0.888, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(97, 131), (131, 97), (64, 64), (300, 41), (20, 31)])
def test_preprocessing_is_that_of_timm_for_every_crop_pct(crop_pct: float, shape: tuple[int, int]) -> None:
    from timm.data import create_transform

    pixels = smooth(*shape, seed=4)
    timms = create_transform(
        (3, 64, 64), interpolation="bicubic", crop_pct=crop_pct, crop_mode="center", normalize=False
    )
    truth = np.asarray(timms(Image.fromarray(pixels))).transpose(1, 2, 0)
    found = resize(pixels, Preprocess(input_size=(64, 64), crop_pct=crop_pct))
    assert np.abs(found.astype(int) - truth).max() <= 1


def test_squash_resizes_both_sides_as_torchvision_does() -> None:
    pixels = smooth(50, 90, seed=5)
    truth = transforms.Resize((32, 48), MODES["bicubic"])(Image.fromarray(pixels))
    found = resize(pixels, Preprocess(input_size=(32, 48), crop_mode="squash"))
    assert np.abs(found.astype(int) - np.asarray(truth)).max() <= 1


def test_an_image_of_the_right_size_stays_as_it_is() -> None:
    for mode in ("center", "squash"):
        np.testing.assert_array_equal(resize(NOISE, Preprocess(input_size=(23, 37), crop_mode=mode)), NOISE)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    crop_pct=st.floats(0.3, 1.0),
    crop_mode=st.sampled_from(["center", "squash"]),
)
def test_every_image_comes_out_at_the_input_size_and_one_colour_stays_that_colour(
    shape: tuple[int, int], size: tuple[int, int], crop_pct: float, crop_mode: Literal["center", "squash"]
) -> None:
    pixels = np.full((*shape, 3), (12, 130, 250), np.uint8)
    found = resize(pixels, Preprocess(input_size=size, crop_pct=crop_pct, crop_mode=crop_mode))
    assert found.flags.c_contiguous
    np.testing.assert_array_equal(found, np.full((*size, 3), (12, 130, 250), np.uint8))


@pytest.mark.parametrize("shape", [(2, 400_000), (400_000, 2)])
def test_a_thin_strip_needs_no_gigabytes_and_gives_its_middle(shape: tuple[int, int]) -> None:
    strip = np.zeros((*shape, 3), np.uint8)
    middle = (slice(None), slice(199_000, 201_000)) if shape[0] == 2 else (slice(199_000, 201_000), slice(None))
    strip[middle] = (9, 99, 199)
    found = resize(strip, Preprocess(input_size=(224, 224)))
    np.testing.assert_array_equal(found, np.full((224, 224, 3), (9, 99, 199), np.uint8))


def test_the_way_of_thin_strips_agrees_with_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, preprocess = smooth(60, 200, seed=6), Preprocess(input_size=(32, 32), crop_pct=0.9)
    usual = resize(pixels, preprocess)
    monkeypatch.setattr(imaging, "MAX_PIXELS", 0)
    assert np.abs(resize(pixels, preprocess).astype(int) - usual).max() <= 1


def test_load_is_decode_then_resize(tmp_path: Path) -> None:
    preprocess = Preprocess(input_size=(20, 20))
    path = save_image(tmp_path / "a.png", NOISE)
    truth = transforms.Compose([transforms.Resize(20, MODES["bicubic"]), transforms.CenterCrop(20)])
    expected = np.asarray(truth(Image.fromarray(NOISE)))
    assert np.abs(load(path, preprocess).astype(int) - expected).max() <= 1
    with pytest.raises(ImageError, match=r"^my name: "):
        load(b"", preprocess, "my name")


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_resized_while_it_was_decoded_is_decode_then_resize(channels: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(smooth(24, 40, seed=2), format, exif=exif)
    preprocess = Preprocess(input_size=(16, 12), mean=(0.5,) * channels, std=(0.5,) * channels, crop_pct=0.9)
    whole, found = decode(encoded), imaging.decode_resized(encoded, preprocess)
    assert whole.size == found.size == (40, 24)
    grey = np.asarray(Image.fromarray(whole.pixels).convert("L"))[:, :, None]
    np.testing.assert_array_equal(found.pixels, resize(grey if channels == 1 else whole.pixels, preprocess))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), mean=st.floats(0, 1), std=st.floats(0.01, 1))
def test_normalize_is_the_formula_in_float64(seed: int, mean: float, std: float) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    preprocess = Preprocess(input_size=(5, 4), mean=(mean, 0.456, 0.1), std=(0.2, std, 0.9))
    found = normalize(images, preprocess)
    assert found.shape == (2, 3, 5, 4)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    for channel in range(3):
        truth = (images[:, :, :, channel].astype(np.float64) / 255 - preprocess.mean[channel]) / preprocess.std[channel]
        np.testing.assert_allclose(found[:, channel], truth, rtol=1e-5, atol=1e-5)


def test_png_keeps_every_pixel() -> None:
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(encode_png(NOISE)))), NOISE)


# --- random parts for training -------------------------------------------------------------------------------

INCEPTION = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3)}


def two_rising(low: float, high: float) -> st.SearchStrategy[tuple[float, float]]:
    return st.tuples(st.floats(low, high), st.floats(low, high)).map(lambda pair: (min(pair), max(pair)))


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(2, 900), height=st.integers(2, 900), seed=st.integers(0, 2**32),
    scale=two_rising(0.01, 1), ratio=two_rising(0.3, 3),
)  # fmt: skip
def test_a_random_box_lies_in_the_image_with_a_share_and_a_shape_as_asked(
    width: int, height: int, seed: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    left, top, right, bottom = random_box((width, height), np.random.default_rng(seed), scale, ratio)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down = right - left, bottom - top
    # Sides are rounded to whole pixels; the box that is taken where none fits keeps the shape only.
    assert (across - 1) / (down + 1) <= ratio[1]
    assert (across + 1) / max(down - 1, 0.5) >= ratio[0]
    assert (across - 1) * (down - 1) <= scale[1] * width * height or across == width or down == height


@pytest.mark.parametrize("size", [(500, 375), (200, 600)])
def test_random_boxes_are_distributed_as_those_of_torchvision(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    ours = [random_box(size, rng, **INCEPTION) for _ in range(4000)]
    torch.manual_seed(0)
    blank = torch.empty(3, size[1], size[0])
    drawn = [transforms.RandomResizedCrop.get_params(blank, *map(list, INCEPTION.values())) for _ in range(4000)]
    theirs = [(left, top, left + width, top + height) for top, left, height, width in drawn]
    for mine, other in zip(np.array(ours).T, np.array(theirs).T, strict=True):
        assert ks_2samp(mine, other).pvalue > 1e-3


@pytest.mark.parametrize("size", [(1000, 10), (10, 1000), (640, 480)])
def test_where_no_box_fits_it_is_the_middle_one_of_torchvision(size: tuple[int, int]) -> None:
    options = {"scale": (4.0, 4.0), "ratio": (3 / 4, 4 / 3)}
    left, top, right, bottom = random_box(size, np.random.default_rng(0), **options)
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, size[1], size[0]), *map(list, options.values()))
    assert (top, left, bottom - top, right - left) == theirs


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("seed", range(4))
def test_a_random_part_is_cut_out_and_resized(seed: int, interpolation: Filter) -> None:
    picture = smooth(120, 160, seed=seed)
    options = ((40, 48), (0.3, 1.0), (0.5, 2.0))
    box = random_box((160, 120), np.random.default_rng(seed), *options[1:])
    found = crop_resize(encode(picture, "PNG"), np.random.default_rng(seed), *options, interpolation).pixels
    truth = Image.fromarray(picture).crop(box).resize((48, 40), getattr(Image.Resampling, interpolation.upper()))
    assert found.dtype == np.uint8
    # At its edges the filter sees the pixels around the part, which a cut-out has lost.
    assert np.abs(found.astype(int) - np.asarray(truth))[4:-4, 4:-4].max() <= 1
    assert np.abs(found.astype(int) - np.asarray(truth)).max() < 25


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("format", "side"), [("JPEG", 60), ("JPEG", 400), ("PNG", 60), ("TIFF", 60)])
def test_a_random_part_of_a_turned_picture_is_that_of_the_upright_one(orientation: int, format: str, side: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(smooth(side, side * 2, seed=2)), format, exif=exif)
    upright = decode(data).pixels
    assert upright.shape[:2] == ((side, 2 * side) if orientation < 5 else (2 * side, side))
    for seed in range(3):
        found = crop_resize(data, np.random.default_rng(seed), (40, 48), (0.5, 1.0)).pixels.astype(int)
        truth = crop_resize(upright, np.random.default_rng(seed), (40, 48), (0.5, 1.0)).pixels
        assert np.abs(found - truth).mean() < (2 if side == 400 else 0.01)


def test_a_large_jpeg_is_decoded_coarsely_but_not_below_the_input_size(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = smooth(1000, 1400, seed=3)
    data = encode(picture, "JPEG", quality=95)
    decoded: list[tuple[int, int, Any]] = []
    resize_image = Image.Image.resize

    def spy(image: Image.Image, *arguments: Any, **options: Any) -> Image.Image:
        decoded.append((*image.size, options["box"]))
        return resize_image(image, *arguments, **options)

    seen = set()
    for seed in range(30):
        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "resize", spy)
            found = crop_resize(data, np.random.default_rng(seed), (64, 64), (0.02, 1.0)).pixels.astype(int)
        width, height, box = decoded.pop()
        step = round(1400 / width)
        assert (width, height) == (-(-1400 // step), -(-1000 // step))
        whole = random_box((1400, 1000), np.random.default_rng(seed), (0.02, 1.0), (3 / 4, 4 / 3))
        np.testing.assert_allclose(box, np.array(whole) / step, atol=1)
        side = min(box[2] - box[0], box[3] - box[1])
        assert side >= 64 - 1e-9
        assert side < 129 or step == 8
        truth = Image.fromarray(picture).resize((64, 64), Image.Resampling.BICUBIC, box=whole)
        assert np.abs(found - np.asarray(truth)).mean() < 3
        seen.add(step)
    assert seen == {2, 4, 8}


def test_a_random_part_keeps_notes_and_errors() -> None:
    deep = encode(Image.fromarray(np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)), "PNG")
    found = crop_resize(deep, np.random.default_rng(0), (8, 8), scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert found.notes == ("16-bit image scaled to 8 bits",)
    assert 240 < found.pixels.max() <= 255
    whole = encode(smooth(64, 64, seed=1), "JPEG")
    with pytest.raises(ImageError, match=r"^cat: damaged image"):
        crop_resize(whole[:400], np.random.default_rng(0), (8, 8), name="cat")
    with pytest.raises(ImageError, match="not an image"):
        crop_resize(b"text", np.random.default_rng(0), (8, 8))
