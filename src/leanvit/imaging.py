"""From image bytes to the network's uint8 input: the one decoder of training, calibration, export and serving.

Pillow and NumPy only. What Pillow would do in silence is done on purpose here: 16-bit images are scaled
(Pillow clips them to white), CMYK and transparency are converted and reported, orientation tags are obeyed.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features
from PIL.JpegImagePlugin import JpegImageFile

from leanvit import _moved
from leanvit.config import Preprocess
from leanvit.errors import ImageError
from leanvit.image_metadata import without_metadata

_OPTIONAL = {"AVIF": "avif", "JPEG2000": "jpg_2000"}
"""Formats whose decoder Pillow's own wheels have and other builds may lack."""
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", *(f for f, codec in _OPTIONAL.items() if features.check(codec)))
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff"}
    | ({".avif"} if "AVIF" in FORMATS else set())
    | ({".jp2", ".j2k", ".jpf", ".jpx"} if "JPEG2000" in FORMATS else set())
)
ENDINGS = ".bmp, .jpeg, .jpg, .png, .tif, .tiff, .webp (also .avif, .jfif, .jp2 and .mpo)"
"""SUFFIXES in messages."""
MAX_PIXELS = 100_000_000
"""What the largest cameras take; 300 MB decoded. Pillow itself stops at about 180 million."""
MIN_SIDE = 2
"""Images of one pixel are placeholders and beacons of web pages."""
GREY = 114
"""Level of a letterbox' padding in all three channels: that of YOLO's letterbox, near the mean of photographs."""

_RESAMPLE = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
"""What turns a picture upright, by its EXIF orientation (EXIF 2.32, tag 0x0112)."""

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Decoded:
    """One decoded image.

    pixels: (height, width, 3) uint8, RGB, values 0 to 255.
    notes: what was converted on the way, one sentence each; empty for a plain RGB or grey image.
    resized_from: (height, width) that a resized image had before; None where it has all its pixels.
    """

    pixels: Pixels
    notes: tuple[str, ...] = ()
    resized_from: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the picture, before any resizing."""
        return self.resized_from or (self.pixels.shape[0], self.pixels.shape[1])


def decode(source: str | Path | bytes, name: str | None = None, channels: int = 3) -> Decoded:
    """Decode the first frame of a JPEG, PNG, WebP, BMP or TIFF image to RGB.

    source: a path, or the encoded bytes. name: what errors call the image. channels: more than three are the bands of
    the file as they are, of which it must have as many.
    Raises ImageError for a missing, truncated or foreign file, for more than 100 million pixels and
    for a side below 2 pixels.
    """
    image, notes = _decode_image(source, name, channels=channels)
    return Decoded(np.asarray(image), notes)


def _decode_image(
    source: str | Path | bytes,
    name: str | None,
    prepare: Callable[[Image.Image], None] | None = None,
    channels: int = 3,
) -> tuple[Image.Image, tuple[str, ...]]:
    """The decoded image in mode RGB, or with its own bands where more are asked for, and its notes.

    prepare: what is done to the opened file before it is decoded.
    """
    name = name or (str(source) if not isinstance(source, bytes) else "image")
    data = source if isinstance(source, bytes) else read_file(Path(source), name)
    convert = _to_rgb if channels <= 3 else partial(_own_bands, channels=channels, name=name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _open_and_load(data, name, prepare, convert)
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{name}: {_kind_of(data)}, expected JPEG, PNG, WebP, BMP or TIFF. Remove or convert the file."
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


def _open_and_load(
    data: bytes,
    name: str,
    prepare: Callable[[Image.Image], None] | None,
    convert: Callable[[Image.Image], tuple[Image.Image, tuple[str, ...]]],
) -> tuple[Image.Image, tuple[str, ...]]:
    """The pixels; where Pillow stops at metadata, those of the file without it."""
    try:
        opened = _loaded(data, name, prepare)
    except (ImageError, MemoryError, Image.DecompressionBombError):
        raise
    except Exception:
        plain = without_metadata(data)
        if plain is None or len(plain) == len(data):
            raise
        with contextlib.suppress(Exception):
            image, notes = convert(_loaded(plain, name, prepare))
            return image, ("metadata that can't be read was ignored", *notes)
        raise  # what was wrong with the file as it is
    return convert(opened)


def _loaded(data: bytes, name: str, prepare: Callable[[Image.Image], None] | None) -> Image.Image:
    """The file's image as Pillow decodes it."""
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    _check_size(image, name)
    if prepare:
        prepare(image)
    image.load()
    return image


_FOREIGN = {
    b"GIF8": "GIF", b"8BPS": "Photoshop", b"%PDF": "PDF", b"\xff\x0a": "JPEG XL", b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\x01\0": "icon", b"\0\x05\x16\x07": "companion file of a Mac",
}  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


def foreign_format(head: bytes) -> str | None:
    """The name of a format that is not read, from the first 16 bytes of a file; None where it is not known."""
    if head[4:8] == b"ftyp":
        return "HEIC" if head[8:12] in _HEIF_BRANDS else None if head[8:12] == b"avif" else "video"
    return next((name for start, name in _FOREIGN.items() if head.startswith(start)), None)


def is_readable_format(head: bytes) -> bool:
    """Whether the first 16 bytes of a file are those of a format that is read."""
    webp = head.startswith(b"RIFF") and head[8:12] == b"WEBP"
    avif = "AVIF" in FORMATS and head[4:12] in (b"ftypavif", b"ftypavis")
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"II*\0", b"MM\0*")
    return head.startswith(starts) or webp or avif


def _kind_of(data: bytes) -> str:
    """What a file that can't be opened is, as far as its first bytes tell."""
    found = foreign_format(data[:16]) if data else "an empty file"
    return "not an image that can be read" + (f" ({found})" if found else "")


def read_file(path: Path, name: str | None = None) -> bytes:
    """Bytes of an image file. Raises ImageError."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise ImageError(f"{name or path}: {reason}, expected an image file. Check the path.") from error


def read_header(data: bytes) -> tuple[str, str]:
    """Format and mode, by Pillow's names, of an encoded image that `decode` takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except Exception:  # at metadata, as `decode` took it
            image = Image.open(io.BytesIO(without_metadata(data) or data), formats=FORMATS)
        return str(image.format), image.mode


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


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    notes = []
    turned = orientation(image)
    if turned is None:
        notes.append("orientation tag that can't be understood, taken as upright")
    elif turned != 1:
        image = image.transpose(_UPRIGHT[turned])
    if image.mode == "RGB" and "transparency" not in image.info:
        return image, tuple(notes)
    if image.mode.startswith("I") or image.mode == "F":
        notes.append(f"{_depth(image.mode)} image scaled to 8 bits")
        return Image.fromarray(_scale_to_8_bits(image)), tuple(notes)
    if image.mode == "CMYK":
        notes.append("CMYK image converted to RGB without its colour profile")
        image = image.convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            notes.append("transparent image laid on white")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB"), tuple(notes)


def _own_bands(image: Image.Image, channels: int, name: str) -> tuple[Image.Image, tuple[str, ...]]:
    """The bands of a file as they are, upright; raises ImageError where there are not as many."""
    bands = image.split()
    if len(bands) != channels:
        raise ImageError(
            f"{name}: {len(bands)} channels ({image.mode}), expected {channels}: the network takes as many. Give "
            f"images of {channels} bands, such as PNG or TIFF with a fourth one."
        )
    # Pillow would multiply the colours of RGBA by the fourth band when it resizes.
    merged = Image.merge("RGBX", bands)
    turned = orientation(image) or 1
    return merged.transpose(_UPRIGHT[turned]) if turned != 1 else merged, ()


def with_channels(pixels: Pixels, channels: int) -> Pixels:
    """Pixels (height, width, C) uint8 with so many channels: RGB becomes grey; raises ImageError for all else."""
    found = pixels.shape[2]
    if found == channels:
        return pixels
    if (found, channels) == (3, 1):
        return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
    raise ImageError(f"the picture has {found} channels, the network takes {channels}. Give pictures of as many.")


def orientation(image: Image.Image) -> int | None:
    """The tag of a camera that was turned: 1 upright or no tag, 5 to 8 lying on a side; None where it is broken.

    Metadata is not the picture: whatever its bytes hold, the pixels are whole.
    """
    # Pillow decodes a whole PNG to look for a tag that nearly none has.
    if image.format == "PNG" and not {"exif", "XML:com.adobe.xmp", "Raw profile type exif"} & image.info.keys():
        return 1
    try:
        tags = image.getexif()
        tag = tags.get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises a dozen types for broken EXIF
        return None
    if not tags and image.info.get("exif", b"").removeprefix(b"Exif\0\0"):
        return None  # Pillow stopped at it when the file was opened
    return tag if isinstance(tag, int) and (tag == 1 or tag in _UPRIGHT) else None


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

    pixels: (height, width, 3) uint8. Returns (*input_size, 3) uint8, contiguous. Other channels than three where
    `preprocess` has other ones. Raises ImageError for a picture that does not have them.
    """
    pixels = with_channels(pixels, preprocess.channels)
    if preprocess.channels == 3:
        return _resize_image(Image.fromarray(pixels), preprocess)
    bands = [_resize_image(Image.fromarray(pixels[:, :, i]), preprocess) for i in range(preprocess.channels)]
    return np.ascontiguousarray(np.stack(bands, axis=2))


def _resize_image(image: Image.Image, preprocess: Preprocess) -> Pixels:
    height, width = preprocess.input_size
    filter = _RESAMPLE[preprocess.interpolation]
    if preprocess.crop_mode == "squash":
        image = image.resize((width, height), filter)
        return np.ascontiguousarray(image)
    if preprocess.crop_mode == "letterbox":
        tall, wide = letterboxed_size((image.height, image.width), preprocess.input_size)
        resized = np.asarray(image.resize((wide, tall), filter))
        padded = np.full((height, width, *resized.shape[2:]), GREY, np.uint8)
        padded[:tall, :wide] = resized
        return padded
    whole_width, whole_height = _size_before_crop(image.size, preprocess)
    left, top = round((whole_width - width) / 2), round((whole_height - height) / 2)
    box = (left, top, left + width, top + height)
    if whole_width * whole_height > MAX_PIXELS:
        # A thin strip would grow to gigabytes before the crop, so only what the crop keeps is resized.
        across, down = image.width / whole_width, image.height / whole_height
        source = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
        return np.ascontiguousarray(image.resize((width, height), filter, box=source))
    return np.ascontiguousarray(image.resize((whole_width, whole_height), filter).crop(box))


def letterboxed_size(picture_size: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) that a picture gets in a letterbox: as large as fits, with its aspect ratio."""
    height, width = picture_size
    scale = min(size[0] / height, size[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def _size_before_crop(size: tuple[int, int], preprocess: Preprocess) -> tuple[int, int]:
    """(width, height) after the resize: one side is the crop's over crop_pct, the other keeps the aspect ratio."""
    width, height = size
    tall, wide = (math.floor(side / preprocess.crop_pct) for side in preprocess.input_size)
    if tall * width >= wide * height:
        return max(wide, int(tall * width / height)), tall
    return wide, max(tall, int(wide * height / width))


def load(source: str | Path | bytes, preprocess: Preprocess, name: str | None = None) -> Pixels:
    """Decode and resize one image: (*input_size, 3) uint8. Raises ImageError as `decode` does."""
    return decode_resized(source, preprocess, name).pixels


def decode_resized(source: str | Path | bytes, preprocess: Preprocess, name: str | None = None) -> Decoded:
    """`decode`, then `resize`, without an array in between. Raises ImageError as `decode` does."""
    image, notes = _decode_image(source, name, channels=preprocess.channels)
    size = image.height, image.width
    if preprocess.channels == 1:
        return Decoded(_resize_image(image.convert("L"), preprocess)[:, :, None], notes, size)
    return Decoded(_resize_image(image, preprocess), notes, size)


def crop_resize(
    source: str | Path | bytes | Pixels,
    box_rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bicubic",
    name: str | None = None,
) -> Decoded:
    """A random part of one image at the network's input size (`random_box`), for training only.

    source: a path, encoded bytes, or pixels (height, width, 3) uint8. size: (height, width) of the result, in pixels.
    A JPEG of which the part has at least twice as many pixels a side as `size` is decoded at 1/2, 1/4 or 1/8, which
    takes a fraction of the time; its values differ by a few levels from those of `decode`, which evaluation and
    export use. Returns pixels (*size, 3) uint8. Raises ImageError as `decode` does.
    """
    choose = partial(random_box, rng=box_rng, scale=scale, ratio=ratio)
    if isinstance(source, np.ndarray):
        image = Image.fromarray(source)
        return _resize_box(image, choose(image.size), size, interpolation, ())
    reduced = _ReducedJpeg(size, choose)
    image, notes = _decode_image(source, name, reduced.prepare)
    box = reduced.box_in(image.size) if reduced.box else choose(image.size)
    return _resize_box(image, box, size, interpolation, notes)


def _resize_box(
    image: Image.Image, box: Box, size: tuple[int, int], interpolation: str, notes: tuple[str, ...]
) -> Decoded:
    resized = image.resize(size[::-1], _RESAMPLE[interpolation], box=box, reducing_gap=2.0)
    return Decoded(np.ascontiguousarray(resized), notes)


@dataclass
class _ReducedJpeg:
    """Chooses the box before a JPEG is decoded, because its size decides how coarsely it may be decoded."""

    size: tuple[int, int]
    choose: Callable[[tuple[int, int]], Box]
    shown: tuple[int, int] = (0, 0)
    box: Box | None = None

    def prepare(self, image: Image.Image) -> None:
        """Choose the box in the opened image, and how libjpeg decodes it; other formats are left alone."""
        if not isinstance(image, JpegImageFile):
            return
        self.shown = image.size[::-1] if (orientation(image) or 1) >= 5 else image.size
        self.box = self.choose(self.shown)
        left, top, right, bottom = self.box
        most = min((right - left) / self.size[1], (bottom - top) / self.size[0])
        step = next((step for step in (8, 4, 2) if most >= step), 1)
        if step > 1:
            image.draft(image.mode, (image.width // step, image.height // step))

    def box_in(self, decoded: tuple[int, int]) -> Box:
        """The box in the coordinates of the decoded image."""
        left, top, right, bottom = self.box or (0, 0, *self.shown)
        across, down = decoded[0] / self.shown[0], decoded[1] / self.shown[1]
        return (left * across, top * down, right * across, bottom * down)


def random_box(
    size: tuple[int, int], rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """Left, top, right and bottom of a random part of an image of `size` (width, height), in whole pixels.

    Its area is a share of the image's, even between the two of `scale`; its width over height lies between the two of
    `ratio`, evenly in the logarithm. After ten boxes that don't fit: the middle of the image, as much as `ratio` lets.
    Source: Szegedy et al., Going deeper with convolutions, arXiv 1409.4842; the same draws as in torchvision.
    """
    width, height = size
    low, high = np.log(ratio)
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(low, high))
        across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < across <= width and 0 < down <= height:
            left, top = int(rng.integers(width - across + 1)), int(rng.integers(height - down + 1))
            return (left, top, left + across, top + down)
    across = min(width, max(1, round(height * ratio[1])))
    down = min(height, max(1, round(width / ratio[0])))
    left, top = (width - across) // 2, (height - down) // 2
    return (left, top, left + across, top + down)


def normalize(images: Pixels, preprocess: Preprocess) -> NDArray[np.float32]:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W): divided by 255, minus mean, over std."""
    mean = np.asarray(preprocess.mean, np.float32)
    std = np.asarray(preprocess.std, np.float32)
    scaled = (images.astype(np.float32) / np.float32(255.0) - mean) / std
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def encode_png(pixels: Pixels, compress_level: int = -1) -> bytes:
    """Encode (height, width, 3) uint8 as PNG bytes; one channel or a map as grey, four with the last as transparency.

    compress_level: zlib's, 0 to 9; -1 is its default.
    """
    buffer = io.BytesIO()
    flat = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Image.fromarray(flat).save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Names of leanvit 0.1, for one release."""
        return _moved.find_name(__name__, name)
