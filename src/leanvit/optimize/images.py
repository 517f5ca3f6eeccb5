"""What optimize calibrates and measures on: labelled data, or photographs that are labelled by the float network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leanvit.annotations import SceneSet
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import OptimizeOptions
from leanvit.data.loader import Loader
from leanvit.data.sets import ImageSet
from leanvit.data.sets.local import SPLIT_NAMES
from leanvit.errors import DataError
from leanvit.evaluation.readable import readable
from leanvit.export.data import Data, agreed_classes, calibration_inputs, evaluation_of, read_data
from leanvit.export.gate.evaluation import Evaluation
from leanvit.export.network import network_outputs
from leanvit.files import fingerprint
from leanvit.image_paths import images_below, is_hidden, leave_out_foreign
from leanvit.imaging import Pixels
from leanvit.load.labels import are_numbered, imagenet_synsets, numbered
from leanvit.progress import note
from leanvit.runtime.neighbours import nearest
from leanvit.runtime.task import task_named

OWN_LABELS = "labelled by the float network"
"""What the name of a data set says whose labels are the float network's: accuracy on it is agreement."""

ANCHORS = 10
"""Drawn images that stand for classes where photographs have none: as many as neighbours that vote."""


@dataclass(frozen=True)
class Images:
    """Data of one run.

    x: (N, 3, H, W) float32, normalised calibration images. val: what every file is measured on; calibration has seen
    none of it. labelled: whether its labels are of people. info: with the names of the network's outputs.
    """

    x: Tensor
    val: Data
    labelled: bool
    info: CheckpointInfo

    @cached_property
    def evaluation(self) -> Evaluation:
        """Prepared validation images, all of them or those annotated ones that are compared one by one."""
        return evaluation_of(self.info.task, self.val, self.info.preprocess)

    @property
    def count(self) -> int:
        """Validation images."""
        return len(self.val.scenes) if isinstance(self.val, SceneSet) else len(self.val)

    @property
    def fingerprint(self) -> str:
        """Tells calibration and validation data from others: pixels, and what is known of them."""
        known: Any = self.val.scenes if isinstance(self.val, SceneSet) else self.val.labels.tolist()
        parts = (self.x.numpy().tobytes(), self.evaluation.pixels.tobytes(), repr(known).encode())
        return "".join(fingerprint(part) for part in parts)


def read_images(network: nn.Module, info: CheckpointInfo, data: str, options: OptimizeOptions) -> Images:
    """Calibration and validation images of a network.

    data: labelled or annotated, as for training, its classes those of the network or some of them; or, of a classifier,
    a folder of photographs without classes.
    Raises DataError where classes are others, ImageError for a damaged image.
    """
    task = task_named(info.task)
    if task.data != "images" or task.returns == "labels":
        (labels, train), (_, val) = (agreed_classes(info.labels, part, data) for part in _splits(info, data))
        info = replace(info, labels=labels)
        return Images(_calibration(info, train, options), _some(val, info, options), True, info)
    folders = _without_classes(Path(data))
    if task.returns == "vector":
        return _embedded(network, info, data, folders, options)
    if folders is None:
        return _labelled(network, info, data, options)
    train_set, val_set = _photographs(data, folders, info, options.seed)
    return _with_own_labels(network, info, train_set, val_set, options)


def _splits(info: CheckpointInfo, data: str) -> tuple[Data, Data]:
    """Training and validation data, as a network's own was cut."""
    how = {"val_fraction": info.val_fraction, "seed": info.seed}
    return read_data(info.task, data, "train", **how), read_data(info.task, data, "val", **how)


def _calibration(info: CheckpointInfo, train: Data, options: OptimizeOptions) -> Tensor:
    return calibration_inputs(info, train, options.calibration_images, options.seed, bad_images=options.bad_images)


def _some(val: Data, info: CheckpointInfo, options: OptimizeOptions) -> Data:
    """At most `val_images` of a split, drawn by the seed; what that leaves out is said."""
    count = len(val.scenes) if isinstance(val, SceneSet) else len(val)
    if options.val_images and count > options.val_images:
        note(f"measured on {options.val_images} of {count} validation images; all of them: --val-images 0")
        val = _drawn(val, options.val_images, options.seed)
    return readable(info.task, val, info.preprocess) if options.bad_images == "skip" else val


def _drawn(data: Data, count: int, seed: int) -> Data:
    """`count` images of a set, drawn by the seed, in their order."""
    total = len(data.scenes) if isinstance(data, SceneSet) else len(data)
    picks = np.sort(np.random.default_rng(seed).permutation(total)[:count])
    if isinstance(data, SceneSet):
        return replace(data, scenes=tuple(data.scenes[i] for i in picks))
    return data.subset(picks)


# --- labels ---


def _labelled(network: nn.Module, info: CheckpointInfo, data: str, options: OptimizeOptions) -> Images:
    train, val = cast(tuple[ImageSet, ImageSet], _splits(info, data))
    labels = info.labels or _numbered(network, info)
    if not _speak_of_same(labels, train.classes):
        note(
            f"{data}: none of its {len(train.classes)} classes ({', '.join(train.classes[:3])}, ...) is one of the "
            f"network's ({', '.join(labels[:3])}, ...): taken as photographs without labels"
        )
        return _with_own_labels(network, replace(info, labels=labels), train, val, options)
    parts = []
    for part in (train, val):
        if set(part.classes) <= set(labels):
            parts.append(_in_order(part, labels))
        else:
            parts.append(cast(ImageSet, agreed_classes(labels, part, data)[1]))
    info = replace(info, labels=parts[0].classes)
    return Images(_calibration(info, parts[0], options), _some(parts[1], info, options), True, info)


def _speak_of_same(labels: tuple[str, ...], classes: tuple[str, ...]) -> bool:
    """Whether any class of a data set may be one of a network's: by name, by WordNet id, or by order."""
    if are_numbered(labels):
        return len(labels) == len(classes)
    return bool(set(classes) & {*labels, *(imagenet_synsets(labels) or ())})


def _in_order(images: ImageSet, labels: tuple[str, ...]) -> ImageSet:
    """Images whose labels count the network's outputs, of which the set may have some only."""
    if images.classes == labels:
        return images
    places = np.array([labels.index(name) for name in images.classes], np.int64)
    return replace(images, labels=places[images.labels], classes=labels)


@torch.inference_mode()
def _numbered(network: nn.Module, info: CheckpointInfo) -> tuple[str, ...]:
    """Names for the outputs of a network that has none: their numbers."""
    pixels = np.zeros((1, *info.preprocess.input_size, info.preprocess.channels), np.uint8)
    return numbered(network_outputs(network.eval(), info, pixels)["logits"].shape[1])


# --- photographs without labels ---


def _without_classes(folder: Path) -> tuple[Path, ...] | None:
    """(all,) or (train, val) of a folder whose images lie in no folders of classes; None where they do.

    Images that lie in the folder itself have no class, and one folder alone is none either.
    """
    if not folder.is_dir():
        return None
    below = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    splits = {SPLIT_NAMES[path.name]: path for path in below if path.name in SPLIT_NAMES}
    held_out = splits.get("val") or splits.get("test")
    if "train" in splits and held_out:
        parts = splits["train"], held_out
        return parts if all(_without_classes(part) for part in parts) else None
    loose = any(path.parent == folder for path in images_below(folder))
    return (folder,) if loose or len(below) < 2 else None


def _photographs(data: str, folders: tuple[Path, ...], info: CheckpointInfo, seed: int) -> tuple[ImageSet, ImageSet]:
    """Training and validation images: as the folders are, or the network's validation share of one folder."""
    sets = []
    for folder in folders:
        paths = leave_out_foreign(images_below(folder))
        if len(paths) < 2:
            raise DataError(f"{folder}: {len(paths)} images found, expected some to calibrate on and some to measure.")
        sets.append(ImageSet(data, paths, np.zeros(len(paths), np.int64), info.labels))
    if len(sets) == 2:
        return sets[0], sets[1]
    whole = sets[0]
    order = np.random.default_rng(seed).permutation(len(whole))
    held_out = min(max(1, round(info.val_fraction * len(whole))), len(whole) - 1)
    return whole.subset(np.sort(order[held_out:])), whole.subset(np.sort(order[:held_out]))


def _with_own_labels(
    network: nn.Module, info: CheckpointInfo, train: ImageSet, val: ImageSet, options: OptimizeOptions
) -> Images:
    """Images whose labels are what the float network says of them, so that accuracy is agreement with it."""
    named = replace(info, labels=info.labels or _numbered(network, info))
    chosen = cast(ImageSet, _some(val, info, options))
    logits = network_outputs(network.eval(), named, _pixels(chosen, named))["logits"]
    note(f"{val.name} has no labels: what is held is agreement with the float network, on {len(chosen)} images")
    labels: NDArray[np.int64] = logits.argmax(1).astype(np.int64)
    own = replace(chosen, name=f"{val.name} ({OWN_LABELS})", labels=labels, classes=named.labels)
    return Images(_calibration(named, train, options), own, False, named)


def _embedded(
    network: nn.Module, info: CheckpointInfo, data: str, folders: tuple[Path, ...] | None, options: OptimizeOptions
) -> Images:
    """Images of a network that returns vectors: of any classes, or without any.

    Without classes, an image's label is which of some images, drawn by the seed, the float network has it nearest to: a
    file that keeps who is near to whom keeps the vote of neighbours for it.
    """
    if folders is None:
        labelled = _splits(info, data)
        return Images(_calibration(info, labelled[0], options), _some(labelled[1], info, options), True, info)
    train, val = _photographs(data, folders, info, options.seed)
    chosen = cast(ImageSet, _some(val, info, options))
    vectors = network_outputs(network.eval(), info, _pixels(chosen, info))["embeddings"]
    # A label that one image alone has can't be found again among its neighbours, of which 10 are asked.
    count = max(2, min(ANCHORS, len(chosen) // 10))
    drawn = np.random.default_rng(options.seed).permutation(len(chosen))[:count]
    labels = nearest(vectors, vectors[drawn], 1)[0][:, 0]
    note(
        f"{val.name} has no labels: what is held is which of {len(drawn)} drawn images each of {len(chosen)} is near "
        "to, as the float network has it"
    )
    named = tuple(chosen.name_of(int(place)) for place in drawn)
    own = replace(chosen, name=f"{val.name} ({OWN_LABELS})", labels=labels, classes=named)
    return Images(_calibration(info, train, options), own, False, info)


def _pixels(images: ImageSet, info: CheckpointInfo) -> Pixels:
    return np.concatenate([x.numpy() for x, _ in Loader(images, info.preprocess, 64)])
