"""One look at every image of a data set of any task: size, kind, problems, and which have the same pixels."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from leanvit import imaging
from leanvit.errors import ImageError
from leanvit.progress import Bar

_AT_ONCE = 4096
"""Images in one portion: a million waiting tasks would be larger than what they find."""

Part = TypeVar("Part", bound=str)
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at an image tells.

    size: (width, height) as shown, in pixels. format, mode: Pillow's names; "array" where the set holds pixels.
    digest: of the decoded pixels, so that copies in other lossless files are found as well. problem: why it can't be
    read, else empty. notes: what was converted.
    """

    size: tuple[int, int] = (0, 0)
    format: str = ""
    mode: str = ""
    digest: bytes = b""
    problem: str = ""
    notes: tuple[str, ...] = ()


def look_at_all(name: str, count: int, look: Callable[[int], Seen]) -> list[Seen]:
    """Look at `count` images, several at once, in order. name: of the set, for the bar."""
    seen: list[Seen] = []
    with Bar(f"looking at {name}", count) as bar, ThreadPoolExecutor() as pool:
        for start in range(0, count, _AT_ONCE):
            for one in pool.map(look, range(start, min(start + _AT_ONCE, count))):
                seen.append(one)
                bar.advance()
    return seen


def look_at(read: Callable[[], bytes], name: str) -> Seen:
    """Decode one encoded image. read: returns its bytes or raises ImageError. name: what problems call it."""
    try:
        data = read()
        return seen_pixels(imaging.decode(data, name), *imaging.read_header(data))
    except ImageError as error:
        return Seen(problem=str(error))


def seen_pixels(decoded: imaging.Decoded, format_: str, mode: str) -> Seen:
    """What decoded pixels tell. format_, mode: as in Seen."""
    pixels = decoded.pixels
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return Seen((pixels.shape[1], pixels.shape[0]), format_, mode, digest.digest(), "", decoded.notes)


def describe(seen: list[Seen], name_of: Callable[[int], str]) -> dict[str, Any]:
    """Sizes, kinds and unreadable images of one part, as JSON values. name_of: the name of an image by its index."""
    good = [one for one in seen if not one.problem]
    return {
        "width": _spread([one.size[0] for one in good]),
        "height": _spread([one.size[1] for one in good]),
        "formats": dict(Counter(one.format for one in good).most_common()),
        "modes": dict(Counter(one.mode for one in good).most_common()),
        "converted": dict(Counter(note for one in good for note in one.notes).most_common()),
        "corrupt": [{"image": name_of(i), "problem": one.problem} for i, one in enumerate(seen) if one.problem],
    }


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def find_copies(
    seen: Mapping[Part, list[Seen]],
    describe_image: Callable[[Part, int], Json],
    judge: Callable[[list[Part], list[Json]], Json],
) -> Json:
    """Groups of images with the very same pixels, as JSON values.

    describe_image: what is said of one image. judge: what is said of a group beside its images, from their parts and
    what is said of each; {"leak": bool, ...}: whether it is in training and in another part. Leaks come first, then
    groups of which more is true.
    Returns {"extra": images beyond the first of each group, "leaks": groups that leak, "groups": [...]}.
    """
    groups = []
    for found in equal_images(seen):
        images = [{"part": part} | describe_image(part, index) for part, index in found]
        groups.append({**judge([part for part, _ in found], images), "images": images})
    groups.sort(key=lambda group: tuple(not value for key, value in group.items() if key != "images"))
    extra = sum(len(group["images"]) - 1 for group in groups)
    return {"extra": extra, "leaks": sum(group["leak"] for group in groups), "groups": groups}


def equal_images(seen: Mapping[Part, list[Seen]]) -> list[list[tuple[Part, int]]]:
    """Part and index of all images with the same pixels, a list for each group of two and more."""
    places: defaultdict[bytes, list[tuple[Part, int]]] = defaultdict(list)
    for part, looks in seen.items():
        for index, one in enumerate(looks):
            if not one.problem:
                places[one.digest].append((part, index))
    return [found for found in places.values() if len(found) > 1]
