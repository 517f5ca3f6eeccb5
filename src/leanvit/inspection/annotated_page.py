"""The page about annotated pictures: what was found, and a sheet of them with their annotations."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from leanvit import imaging
from leanvit.annotations import Found, Instance, Scene, SceneSet
from leanvit.annotations.load import SceneSplit
from leanvit.annotations.maps import load_map
from leanvit.annotations.masks import decode_mask
from leanvit.config import DataInspectConfig
from leanvit.errors import DataError
from leanvit.inspection.look import Seen
from leanvit.inspection.page_parts import class_bars, copies_table, corrupt_table, kinds_table, titled_bars, total
from leanvit.progress import track
from leanvit.report import html
from leanvit.report.html import Card, Section, document, join
from leanvit.report.metrics import title_of
from leanvit.report.pictures import Shot, gallery
from leanvit.report.svg import Row
from leanvit.report.words import fixed, short
from leanvit.runtime.draw import draw_found, draw_map, fitted

PROBLEMS_SHOWN = 50
_LONGEST_SIDE = 512
_COUNTS_SHOWN = 20


def render_scenes(
    result: dict[str, Any],
    parts: Mapping[SceneSplit, SceneSet],
    seen: Mapping[SceneSplit, list[Seen]],
    config: DataInspectConfig,
) -> str:
    """The page as text. parts, seen: pictures and what one look at each told, for the sheet."""
    found, pose = result["parts"], result["task"] == "pose"
    semantic = result["task"] == "semantic"
    sections = [
        Section("sheet", "Annotated pictures", _sheet(parts, seen, config) if config.images_per_class else None),
        Section("problems", "Problems", _problems(found)),
        Section("classes", "Classes", _pixels(result) if semantic else _classes(result)),
        Section("boxes", "Sizes of objects", None if semantic else _boxes(found)),
        Section("count", "Objects a picture", None if semantic else _per_picture(found)),
        Section("keypoints", "Keypoints", _keypoints(result) if pose else None),
        Section("pixels", "Sizes and kinds of pictures", kinds_table(result)),
        Section("corrupt", "Pictures that can't be read", corrupt_table(result)),
        Section("duplicates", "Duplicates", _copies(result["duplicates"])),
    ]
    title = f"{result['data']} for {title_of(result['task'])}"
    return document("leanvit data inspect", title, (_cards(result),), sections)


def _cards(result: dict[str, Any]) -> Markup | None:
    copies = result["duplicates"]
    semantic = result["task"] == "semantic"
    classes = Card("Classes", fixed(len(result["classes"])), "", ", ".join(result["classes"][:3]))
    return html.cards(
        [
            Card("Pictures", *total(result, "images")),
            classes if semantic else Card("Objects", *total(result, "objects")),
            Card("Problems", *total(result, "problems")),
            Card("Can't be read", *total(result, "corrupt")),
            Card("In both parts", fixed(copies["leaks"]), "", f"{fixed(copies['extra'])} duplicates in all"),
        ]
    )


# --- the sheet ---


def _sheet(
    parts: Mapping[SceneSplit, SceneSet], seen: Mapping[SceneSplit, list[Seen]], config: DataInspectConfig
) -> Markup:
    caption = (
        "Pictures of both parts, chosen by the seed, with their annotations as a network would be taught them; the "
        "number at a label is a score, 1 for every annotated object."
    )
    return html.figure(caption, gallery(_shots(parts, seen, config)))


def _shots(
    parts: Mapping[SceneSplit, SceneSet], seen: Mapping[SceneSplit, list[Seen]], config: DataInspectConfig
) -> Iterator[Shot]:
    for split, scenes in parts.items():
        readable = [i for i, one in enumerate(seen[split]) if not one.problem]
        order = np.random.default_rng(config.seed).permutation(readable)[: config.images_per_class]
        for index in track(sorted(order.tolist()), f"drawing {scenes.name}", len(order)):
            scene = scenes.scenes[index]
            drawn, said = draw_annotated(scene, scenes, config.task)
            yield Shot(_jpeg(fitted(drawn, _LONGEST_SIDE)), f"{split}, {short(scene.path.name, 40)}", said, "jpeg")


def draw_annotated(scene: Scene, scenes: SceneSet, task: str) -> tuple[NDArray[np.uint8], str]:
    """A picture with its annotations (H, W, 3) uint8, and what they are in words.

    Raises ImageError where the picture can't be decoded.
    """
    pixels = imaging.decode(scene.path).pixels
    if task == "semantic":
        try:
            labels = load_map(scene, scenes)
        except DataError as error:
            return pixels, str(error)
        present = [scenes.classes[label] for label in np.unique(labels) if label < len(scenes.classes)]
        return draw_map(pixels, labels, scenes.classes), f"{len(present)} classes"
    truth = [_as_found(one, scene, task) for one in scene.instances if not one.crowd]
    scheme = scenes.keypoints if task == "pose" else None
    return draw_found(pixels, truth, scenes.classes, scheme), f"{len(truth)} object{'s' * (len(truth) != 1)}"


def _as_found(one: Instance, scene: Scene, task: str) -> Found:
    mask = decode_mask(one.segmentation, scene.size) if task == "segment" else None
    return Found(one.label, 1.0, one.box, mask, one.keypoints if task == "pose" else None)


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


# --- sections ---


def _problems(parts: dict[str, Any]) -> Markup:
    named = [(split, problem) for split, part in parts.items() for problem in part["problems"]]
    if not named:
        return html.paragraph("None: every annotation is as it should be.")
    many = f"The first {PROBLEMS_SHOWN} of {fixed(len(named))}; all are in inspect.json. "
    caption = f"{many if len(named) > PROBLEMS_SHOWN else ''}What is broken, and what was done with it."
    return html.table(caption, ["Part", "Problem"], named[:PROBLEMS_SHOWN], "ll")


def _classes(result: dict[str, Any]) -> Markup:
    counts = {split: part["per_class"] for split, part in result["parts"].items()}
    caption = "Objects of each class, without crowds"
    rows = [[name, *(fixed(values.get(name)) for values in counts.values())] for name in result["classes"]]
    bars = class_bars(result["classes"], counts, _class_charts(counts, "objects"), caption)
    return join([bars, html.table(f"{caption}.", ["Class", *counts], rows, "l" + "r" * len(counts))])


def _pixels(result: dict[str, Any]) -> Markup:
    shares = {split: part["pixels"] for split, part in result["parts"].items()}
    percent = {split: {n: 100 * v for n, v in found["shares"].items()} for split, found in shares.items()}
    looked = ", ".join(f"{fixed(found['maps'])} {split}" for split, found in shares.items())
    caption = f"Share of pixels of each class, counted in {looked} class maps"
    rows = [[name, *(fixed(values.get(name), 2) for values in percent.values())] for name in result["classes"]]
    rows.append(["no class (ignored)", *(fixed(100 * found["ignored"], 2) for found in shares.values())])
    bars = class_bars(result["classes"], percent, _class_charts(percent, "share of pixels, %"), caption, 2)
    return join([bars, html.table(f"{caption}, in %.", ["Class", *shares], rows, "l" + "r" * len(shares))])


def _class_charts(parts: Mapping[str, Any], label: str) -> dict[str, tuple[str, str, str]]:
    """Key, title and name of the axis of a chart of classes for each part."""
    return {split: (f"classes-{split}", f"Classes, {split}", label) for split in parts}


def _boxes(parts: dict[str, Any]) -> Markup:
    charts, rows = [], []
    for kind, scale, unit, label in (
        ("pixels", 1, "", "Side in pixels"),
        ("relative", 100, "%", "Side as a share of the picture's"),
    ):
        used = [i for part in parts.values() for i, count in enumerate(part["boxes"][kind]["counts"]) if count]
        shown = slice(min(used, default=0), max(used, default=0) + 1)
        for split, part in parts.items():
            found = part["boxes"][kind]
            names = _ranges([edge * scale for edge in found["edges"]], unit)[shown]
            bars = [_count_row(name, count) for name, count in zip(names, found["counts"][shown], strict=True)]
            charts.append(titled_bars(f"boxes-{kind}-{split}", f"{label}, {split}", bars, "boxes"))
    for split, part in parts.items():
        boxes = part["boxes"]
        medians = [fixed(boxes["pixels"]["median"], 1), fixed(_percent(boxes["relative"]["median"]), 1)]
        rows.append([split, *medians, *(fixed(boxes[size]) for size in ("small", "medium", "large"))])
    heads = ["Part", "Median side, pixels", "of the picture, %", "Small", "Medium", "Large"]
    caption = (
        "Sides of boxes, the square root of their area. Small, medium and large are COCO's: areas of objects below "
        "32², up to 96² and above 96² pixels."
    )
    note = "Boxes by the square root of their area, in pixels and as a share of that of the picture."
    return join([html.figure(note, html.panels(*charts)), html.table(caption, heads, rows, "lrrrrr")])


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _ranges(edges: list[float], unit: str) -> list[str]:
    """'0 to 8', ..., '1024 and more'."""
    texts = [f"{edge:g}{unit}" for edge in edges]
    return [*(f"{low} to {high}" for low, high in itertools.pairwise(texts)), f"{texts[-1]} and more"]


def _per_picture(parts: dict[str, Any]) -> Markup:
    charts = []
    for split, part in parts.items():
        counts = {int(count): pictures for count, pictures in part["objects_per_picture"].items()}
        bars = [_count_row(str(n), counts.get(n, 0)) for n in range(min(max(counts, default=0), _COUNTS_SHOWN) + 1)]
        more = sum(pictures for count, pictures in counts.items() if count > _COUNTS_SHOWN)
        bars += [_count_row(f"more than {_COUNTS_SHOWN}", more)] if more else []
        charts.append(titled_bars(f"count-{split}", f"Objects a picture, {split}", bars, "pictures"))
    return html.figure("How many pictures have how many objects.", html.panels(*charts))


def _count_row(name: str, count: int) -> Row:
    return Row(name, float(count), fixed(count))


def _keypoints(result: dict[str, Any]) -> Markup:
    words = ("visible", "hidden", "absent")
    rows = [
        [name, *(fixed(part["keypoints"]["visibility"][name][word]) for part in result["parts"].values()
                 for word in words)]
        for name in result["keypoints"]
    ]  # fmt: skip
    heads = ["Keypoint", *(f"{split} {word}" for split in result["parts"] for word in words)]
    without = ", ".join(f"{fixed(part['keypoints']['objects_without'])} {s}" for s, part in result["parts"].items())
    caption = f"Keypoints of the objects by visibility. Objects without any keypoints: {without}."
    return html.table(caption, heads, rows, "l" + "r" * (len(heads) - 1))


def _copies(found: dict[str, Any]) -> Markup:
    return copies_table(
        found["groups"],
        "pictures",
        lambda group: "in both parts" if group["leak"] else "copies",
        lambda image: str(image["part"]),
    )
