"""Classes of a network and of a data set: the same, or the same under other names."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from leanvit.data.loader import check_classes
from leanvit.data.sets import ImageSet
from leanvit.load.labels import are_numbered, imagenet_synsets
from leanvit.passed_over import few
from leanvit.progress import note


def agreed(labels: tuple[str, ...], images: ImageSet, name: str) -> tuple[tuple[str, ...], ImageSet]:
    """A network's labels and labelled images that speak of the same classes in the same order.

    Folders that are called by ImageNet's WordNet ids (n01440764) are found in a network that knows ImageNet's classes,
    also where they are only some of these. Of a network whose classes have no names but numbers, the data set's names
    and their order are taken, where it has as many. Both are said. A network without classes, which embeds, takes all.
    Raises DataError where the classes are others.
    """
    if images.classes == labels or not labels:
        return labels, images
    if images.labels.ndim == 2 and set(images.classes) <= set(labels):
        truth = np.zeros((len(images), len(labels)), np.int64)
        truth[:, [labels.index(name) for name in images.classes]] = images.labels
        return labels, replace(images, classes=labels, labels=truth)
    synsets = imagenet_synsets(labels)
    if synsets and set(images.classes) <= set(synsets):
        note(f"{name}: its {len(images.classes)} classes are WordNet ids, found among the network's {len(labels)}")
        places = np.asarray([synsets.index(found) for found in images.classes], np.int64)
        return labels, replace(images, classes=labels, labels=places[images.labels])
    if are_numbered(labels) and len(labels) == len(images.classes):
        note(f"{name} names the network's {len(labels)} classes, in the order of the data: {few(images.classes)}")
        return images.classes, images
    check_classes(images.classes, labels, name)
    return labels, images
