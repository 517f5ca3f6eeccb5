"""The page of `leanvit data inspect`: what was found, and the contact sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from leanvit.data.sets import ImageSet
from leanvit.progress import track
from leanvit.report.shell import document
from leanvit.report.svg import (
    Markup,
    Row,
    bar_chart,
    facts,
    figure,
    fixed,
    join,
    panels,
    short,
    significant,
    table,
    tag,
)

THUMBNAIL = 72
_GAP = 4
_BARS = 30
_LISTED = 100


def render(result: dict[str, Any], images: ImageSet, *, count: int, seed: int) -> str:
    """The page as text. images: readable training images, `count` of each class are shown."""
    sections = [
        ("classes", "Classes", _classes(result, images, count, seed)),
        ("pixels", "Sizes and kinds", kinds_table(result)),
        ("corrupt", "Images that can't be read", corrupt_table(result)),
        ("duplicates", "Duplicates", _duplicates(result["duplicates"])),
    ]
    return document("leanvit data inspect", str(result["data"]), (_cards(result),), sections)


def _cards(result: dict[str, Any]) -> Markup:
    parts, balance, duplicates = result["parts"], result["balance"], result["duplicates"]
    images = sum(part["images"] for part in parts.values())
    corrupt = sum(len(part["corrupt"]) for part in parts.values())
    entries = [
        ("Images", fixed(images), ", ".join(f"{fixed(part['images'])} {split}" for split, part in parts.items())),
        ("Classes", fixed(len(result["classes"])), f"largest for one image of the smallest: {_ratio(balance)}"),
        ("Can't be read", fixed(corrupt), "left out with --bad-images skip" if corrupt else "every image was decoded"),
        ("Leaks", fixed(duplicates["leaks"]), "training images that are in another part as well"),
        ("Duplicates", fixed(duplicates["extra"]), f"{fixed(duplicates['contradictions'])} with several classes"),
    ]
    boxes = (
        tag("div", tag("dt", name), tag("dd", value, class_="big"), tag("dd", why, class_="why"), class_="card")
        for name, value, why in entries
    )
    return tag("dl", *boxes, class_="cards")


def _ratio(balance: dict[str, Any]) -> str:
    return "–" if balance["ratio"] is None else significant(balance["ratio"])


def _classes(result: dict[str, Any], images: ImageSet, count: int, seed: int) -> Markup:
    parts, weights = result["parts"], result["balance"]["weights"]
    strips = dict(contact_strips(images, count, seed)) if count else {}
    rows = [
        [
            name,
            *(fixed(part["per_class"][name]) for part in parts.values()),
            fixed(weights[name], 3),
            *([_picture(name, strips.get(name))] if count else []),
        ]
        for name in result["classes"]
    ]
    heads = ["class", *parts, "weight", *(["examples"] if count else [])]
    caption = (
        "Images of each class. Weight: readable training images / (classes × images of the class), "
        "scikit-learn's 'balanced'."
    )
    align = "l" + "r" * (len(parts) + 1) + ("l" if count else "")
    return join([_chart(result), table(caption, heads, rows, align)])


def _chart(result: dict[str, Any]) -> Markup:
    """Bars of training and validation images, largest class first; where there are many classes, those at both ends."""
    counts = {split: result["parts"][split]["per_class"] for split in ("train", "val")}
    names = sorted(result["classes"], key=lambda name: -counts["train"][name])
    shown = names if len(names) <= _BARS else [*names[: _BARS // 2], *names[-_BARS // 2 :]]
    charts = []
    for split, label in (("train", "training images"), ("val", "validation images")):
        bars = [Row(name, float(counts[split][name]), fixed(counts[split][name])) for name in shown]
        charts.append(bar_chart(f"balance-{split}", f"Classes by {label}", bars, label))
    part = "" if shown == names else f"; the {_BARS // 2} largest and {_BARS // 2} smallest of {len(names)}"
    return figure(f"Training and validation images of each class{part}.", panels(*charts))


def _picture(name: str, strip: bytes | None) -> Markup | None:
    if strip is None:
        return None
    uri = "data:image/jpeg;base64," + base64.b64encode(strip).decode()
    return tag("img", src=uri, alt=f"Training images of class {name}", height=THUMBNAIL)


def contact_strips(images: ImageSet, count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Name and JPEG of each class that has images: up to `count` of them side by side, drawn by `seed`."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(track(images.classes, "drawing the contact sheet", len(images.classes))):
        members = rng.permutation(np.flatnonzero(images.labels == label))[:count]
        if len(members):
            yield name, _strip([images.decoded(int(i)).pixels for i in np.sort(members)])


def _strip(pictures: list[NDArray[np.uint8]]) -> bytes:
    """Pictures (height, width, 3) fitted into squares, side by side on white, as JPEG."""
    sheet = Image.new("RGB", (len(pictures) * (THUMBNAIL + _GAP) - _GAP, THUMBNAIL), "white")
    for place, pixels in enumerate(pictures):
        image = Image.fromarray(pixels)
        small = image.width * 2 <= THUMBNAIL and image.height * 2 <= THUMBNAIL
        # Pixels of tiny pictures are shown as they are, not as a blur.
        filter_ = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        fitted = ImageOps.contain(image, (THUMBNAIL, THUMBNAIL), filter_)
        left = place * (THUMBNAIL + _GAP) + (THUMBNAIL - fitted.width) // 2
        sheet.paste(fitted, (left, (THUMBNAIL - fitted.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def kinds_table(result: dict[str, Any]) -> Markup:
    """Sizes, formats, modes and conversions of each part."""

    def counted(values: dict[str, int]) -> str:
        return ", ".join(f"{name} {fixed(number)}" for name, number in values.items())

    def spread(values: dict[str, float] | None) -> str:
        return "–" if values is None else " / ".join(fixed(values[key]) for key in ("min", "median", "max"))

    rows = [
        [split, spread(part["width"]), spread(part["height"]), counted(part["formats"]), counted(part["modes"])]
        for split, part in result["parts"].items()
    ]
    heads = ["part", "width", "height", "formats", "modes"]
    caption = "Sizes in pixels (smallest / median / largest), file formats, and modes as Pillow calls them."
    notes = {
        f"{sentence} ({split})": fixed(number)
        for split, part in result["parts"].items()
        for sentence, number in part["converted"].items()
    }
    return join([table(caption, heads, rows, "lrrll"), facts(notes.items()) if notes else None])


def corrupt_table(result: dict[str, Any]) -> Markup:
    """The images that can't be read, and why."""
    rows = [(split, one["image"], one["problem"]) for split, part in result["parts"].items() for one in part["corrupt"]]
    if not rows:
        return tag("p", "None: every image was decoded.")
    shown = [(short(image, 90), split, problem.removeprefix(f"{image}: ")) for split, image, problem in rows[:_LISTED]]
    return table(f"{_first(len(rows))}What stopped the decoder.", ["image", "part", "problem"], shown, "lll")


def _first(count: int) -> str:
    return f"The first {_LISTED} of {fixed(count)}; all are in inspect.json. " if count > _LISTED else ""


def _duplicates(found: dict[str, Any]) -> Markup:
    groups = found["groups"]
    if not groups:
        return tag("p", "None: no two images have the same pixels.")
    rows = []
    for group in groups[:_LISTED]:
        images = group["images"]
        names = [f"{short(one['image'], 60)} ({one['part']}, {one['class']})" for one in images[:6]]
        names += [f"and {len(images) - 6} more"] if len(images) > 6 else []
        kinds = [word for word, is_so in (("leak", group["leak"]), ("classes differ", group["contradiction"])) if is_so]
        rows.append([", ".join(kinds) or "copies", fixed(len(images)), tag("ul", *(tag("li", name) for name in names))])
    caption = f"{_first(len(groups))}Images with the very same pixels; leaks first."
    return table(caption, ["kind", "images", "which"], rows, "lrl")
