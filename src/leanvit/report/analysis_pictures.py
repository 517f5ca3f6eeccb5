"""Pictures of an analysis: attention maps of layers and heads, rollout, receptive fields, from analysis.npz."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from leanvit.errors import DataError
from leanvit.report import html
from leanvit.report.attention import attention_figure, picture, pictures, ramp
from leanvit.report.html import join
from leanvit.report.pixels import heat
from leanvit.report.run import Run
from leanvit.report.words import Json, finite, fixed

Arrays = dict[str, NDArray[np.float64]]
IMAGES_SHOWN = 4


def read_arrays(run: Run) -> Arrays | None:
    """The arrays beside analysis.json, None where there are none. Raises DataError where they can't be read."""
    path = run.files["analysis.json"].with_name("analysis.npz")
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: np.nan_to_num(file[name].astype(np.float64)) for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: not readable as arrays ({error}), expected those that leanvit analyze writes. Analyze again."
        ) from error


def _layers(arrays: Arrays, model: int) -> list[NDArray[np.float64]]:
    """(N, heads, rows, columns) of every layer."""
    return [arrays[key] for key in sorted(arrays) if key.startswith(f"{model}/attention/")]


def _shown(values: Json, model: Json, arrays: Arrays, index: int) -> list[Json]:
    """Label, prediction and pixels of the images that are drawn."""
    pixels = arrays[f"{index}/pixels"][:IMAGES_SHOWN]
    named = zip(values["labels"], model["predicted"], pixels, strict=False)
    return [{"label": label, "predicted": predicted, "image": image} for label, predicted, image in named]


def map_pictures(values: Json, models: Sequence[Json], arrays: Arrays | None) -> Markup | None:
    """Mean over heads of every layer, for a few images."""
    parts = []
    for index, model in enumerate(models if arrays else ()):
        layers = _layers(arrays or {}, index)
        if layers:
            images = _shown(values, model, arrays or {}, index)
            maps = [{**image, "maps": [layer[i].mean(0) for layer in layers]} for i, image in enumerate(images)]
            parts += [html.heading(str(model["name"])), attention_figure(maps)]
    return join(parts) if parts else None


def head_pictures(values: Json, models: Sequence[Json], arrays: Arrays | None) -> Markup | None:
    """Every head of every layer, for the first image, folded."""
    parts = []
    for index, model in enumerate(models if arrays else ()):
        layers = _layers(arrays or {}, index)
        if layers:
            summary = f"{model['name']}, first image, label {values['labels'][0]}"
            parts.append(html.details(summary, _heads(str(model["name"]), layers)))
    return join(parts) if parts else None


def _heads(name: str, layers: Sequence[NDArray[np.float64]]) -> Markup:
    shares = [layer[0] * layer[0, 0].size for layer in layers]
    top = max(1.0, float(np.percentile(np.concatenate([s.ravel() for s in shares]), 99.5)))
    rows = []
    for depth, heads in enumerate(shares, start=1):
        cells = [
            picture(heat(head, top), f"{name}: layer {depth}, head {i}", f"layer {depth}", f"head {i}")
            for i, head in enumerate(heads, start=1)
        ]
        rows.append(pictures(cells))
    caption = "Attention that each patch receives in every head, a line or more for each layer; one scale for all."
    return html.figure(caption, *rows, ramp(top))


def rollout_pictures(values: Json, models: Sequence[Json], arrays: Arrays | None) -> Markup | None:
    """What the output looks at through all layers."""
    rows = []
    for index, model in enumerate(models if arrays else ()):
        maps = (arrays or {}).get(f"{index}/rollout")
        if maps is None:
            continue
        shares = maps[:IMAGES_SHOWN] * maps[0].size
        top = max(1.0, float(shares.max()))
        cells = []
        for number, (image, share) in enumerate(
            zip(_shown(values, model, arrays or {}, index), shares, strict=True), 1
        ):
            said = f"{model['name']}, input {number}, label {image['label']}"
            cells.append(picture(image["image"].astype(np.uint8), said, html.strong(f"label {image['label']}")))
            cells.append(picture(heat(share, top), f"{said}: rollout", "rollout", f"up to {fixed(share.max(), 1)}×"))
        rows += [html.heading(str(model["name"])), pictures(cells), ramp(top)]
    caption = (
        "Attention rollout (Abnar and Zuidema 2020): product over the layers of half attention, half identity. Row of "
        "the class token, or mean over the patches where there is none; 1× is even."
    )
    return html.figure(caption, *rows) if rows else None


def field_pictures(models: Sequence[Json], arrays: Arrays | None) -> Markup | None:
    """Gradient of the middle of the last map, and the area that holds most of it."""
    cells, rows = [], []
    for index, model in enumerate(models):
        values = model.get("field")
        if not values:
            continue
        areas = [finite(values.get(key)) for key in ("area50", "area95")]
        shares = [fixed(None if area is None else 100 * area, 1, "%") for area in areas]
        rows.append([model["name"], *shares])
        mean = (arrays or {}).get(f"{index}/field")
        if mean is not None:
            # The root, because the field falls off by orders of magnitude.
            shown = np.sqrt(mean / max(float(mean.max()), 1e-300))
            cells.append(picture(heat(shown, 1.0), f"{model['name']}: effective receptive field", str(model["name"])))
    if not rows:
        return None
    caption = (
        "Effective receptive field (after Luo et al. 2016): mean absolute gradient of the middle of the last map with "
        "respect to each pixel; colours show its square root."
    )
    note = "Area of the fewest pixels that hold 50% and 95% of the field, in percent of the image."
    table = html.table(note, ("Model", "50%", "95%"), rows, "lrr")
    return join([html.figure(caption, pictures(cells)) if cells else None, table])
