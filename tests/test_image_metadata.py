"""Metadata is not the picture: files whose metadata is broken around sound pixels are read."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import smooth
from leanvit.annotations.checks import picture_size
from leanvit.errors import ImageError
from leanvit.image_metadata import without_metadata
from leanvit.imaging import decode, read_header

PICTURE = smooth(24, 32, seed=4)
TIFF = b"II*\0\x08\0\0\0"


def encode(format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, format, **options)
    return file.getvalue()


def tag(kind: int, count: int, value: bytes) -> bytes:
    return TIFF + struct.pack("<HHHI4s", 1, 0x112, kind, count, value.ljust(4, b"\0")) + bytes(4)


BROKEN = {
    "garbage": b"Exif\0\0no tiff header",
    "beyond the end": b"Exif\0\0II*\0\xff\xff\0\0",
    "nine": b"Exif\0\0" + tag(3, 1, b"\x09\0"),
    "text": b"Exif\0\0" + tag(2, 4, b"top\0"),
}


def png_with(kind: bytes, body: bytes, crc: int | None = None) -> bytes:
    data = encode("PNG")
    crc = zlib.crc32(kind + body) if crc is None else crc
    return data[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc) + data[33:]


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_orientation_is_ignored_and_noted(name: str, tmp_path: Path) -> None:
    plain = decode(encode("JPEG")).pixels
    jpeg, png = encode("JPEG", exif=BROKEN[name]), png_with(b"eXIf", BROKEN[name].removeprefix(b"Exif\0\0"))
    for data, truth in ((jpeg, plain), (png, PICTURE)):
        found = decode(data)
        np.testing.assert_array_equal(found.pixels, truth)
        assert found.notes == ("orientation tag that can't be understood, taken as upright",)
        (tmp_path / "a").write_bytes(data)
        assert picture_size(tmp_path / "a") == PICTURE.shape[:2]


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0Exif\0\0" + tag(3, 1, b"\x01\0")], ids=["blank", "doubled"])
def test_a_block_that_says_upright_or_nothing_needs_no_word(block: bytes) -> None:
    assert decode(encode("JPEG", exif=block)).notes == ()


def test_a_wrong_checksum_of_a_comment_does_not_cost_the_picture() -> None:
    data = png_with(b"tEXt", b"Comment\0by hand", crc=1)
    found = decode(data)
    np.testing.assert_array_equal(found.pixels, PICTURE)
    assert found.notes == ("metadata that can't be read was ignored",)
    assert read_header(data) == ("PNG", "RGB")


def test_a_wrong_checksum_of_the_pixels_does() -> None:
    data = bytearray(encode("PNG"))
    data[data.index(b"IDAT") + 20] ^= 255
    with pytest.raises(ImageError):
        decode(bytes(data))


def test_what_pixels_need_stays_and_the_rest_goes() -> None:
    palette = io.BytesIO()
    Image.fromarray(PICTURE).quantize(8).save(palette, "PNG", transparency=3, dpi=(72, 72))
    jpeg = encode("JPEG", exif=BROKEN["nine"], comment=b"by hand")
    for data in (palette.getvalue(), jpeg):
        stripped = without_metadata(data)
        assert stripped is not None
        assert len(stripped) < len(data)
        np.testing.assert_array_equal(decode(stripped).pixels, decode(data).pixels)
    assert b"by hand" not in (without_metadata(jpeg) or b"by hand")
    assert without_metadata(encode("BMP")) is None


def test_a_second_picture_in_a_jpeg_is_passed_over_and_the_first_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    path = tmp_path / "DJI_0001.JPG"
    with open(path, "wb") as file:
        Image.fromarray(PICTURE).save(
            file, "MPO", save_all=True, append_images=[Image.fromarray(PICTURE[:8, :8])], exif=exif
        )
    assert decode(path).pixels.shape == (32, 24, 3)
    assert picture_size(path) == (32, 24)


@pytest.mark.parametrize(
    ("format", "ending"), [("AVIF", "avif"), ("JPEG2000", "jp2"), ("JPEG", "jfif"), ("MPO", "mpo")]
)
def test_more_endings_are_read(format: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(encode(format))
    difference = decode(path).pixels.astype(int) - PICTURE
    assert np.abs(difference).mean() < 6  # lossy, at the formats' own quality


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"\0\0\0\x18ftypheic" + bytes(40), "HEIC"), (encode("GIF"), "GIF"), (b"", "an empty file"),
     (b"\0\5\x16\7" + bytes(40), "companion file of a Mac")],
)  # fmt: skip
def test_a_file_of_another_kind_is_called_by_its_name(data: bytes, kind: str) -> None:
    with pytest.raises(ImageError, match=rf"^x: not an image that can be read \({kind}\), expected JPEG"):
        decode(data, "x")


def test_a_name_with_a_zero_byte_is_no_file() -> None:
    with pytest.raises(ImageError, match="expected an image file"):
        decode("a\0b.png")
