"""Facts about images: what one look at each tells, counted and compared."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from leanvit import imaging
from leanvit.data.sets import ImageSet, Split
from leanvit.errors import ImageError
from leanvit.progress import Bar

_AT_ONCE = 4096
Part = TypeVar("Part", bound=str)


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


def examine(images: ImageSet) -> list[Seen]:
    """Look at every image, in order."""
    return look_at_all(images.name, len(images), lambda i: look(images, i))


def look_at_all(name: str, count: int, look: Callable[[int], Seen]) -> list[Seen]:
    """Look at `count` images, several at once, in order. name: of the set, for the bar."""
    seen: list[Seen] = []
    with Bar(f"looking at {name}", count) as bar, ThreadPoolExecutor() as pool:
        # In portions: a million waiting tasks would be larger than what they find.
        for start in range(0, count, _AT_ONCE):
            for one in pool.map(look, range(start, min(start + _AT_ONCE, count))):
                seen.append(one)
                bar.advance()
    return seen


def look(images: ImageSet, index: int) -> Seen:
    """Decode one image."""
    source = images.sources[index]
    if isinstance(source, np.ndarray):
        return _seen(imaging.Decoded(source), "array", "RGB")
    return look_at(lambda: images.encoded(index), images.name_of(index))


def look_at(read: Callable[[], bytes], name: str) -> Seen:
    """Decode one encoded image. read: gives its bytes or raises ImageError. name: what problems call it."""
    try:
        data = read()
        return _seen(imaging.decode(data, name), *imaging.read_header(data))
    except ImageError as error:
        return Seen(problem=str(error))


def _seen(decoded: imaging.Decoded, format_: str, mode: str) -> Seen:
    pixels = decoded.pixels
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(pixels.tobytes())
    return Seen((pixels.shape[1], pixels.shape[0]), format_, mode, digest.digest(), "", decoded.notes)


def summarize(images: ImageSet, seen: list[Seen]) -> dict[str, Any]:
    """Counts, sizes, kinds and unreadable images of one part, as JSON values."""
    counts = np.bincount(images.labels, minlength=len(images.classes)).tolist()
    return {
        "images": len(images),
        "per_class": dict(zip(images.classes, counts, strict=True)),
        **describe(seen, images.name_of),
    }


def describe(seen: list[Seen], name_of: Callable[[int], str]) -> dict[str, Any]:
    """Sizes, kinds and unreadable images of one part, as JSON values. name_of: gives the name of an image."""
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


def balance(images: ImageSet, seen: list[Seen]) -> dict[str, Any]:
    """How evenly the readable training images are spread over the classes, and weights that make up for it.

    ratio: images of the largest class for one of the smallest; None where one has none. weights: readable images /
    (classes * images of the class), the 'balanced' ones of scikit-learn: the mean weight of an image is 1.
    """
    good = np.asarray([not one.problem for one in seen], bool)
    counts = np.bincount(images.labels[good], minlength=len(images.classes))
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    weights = [float(counts.sum() / (len(counts) * count)) if count else None for count in counts]
    return {
        "largest": {"class": images.classes[largest], "images": int(counts[largest])},
        "smallest": {"class": images.classes[smallest], "images": int(counts[smallest])},
        "ratio": float(counts[largest] / counts[smallest]) if counts[smallest] else None,
        "weights": dict(zip(images.classes, weights, strict=True)),
    }


def find_duplicates(parts: Mapping[Split, ImageSet], seen: Mapping[Split, list[Seen]]) -> dict[str, Any]:
    """Groups of images with the very same pixels, those that leak from training into another part first.

    extra: images beyond the first of each group. leaks: groups with a training image and one of another part.
    contradictions: groups whose images have different classes.
    """
    groups = [_group(found, parts) for found in equal_images(seen)]
    groups.sort(key=lambda group: (not group["leak"], not group["contradiction"]))
    return {
        "extra": sum(len(group["images"]) - 1 for group in groups),
        "leaks": sum(group["leak"] for group in groups),
        "contradictions": sum(group["contradiction"] for group in groups),
        "groups": groups,
    }


def equal_images(seen: Mapping[Part, list[Seen]]) -> list[list[tuple[Part, int]]]:
    """Part and index of all images with the same pixels, a list for each group of two and more."""
    places: defaultdict[bytes, list[tuple[Part, int]]] = defaultdict(list)
    for part, looks in seen.items():
        for index, one in enumerate(looks):
            if not one.problem:
                places[one.digest].append((part, index))
    return [found for found in places.values() if len(found) > 1]


def _group(found: list[tuple[Split, int]], parts: Mapping[Split, ImageSet]) -> dict[str, Any]:
    members = [
        {"part": split, "image": parts[split].name_of(i), "class": parts[split].classes[parts[split].labels[i]]}
        for split, i in found
    ]
    splits = {split for split, _ in found}
    return {
        "leak": "train" in splits and len(splits) > 1,
        "contradiction": len({member["class"] for member in members}) > 1,
        "images": members,
    }
