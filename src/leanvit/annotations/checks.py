"""Checks that every reader of annotated pictures shares: numbers, boxes, and the size of a picture on disk."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from leanvit import imaging
from leanvit.errors import DataError, ImageError

OnProblem = Literal["skip", "fail"]
Box = tuple[float, float, float, float]
LARGEST = 1e9
ROUNDING = 0.1
"""Pixels that a box may lie outside without a word: files are written with two to six decimals."""

CLIPPED = "; clipped"
"""How the remark on a box ends that lies partly outside its picture: it is kept."""


class BrokenAnnotation(DataError):
    """What is wrong with one annotation, without where it stands: the reader adds that and leaves it out."""


def settle(problems: list[str], on_problem: OnProblem) -> tuple[str, ...]:
    """The problems of a whole file. Raises DataError with the first and their number where they are to be fatal."""
    if problems and on_problem == "fail":
        raise DataError(
            f"{problems[0]} ({len(problems)} such problems in all). Correct the annotations, or skip the broken ones."
        )
    return tuple(problems)


def is_remark(problem: str) -> bool:
    """Whether a problem is one by which nothing is lost."""
    return problem.endswith(CLIPPED)


def shorten(value: Any) -> str:
    """A value of an annotation file as it can stand in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_numbers(values: Any, what: str, count: int | None = None) -> list[float]:
    """`values` as floats. Raises BrokenAnnotation where they are no list of `count` finite numbers."""
    expected = f"{count} numbers" if count else "a list of numbers"
    if not isinstance(values, list | tuple):
        raise BrokenAnnotation(f"{what} is {shorten(values)}, expected {expected}")
    if count is not None and len(values) != count:
        raise BrokenAnnotation(f"{what} has {len(values)} values, expected {expected}")
    for value in values:
        check_number(value, what)
    return [float(value) for value in values]


def check_number(value: Any, what: str) -> float:
    """`value` as a float. Raises BrokenAnnotation where it is no finite number."""
    # NaN fails every comparison, and integers of any length can be compared without becoming floats.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -LARGEST < value < LARGEST:
        raise BrokenAnnotation(f"{what} holds {shorten(value)}, expected finite numbers")
    return float(value)


def check_box(box: Box, size: tuple[int, int]) -> tuple[Box, str | None]:
    """The part of (x1, y1, x2, y2) inside a picture of `size` (height, width), and a remark where some lay outside.

    All in pixels. Raises BrokenAnnotation for a box without area and for one wholly outside.
    """
    x1, y1, x2, y2 = box
    height, width = size
    picture = f"the picture of {width} x {height} pixels"
    if x2 <= x1 or y2 <= y1:
        raise BrokenAnnotation(f"box {_corners(box)} has zero or negative area, expected x1 < x2 and y1 < y2")
    inside = (max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height)))
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise BrokenAnnotation(f"box {_corners(box)} lies wholly outside {picture}, expected it inside")
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > ROUNDING:
        return inside, f"box {_corners(box)} lies partly outside {picture}, expected it inside{CLIPPED}"
    return inside, None


def _corners(box: Box) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in box) + ")"


def picture_size(path: Path) -> tuple[int, int]:
    """(height, width) in pixels of a picture as `imaging.decode` shows it, from the head of its file.

    Raises ImageError where the file is missing, is no image, or is too small or too large to be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=imaging.FORMATS) as image:
                width, height = image.size
                turned = (imaging.orientation(image) or 1) >= 5
    except FileNotFoundError as error:
        raise ImageError("no such image file, expected it there") from error
    except Exception as error:  # Pillow's decoders raise a dozen types for damaged data
        raise ImageError(
            f"the image can't be read ({type(error).__name__}), expected JPEG, PNG, WebP, BMP or TIFF"
        ) from error
    if min(width, height) < imaging.MIN_SIDE or width * height > imaging.MAX_PIXELS:
        raise ImageError(
            f"the image has {width} x {height} pixels, expected at least {imaging.MIN_SIDE} a side and at most "
            f"{imaging.MAX_PIXELS:,} in all"
        )
    return (width, height) if turned else (height, width)
