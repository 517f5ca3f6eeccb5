"""Whether calibration images are of the kind that a network will see: real sets, and pictures that were changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from leanvit.config import Preprocess
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import FASHION_MNIST_FOLDER, load_split
from leanvit.quant.calibration_images import UNLIKE, unlike

FASHION = pytest.param(
    "fashion-mnist",
    marks=pytest.mark.skipif(
        not Path(FASHION_MNIST_FOLDER).is_dir(), reason="Debian package dataset-fashion-mnist is absent"
    ),
)
PREPROCESS = Preprocess((28, 28), (0.5,) * 3, (0.5,) * 3)


def drawn(data: str, split: str, seed: int = 0, count: int = 128) -> Tensor:
    images = load_split(data, split)
    chosen = images.subset(np.random.default_rng(seed).permutation(len(images))[:count])
    return torch.cat([to_input(pixels, PREPROCESS) for pixels, _ in Loader(chosen, PREPROCESS, 128)])


@pytest.mark.parametrize("data", ["digits", FASHION])
@pytest.mark.parametrize("count", [64, 128])
def test_two_splits_of_a_set_are_alike(data: str, count: int) -> None:
    assert all(not unlike(drawn(data, "train", count=count), drawn(data, "val", seed, count)) for seed in range(3))


@pytest.mark.parametrize("data", [FASHION])
def test_another_set_is_of_another_kind(data: str) -> None:
    found = unlike(drawn(data, "train"), drawn("digits", "val"))
    assert set(found) == {"smoothness"}
    assert found["smoothness"] > UNLIKE


@pytest.mark.parametrize("data", ["digits", FASHION])
@pytest.mark.parametrize(
    ("changed", "features"),
    [
        (lambda x: -x, {"brightness"}),
        (lambda x: 0.4 * (x + 1) - 1, {"brightness", "contrast"}),
        (lambda x: F.avg_pool2d(x, 3, 1, 1), {"smoothness"}),
        (lambda x: x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), {"smoothness"}),
    ],
    ids=["inverted", "dark", "blurred", "noisy"],
)
def test_changed_pictures_are_of_another_kind(data: str, changed: object, features: set[str]) -> None:
    found = unlike(drawn(data, "train"), changed(drawn(data, "val")))
    # Digits are blurred scans already: what changes them shows, though not always in the same feature.
    assert found if data == "digits" else set(found) == features


def test_one_picture_of_one_grey_level_is_compared_as_well() -> None:
    assert unlike(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8)) == {}
    assert "brightness" in unlike(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
