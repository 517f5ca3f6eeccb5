"""From image bytes to the network's uint8 input: the one decoder of training, calibration, export and serving.

Pillow and NumPy only. What Pillow would do in silence is done on purpose here: 16-bit images are scaled
(Pillow clips them to white), CMYK and transparency are converted and reported, orientation tags are obeyed.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from leanvit.config import Preprocess
from leanvit.errors import ConfigError, DataError, ImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 100_000_000
MIN_SIDE = 2

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """One decoded image.

    pixels: (height, width, 3) uint8, RGB, values 0 to 255.
    notes: what was converted on the way, one sentence each; empty for a plain RGB or grey image.
    """

    pixels: Pixels
    notes: tuple[str, ...] = ()


def decode(source: str | Path | bytes, name: str | None = None) -> Decoded:
    """Decode the first frame of a JPEG, PNG, WebP, BMP or TIFF image to RGB.

    source: a path, or the encoded bytes. name: what errors call the image.
    Raises ImageError for a missing, truncated or foreign file, for more than 100 million pixels and
    for a side below 2 pixels.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    data = source if isinstance(source, bytes) else _read(Path(source), name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_size(image, name)
            image.load()
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: not an image that can be read, expected JPEG, PNG, WebP, BMP or TIFF. Remove or convert the file."
        ) from error
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"{name}: too large ({error}), expected at most {MAX_PIXELS:,} pixels. Downscale it first."
        ) from error
    except ImageError:
        raise
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(
            f"{name}: damaged image ({reason}), expected a complete file. Replace or remove it."
        ) from error


def _read(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"{name}: {error.strerror}, expected an image file. Check the path.") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width} x {height} pixels, expected at most {MAX_PIXELS:,} in all. Downscale it first."
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            f"{name}: {width} x {height} pixels, expected at least {MIN_SIDE} on each side. "
            "Remove this placeholder image."
        )


def _to_rgb(image: Image.Image) -> Decoded:
    notes = []
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        notes.append(f"{_depth(image.mode)} image scaled to 8 bits")
        return Decoded(_scale_to_8_bits(image), tuple(notes))
    if image.mode == "CMYK":
        notes.append("CMYK image converted to RGB without its colour profile")
        image = image.convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            notes.append("transparent image laid on white")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return Decoded(np.asarray(image.convert("RGB")), tuple(notes))


def _depth(mode: str) -> str:
    return {"I": "32-bit", "F": "floating-point"}.get(mode, "16-bit")


def _scale_to_8_bits(image: Image.Image) -> Pixels:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        # A floating-point TIFF has no fixed white: its own range is the only one known.
        low, high = np.nanmin(values), np.nanmax(values)
        values = (values - low) / max(high - low, 1e-12) * 255.0
    else:
        # Pillow opens some 16-bit files in its 32-bit mode, so the values decide the depth.
        values = values / (65535.0 if values.max(initial=0.0) <= 65535 else 2.0**31 - 1) * 255.0
    grey = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def resize(pixels: Pixels, preprocess: Preprocess) -> Pixels:
    """Resize and crop one image to the network's input size, with the roundings of torchvision and timm.

    pixels: (height, width, 3) uint8. Returns (*input_size, 3) uint8, contiguous.
    """
    image = Image.fromarray(pixels)
    height, width = preprocess.input_size
    filter = _RESAMPLE[preprocess.interpolation]
    if preprocess.crop_mode == "squash":
        image = image.resize((width, height), filter)
        return np.ascontiguousarray(image)
    whole_width, whole_height = _size_before_crop(image.size, preprocess)
    left, top = round((whole_width - width) / 2), round((whole_height - height) / 2)
    box = (left, top, left + width, top + height)
    if whole_width * whole_height > MAX_PIXELS:
        # A thin strip would grow to gigabytes before the crop, so only what the crop keeps is resized.
        across, down = image.width / whole_width, image.height / whole_height
        source = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return np.ascontiguousarray(image.resize((width, height), filter, box=source))
    return np.ascontiguousarray(image.resize((whole_width, whole_height), filter).crop(box))


def _size_before_crop(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """(width, height) after the resize: one side is the crop's over crop_pct, the other keeps the aspect ratio."""
    width, height = size
    tall, wide = (math.floor(side / preprocess.crop_pct) for side in preprocess.input_size)
    if tall * width >= wide * height:
        return max(wide, int(tall * width / height)), tall
    return wide, max(tall, int(wide * height / width))


def load(source: str | Path | bytes, preprocess: Preprocess, name: str | None = None) -> Pixels:
    """Decode and resize one image: (*input_size, 3) uint8. Raises ImageError as `decode` does."""
    return resize(decode(source, name).pixels, preprocess)


def normalize(images: Pixels, preprocess: Preprocess) -> NDArray[np.float32]:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W): divided by 255, minus mean, over std."""
    mean = np.asarray(preprocess.mean, np.float32)
    std = np.asarray(preprocess.std, np.float32)
    scaled = (images.astype(np.float32) / np.float32(255.0) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def encode_png(pixels: Pixels) -> bytes:
    """Encode (height, width, 3) uint8 as PNG bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def find_images(sources: Iterable[str | Path]) -> Iterator[Path]:
    """Image files behind paths, folders (searched below) and glob patterns, in a fixed order.

    Raises DataError where a path does not exist or a folder or pattern holds no image.
    """
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        elif path.exists():
            found = [path]
        elif any(c in str(source) for c in "*?["):
            found = _glob(path)
        else:
            raise DataError(f"{source}: no such file or folder. Check the path.")
        if not found:
            endings = ", ".join(sorted(SUFFIXES))
            raise DataError(f"{source}: no images found, expected files ending in {endings}.")
        yield from found


def _glob(pattern: Path) -> list[Path]:
    base = Path(pattern.anchor) if pattern.is_absolute() else Path()
    try:
        return sorted(p for p in base.glob(str(pattern.relative_to(pattern.anchor))) if p.is_file())
    except ValueError as error:  # e.g. a**
        raise ConfigError(f"{pattern}: not a glob pattern ({error}). Use * within a name, ** for folders.") from error
