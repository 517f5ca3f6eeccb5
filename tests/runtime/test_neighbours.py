"""Nearest vectors against a search in float64, and the vote of neighbours against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from leanvit.errors import DataError, NumericalError, ShapeError
from leanvit.runtime import neighbours
from leanvit.runtime.inputs import Place
from leanvit.runtime.neighbours import cosines, nearest, unit
from leanvit.runtime.tasks import embed


def vectors(count: int, width: int = 12, seed: int = 0) -> np.ndarray:
    """Vectors of many lengths."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) * rng.uniform(0.01, 100, (count, 1))).astype(np.float32)


def exact_cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "QUERY_BLOCK", 7)
    monkeypatch.setattr(neighbours, "VECTOR_BLOCK", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("count", [1, 5, 16, 40])
def test_nearest_in_blocks_is_the_search_over_all(count: int) -> None:
    queries, known = vectors(23, seed=1), vectors(50, seed=2)
    places, found = nearest(queries, known, count)
    truth = exact_cosines(queries, known)
    assert (places == np.argsort(-truth, axis=1, kind="stable")[:, :count]).all()
    np.testing.assert_allclose(found, -np.sort(-truth, axis=1)[:, :count], atol=1e-6)


@pytest.mark.usefixtures("small_blocks")
def test_no_vector_is_its_own_neighbour_but_its_copy_is() -> None:
    known = vectors(40)
    known[31] = 3 * known[4]
    places, found = nearest(known, known, 39, but_itself=True)
    assert all(sorted(row) == [i for i in range(40) if i != own] for own, row in enumerate(places.tolist()))
    assert (places[4, 0], places[31, 0]) == (31, 4)
    assert found[4, 0] == pytest.approx(1, abs=1e-6)
    assert nearest(known, known, 60)[0].shape == (40, 40)


def test_a_vector_without_length_is_near_to_nothing_and_infinity_is_refused() -> None:
    one = vectors(3)
    one[1] = 0
    assert (unit(one)[1] == 0).all()
    assert cosines(one, one).tolist() == pytest.approx([1, 0, 1])
    one[2, 0] = np.inf
    with pytest.raises(NumericalError, match="embeddings of the images are NaN or infinite"):
        nearest(one, one, 1)
    with pytest.raises(ShapeError, match=r"\(3, 12\) and \(3, 5\)"):
        nearest(one, one[:, :5], 1)


class Labelled:
    name = "some images"

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels


def measured(found: np.ndarray, labels: np.ndarray, step: int = 9) -> dict[str, object]:
    batches = [
        ({"embeddings": found[i : i + step]}, [Place(n) for n in range(i, min(i + step, len(found)))])
        for i in range(0, len(found), step)
    ]
    return embed.measure(Labelled(labels), batches)


def test_accuracy_is_that_of_scikit_learns_neighbours() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 4, 120)
    found = (rng.normal(size=(4, 12))[labels] + 2.5 * rng.normal(size=(120, 12))).astype(np.float32)
    truth = {}
    for name, count in (("knn_top1", 10), ("nearest_top1", 1)):
        voters = KNeighborsClassifier(count, metric="cosine", weights=lambda apart: np.exp((1 - apart) / 0.07))
        # Without images, scikit-learn predicts for those that it knows, each from the others.
        truth[name] = float((voters.fit(found.astype(np.float64), labels).predict(None) == labels).mean())
    assert 0.4 < truth["nearest_top1"] < truth["knn_top1"] < 0.95
    assert measured(found, labels) == {**truth, "images": 120}


def test_few_images_are_voters_enough_and_one_is_an_error() -> None:
    found = vectors(4)
    found[1], found[3] = found[0], found[2]
    labels = np.array([5, 5, 2, 2])
    assert measured(found, labels)["nearest_top1"] == 1
    with pytest.raises(DataError, match="1 images could be read, expected at least two"):
        measured(found[:1], labels)
