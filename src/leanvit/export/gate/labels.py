"""Checks of the labels: they stand where golden.npz, the data, the model and the predictions have them. Torch-free."""

from __future__ import annotations

import numpy as np

from leanvit.export.gate.check import Check
from leanvit.export.gate.given import Given
from leanvit.runtime.bundle import load_golden_records
from leanvit.runtime.task import kept_values


def check_labels(given: Given) -> list[Check]:
    """Labels stand where golden.npz, the data set and the model have them, as far as those name the same classes."""
    name, labels = "label order", given.manifest.labels
    hint = "Give the labels in the order of the training data's classes, and the data that the model was trained for."
    records = load_golden_records(given.folder)
    copy = tuple(records["labels"].tolist()) if records else labels
    data = given.evaluation.classes if given.evaluation else None
    known = {"golden.npz": copy, "the data set": data or (), "the model": given.origin.labels or ()}
    for where, names in known.items():
        for index, label in enumerate(labels):
            if label in names and names.index(label) != index:
                found = f"'{label}' is label {index}, {where} has it at {names.index(label)}"
                return [Check(name, False, found, f"the order of {where}", hint)]
    if copy != labels:
        return [Check(name, False, "other names than in golden.npz", "the labels of export", hint)]
    # Of labelled images only the names may differ, and predictions tell; an object's class is its number.
    if given.task.data == "scenes" and data is not None and data != labels:
        found = f"the data set has {', '.join(data[:4])}... ({len(data)}), the bundle {', '.join(labels[:4])}..."
        return [Check(name, False, f"{found} ({len(labels)})", "the same in the same order", hint)]
    same = [where for where, names in known.items() if names == labels and where != "golden.npz"]
    found = f"as in {' and '.join(same)}" if same else "NOT verified: neither data nor model name these classes"
    return [Check(name, True if same else None, found, "the order of training", hint)]


def check_predicted_labels(given: Given) -> list[Check]:
    """Whether predictions fit the labels of the images, but in another order: then a list was sorted otherwise."""
    if given.evaluation is None or given.evaluation.labels is None:
        return []
    labels = given.evaluation.labels
    present = np.unique(labels[labels >= 0])
    if len(present) < 2:
        return []
    logits = kept_values(given.task, given.evaluated)
    predicted = logits.argmax(1)
    counts = np.stack([np.bincount(predicted[labels == c], minlength=logits.shape[1]) for c in present])
    likely = counts.argmax(1)
    own = int((likely == present).sum())
    fits = counts.max(1).sum() >= 0.5 * counts.sum() and len(set(likely.tolist())) == len(present)
    passed = False if fits and own < len(present) / 2 else True if own >= len(present) / 2 else None
    found = f"{own} of {len(present)} classes are mostly called by their own label"
    if passed is None:
        found = f"NOT verified: predictions fit the labels in no order; {found}"
    elif not passed:
        first = int(np.flatnonzero(likely != present)[0])
        names = given.manifest.labels[present[first]], given.manifest.labels[likely[first]]
        found += f"; images of '{names[0]}' are mostly called '{names[1]}'"
    hint = "Model and data number the classes differently: give labels and data in the order of training."
    return [Check("predicted labels", passed, found, "most of them", hint)]
