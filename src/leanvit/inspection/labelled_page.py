"""The page about labelled images: what was found, and the contact sheet."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image, ImageOps

from leanvit.data.sets import ImageSet
from leanvit.inspection.page_parts import class_bars, copies_table, corrupt_table, kinds_table, total
from leanvit.progress import track
from leanvit.report import html
from leanvit.report.html import Card, Section, document, join
from leanvit.report.pixels import data_uri
from leanvit.report.words import fixed, significant

THUMBNAIL = 72
_GAP = 4


def render_images(result: dict[str, Any], images: ImageSet, *, count: int, seed: int) -> str:
    """The page as text. images: readable training images, `count` of each class are shown."""
    sections = [
        Section("classes", "Classes", _classes(result, images, count, seed)),
        Section("pixels", "Sizes and kinds", kinds_table(result)),
        Section("corrupt", "Images that can't be read", corrupt_table(result)),
        Section("duplicates", "Duplicates", _duplicates(result["duplicates"])),
    ]
    return document("leanvit data inspect", str(result["data"]), (_cards(result),), sections)


def _cards(result: dict[str, Any]) -> Markup | None:
    duplicates = result["duplicates"]
    corrupt = sum(len(part["corrupt"]) for part in result["parts"].values())
    largest = f"largest for one image of the smallest: {_ratio(result['balance'])}"
    decoded = "left out with --bad-images skip" if corrupt else "every image was decoded"
    several = f"{fixed(duplicates['contradictions'])} with several classes"
    return html.cards(
        [
            Card("Images", *total(result, "images")),
            Card("Classes", fixed(len(result["classes"])), "", largest),
            Card("Can't be read", fixed(corrupt), "", decoded),
            Card("Leaks", fixed(duplicates["leaks"]), "", "training images that are in another part as well"),
            Card("Duplicates", fixed(duplicates["extra"]), "", several),
        ]
    )


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
    heads = ["Class", *parts, "Weight", *(["Examples"] if count else [])]
    caption = (
        "Images of each class. Weight: readable training images / (classes × images of the class), "
        "scikit-learn's 'balanced'."
    )
    align = "l" + "r" * (len(parts) + 1) + ("l" if count else "")
    return join([_chart(result), html.table(caption, heads, rows, align)])


def _chart(result: dict[str, Any]) -> Markup:
    """Bars of training and validation images of each class."""
    parts = {split: result["parts"][split]["per_class"] for split in ("train", "val")}
    labels = {"train": "training images", "val": "validation images"}
    charts = {split: (f"balance-{split}", f"Classes by {labels[split]}", labels[split]) for split in parts}
    return class_bars(result["classes"], parts, charts, "Training and validation images of each class")


def _picture(name: str, strip: bytes | None) -> Markup | None:
    if strip is None:
        return None
    return html.image(data_uri(strip, "jpeg"), f"Training images of class {name}", THUMBNAIL)


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


def _duplicates(found: dict[str, Any]) -> Markup:
    def kind(group: dict[str, Any]) -> str:
        kinds = [("leak", group["leak"]), ("classes differ", group["contradiction"])]
        return ", ".join(word for word, is_so in kinds if is_so) or "copies"

    def name(image: dict[str, Any]) -> str:
        return f"{image['part']}, {image['class']}"

    return copies_table(found["groups"], "images", kind, name)
