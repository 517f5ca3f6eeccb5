"""Hugging Face data sets, from a folder or from the local cache; the network is used on request only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit import imaging
from leanvit.data.sets.image_set import ImageSet, Parts
from leanvit.data.sets.local import SPLIT_NAMES
from leanvit.errors import DataError, ImageError, require
from leanvit.passed_over import note_once


@dataclass(frozen=True, slots=True)
class HubImage:
    """An image in a row of a table, encoded: `rows` has the one column `column` and does not decode it."""

    rows: Any
    column: str
    index: int
    table: str

    def read(self) -> bytes:
        """Its bytes, or those of the file that the row names. Raises ImageError."""
        value = self.rows[self.index][self.column] or {}
        if value.get("bytes"):
            return bytes(value["bytes"])
        if not value.get("path"):
            raise ImageError(f"{self}: an empty row, expected an image. Remove the row.")
        return imaging.read_file(Path(value["path"]))

    def __str__(self) -> str:
        """Table and row, counted from 0."""
        return f"{self.table}[{self.index}]"


def hub_parts(name: str, *, download: bool) -> Parts:
    """A Hugging Face data set with a column of images and one of classes (`Image` and `ClassLabel` features).

    name: folder that `save_to_disk` wrote, folder that `load_dataset` reads, or name of a data set on the hub. The hub
        is asked only where `download` is true; otherwise its data sets come from the local cache, offline and without
        telemetry. The split 'validation' validates, else 'test', else images held out of 'train'.
    Raises DataError where it is not there, has no training split, or no such columns.
    """
    datasets = require("datasets")
    try:
        with _network(datasets, allowed=download):
            loaded = _load(datasets, name)
    except (OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"hf:{name}: can't be loaded ({reason}). {_how_to_get(name, download)}") from error
    if not isinstance(loaded, dict):
        loaded = {"train": loaded}
    tables = {split: table for key, table in loaded.items() if (split := SPLIT_NAMES.get(str(key).lower()))}
    if len(tables) < len(loaded):
        note_once(f"hf:{name}: splits {', '.join(map(str, loaded))}; used are one each of train, validation and test")
    if "train" not in tables:
        raise DataError(f"hf:{name}: splits {', '.join(map(str, loaded))}, expected one named train. Rename it.")
    return {split: partial(_image_set, datasets, table, f"hf:{name}/{split}") for split, table in tables.items()}


def _load(datasets: Any, name: str) -> Any:
    folder = Path(name)
    if any((folder / file).is_file() for file in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(name)
    return datasets.load_dataset(name)


def _how_to_get(name: str, download: bool) -> str:
    if download or Path(name).exists():
        return "Check name and connection, or the files of the folder."
    code = f"from datasets import load_dataset; load_dataset('{name}').save_to_disk('FOLDER')"
    return (
        f"Nothing is downloaded unasked: --data hf-download:{name} does, once, into the cache; or, on a machine with "
        f'a network, run: python -c "{code}" and give hf:FOLDER'
    )


@contextmanager
def _network(datasets: Any, *, allowed: bool) -> Iterator[None]:
    """Keep the libraries from the network unless it is `allowed`; with it, what the environment says holds.

    Their modules read HF_HUB_OFFLINE and HF_HUB_DISABLE_TELEMETRY once, when they are imported, and timm has
    imported one of them long before: so what they have read is changed, and put back for others to use.
    """
    from huggingface_hub import constants

    wanted = [
        (constants, "HF_HUB_DISABLE_TELEMETRY", True),
        (constants, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_HUB_OFFLINE", True),
        (datasets.config, "HF_DATASETS_OFFLINE", True),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False),
    ]
    changed = [] if allowed else [(module, key, getattr(module, key), value) for module, key, value in wanted]
    for module, key, _, value in changed:
        setattr(module, key, value)
    try:
        yield
    finally:
        for module, key, before, _ in changed:
            setattr(module, key, before)


def _image_set(datasets: Any, table: Any, name: str) -> ImageSet:
    image = _column(table.features, datasets.Image, ("image", "img"), name)
    label = _column(table.features, datasets.ClassLabel, ("label", "labels", "fine_label"), name)
    classes = tuple(table.features[label].names)
    rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    sources = [HubImage(rows, image, index, name) for index in range(len(table))]
    return ImageSet(name, sources, _labels(table, label, len(classes), name), classes)


def _column(features: Any, kind: type, usual: tuple[str, ...], name: str) -> str:
    """The column of this feature; where there are several, the one with a usual name."""
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    chosen = found if len(found) == 1 else [column for column in usual if column in found][:1]
    if not chosen:
        described = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        raise DataError(
            f"{name}: {len(found)} columns of type {kind.__name__} among {described}; expected one, or one named "
            f"{usual[0]}. Change it with datasets (cast_column, class_encode_column, remove_columns) and save_to_disk."
        )
    return chosen[0]


def _labels(table: Any, column: str, count: int, name: str) -> NDArray[np.int64]:
    values = table.with_format("arrow", columns=[column])[:][column].to_pylist()
    wrong = next((i for i, value in enumerate(values) if value is None or not 0 <= value < count), None)
    if wrong is not None:
        raise DataError(
            f"{name}[{wrong}]: label {values[wrong]}, expected 0 to {count - 1}. Filter out rows without a label."
        )
    return np.asarray(values, np.int64)
