"""Section Attention: where each layer looks, for a few images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from leanvit.report import html
from leanvit.report.pixels import heat, png_uri
from leanvit.report.run import Run
from leanvit.report.words import Json, fixed

Cell = tuple[str, str, Sequence[object]]
"""One picture of a grid: its address, what is seen, and the lines below it."""


def attention_section(run: Run) -> Markup | None:
    """Where each layer looks, for a few images."""
    images = run.get("attention").get("images") or []
    return attention_figure(images) if images else None


def attention_figure(images: Sequence[Json]) -> Markup:
    """Maps of several images in one scale.

    images: {"label", "predicted", "image": (H, W, 3) in 0..255, "maps": [(rows, columns)], shares of attention}.
    """
    # Times the number of patches: 1 is even attention, whatever the grid of a layer.
    shares = [[_grid(grid) for grid in image["maps"]] for image in images]
    top = max(
        1.0, float(np.percentile(np.concatenate([s.ravel() for maps in shares for s in maps] or [np.ones(1)]), 99.5))
    )
    rows = (_attention_row(image, maps, top, i) for i, (image, maps) in enumerate(zip(images, shares, strict=True), 1))
    caption = (
        "Attention that each patch receives, layer by layer: mean over heads and over the patches that look. 1× is "
        "what a patch receives when attention is even; all maps share one scale. Spread is the share of patches that "
        "attention is effectively spread over (exponential of its entropy): 100% is even, small is focused."
    )
    return html.figure(caption, *rows, ramp(top))


def ramp(top: float) -> Markup:
    """The colour scale of maps from 0 to `top` times even attention."""
    return html.ramp(png_uri(heat(np.linspace(0.0, top, 160)[None], top)), fixed(top, 1))


def _grid(values: Any) -> NDArray[np.float64]:
    grid = np.nan_to_num(np.asarray(values, np.float64), posinf=0.0, neginf=0.0)
    if grid.ndim != 2 or not grid.size:
        raise ValueError(f"an attention map has shape {grid.shape}, not (rows, columns)")
    return grid * grid.size


def _attention_row(image: Json, maps: Sequence[NDArray[np.float64]], top: float, number: int) -> Markup:
    pixels = np.nan_to_num(np.asarray(image["image"], np.float64)).clip(0, 255).astype(np.uint8)
    if pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"image {number} of attention.json has shape {pixels.shape}, not (height, width, 3)")
    label, predicted = str(image.get("label")), str(image.get("predicted"))
    verdict = f"predicted {predicted}, {'correct' if label == predicted else 'wrong'}"
    name = f"Input {number}, label {label}"
    cells = [picture(pixels, f"{name}, {verdict}", html.strong(f"label {label}"), verdict)]
    for depth, share in enumerate(maps, start=1):
        weights = share[share > 0] / max(float(share.sum()), 1e-12)
        spread = f"spread {100 * math.exp(-float((weights * np.log(weights)).sum())) / share.size:.0f}%"
        row, column = np.unravel_index(int(share.argmax()), share.shape)
        said = (
            f"{name}: attention of layer {depth} on {share.shape[0]} by {share.shape[1]} patches, {spread}, most at "
            f"row {row + 1}, column {column + 1}"
        )
        cells.append(picture(heat(share, top), said, f"layer {depth}", spread))
    return pictures(cells)


def pictures(cells: Sequence[Cell]) -> Markup:
    """Pictures beside each other, at most nine in a line of a wide screen, four of a narrow one."""
    return html.maps(cells, math.ceil(len(cells) / math.ceil(len(cells) / 9)), min(len(cells), 4))


def picture(pixels: NDArray[np.uint8], alt: str, *lines: object) -> Cell:
    """An image (height, width, 3) with lines of text below it."""
    return png_uri(pixels), alt, lines
