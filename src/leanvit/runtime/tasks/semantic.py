"""Semantic segmentation: the class of every pixel. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np

from leanvit.annotations import ClassMap, Outputs, SceneSet
from leanvit.annotations.maps import load_map
from leanvit.annotations.metrics import SegmentationScores
from leanvit.imaging import Pixels
from leanvit.runtime.bundle import Manifest
from leanvit.runtime.decode import class_map
from leanvit.runtime.inputs import Inputs, Options, placement_of
from leanvit.runtime.tasks.objects import Batches, each_row

NAMED = 4
"""Classes that a picture's text names."""


def decode(outputs: Outputs, inputs: Inputs, manifest: Manifest, options: Options) -> ClassMap:
    """Class of every pixel of one picture: (height, width) uint8."""
    return class_map(outputs["logits"][0], placement_of(inputs.places[0]), inputs.size)


def shares(found: ClassMap, labels: tuple[str, ...]) -> dict[str, float]:
    """Share of the picture that each class covers, the largest first."""
    counts = np.bincount(found.ravel(), minlength=len(labels))
    order = sorted(np.flatnonzero(counts), key=lambda label: -counts[label])
    return {labels[label]: round(float(counts[label] / found.size), 5) for label in order}


def line(found: ClassMap, manifest: Manifest) -> dict[str, Any]:
    """What a JSON line says of one picture."""
    return {"shares": shares(found, manifest.labels)}


def text(found: ClassMap, manifest: Manifest) -> str:
    """One picture in words: the classes that cover most of it."""
    named = list(shares(found, manifest.labels).items())[:NAMED]
    return ", ".join(f"{label} {share:.0%}" for label, share in named)


COLUMNS = ("label", "share")


def rows(found: ClassMap, manifest: Manifest) -> list[list[Any]]:
    """One picture as rows of a table: one a class that occurs, in the order of COLUMNS."""
    return [[label, f"{share:.5f}"] for label, share in shares(found, manifest.labels).items()]


def draw(pixels: Pixels, found: ClassMap, manifest: Manifest) -> dict[str, Pixels]:
    """The picture (height, width, 3) uint8 tinted by class, and the map (height, width) itself."""
    from leanvit.runtime.draw import draw_map

    return {"drawn": draw_map(pixels, found, manifest.labels), "map": found}


def measure(data: SceneSet, batches: Batches) -> dict[str, Any]:
    """Intersection over union and accuracy of the pixels, `miou` among them, each 0 to 1."""
    scores = SegmentationScores(len(data.classes))
    for outputs, row, place in each_row(batches):
        scene = data.scenes[place.index]
        found = class_map(outputs["logits"][row], placement_of(place), scene.size)
        scores.update(load_map(scene, data), found)
    return {**scores.result(), "pictures": len(data.scenes)}
