"""Classes of a network and of data: the same under other names, or refused."""

from __future__ import annotations

import numpy as np
import pytest

from leanvit.data.classes import agreed
from leanvit.data.sets import ImageSet
from leanvit.errors import DataError
from leanvit.load.labels import imagenet_labels


def images(classes: tuple[str, ...], labels: list[int]) -> ImageSet:
    sources = [np.zeros((2, 2, 3), np.uint8) for _ in labels]
    return ImageSet("photos", sources, np.asarray(labels, np.int64), classes)


def test_folders_called_by_wordnet_ids_are_found_among_imagenets_classes() -> None:
    labels = imagenet_labels("imagenet-1k")
    found, data = agreed(labels, images(("n01440764", "n01443537", "n15075141"), [0, 1, 2, 2]), "photos")
    assert found == data.classes == labels
    assert [labels[i] for i in data.labels] == ["tench", "goldfish", "toilet tissue", "toilet tissue"]


def test_numbered_classes_get_the_names_of_as_many_folders(capsys: pytest.CaptureFixture[str]) -> None:
    data = images(("cat", "dog"), [0, 1])
    assert agreed(("0", "1"), data, "photos") == (("cat", "dog"), data)
    assert "order of the data: cat, dog" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [("dog", "cat"), ("0", "1", "2"), ("cat",)])
def test_other_classes_are_refused(labels: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="in that order"):
        agreed(labels, images(("cat", "dog"), [0, 1]), "photos")
