"""The hard testbed: outliers that leave the function alone break naive quantization and not ours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import MPTQConfig, quantize
from leanvit.checkpoint import preprocess_for
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import FASHION_MNIST_FOLDER, load_split
from outliers import add_outliers

TEST_IMAGES = 1000


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_outliers_leave_the_float_function_alone(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=32, depth=2, num_classes=10).eval()
    x = torch.randn(8, 3, 32, 32)
    wild = copy.deepcopy(model)
    add_outliers(wild, scale=100.0, shift=3.0, head_scale=10.0)
    for precision, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-6)):
        before, after = copy.deepcopy(model).to(precision), copy.deepcopy(model).to(precision)
        add_outliers(after, scale=100.0, shift=3.0, head_scale=10.0)
        with torch.no_grad():
            expected, found = before(x.to(precision)), after(x.to(precision))
        assert float((found - expected).abs().max() / expected.abs().max()) < tolerance
    widths = [norm.weight.detach().abs() for norm in (wild.blocks[0].norm1, wild.norm)]
    assert all(30 < float(w.max() / w.median()) <= 101 for w in widths)


def test_outliers_are_those_of_the_seed() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    first, second, other = (copy.deepcopy(model) for _ in range(3))
    for target, seed in ((first, 1), (second, 1), (other, 2)):
        add_outliers(target, seed=seed)
    assert torch.equal(first.norm.weight, second.norm.weight)
    assert not torch.equal(first.norm.weight, other.norm.weight)


def fashion(split: str, count: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """The first images of a split, normalised, and their labels."""
    preprocess = preprocess_for(model)
    found = load_split("fashion-mnist", split)
    pixels, labels = next(iter(Loader(found.subset(range(count)), preprocess, count)))
    return to_input(pixels, preprocess), torch.as_tensor(labels)


@pytest.mark.skipif(not Path(FASHION_MNIST_FOLDER).is_dir(), reason="Fashion-MNIST is not installed")
def test_outliers_break_min_max_and_not_the_default() -> None:
    model = timm.create_model("vit_micro", pretrained=True).eval()
    x, labels = fashion("val", TEST_IMAGES, model)
    calibration, _ = fashion("train", 32, model)
    add_outliers(model, channels=0.1, scale=100.0, shift=2.0, head_scale=4.0)

    def points(network: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((network(x).argmax(1) == labels).float().mean())

    in_float = points(model)
    naive = quantize(model, calibration, MPTQConfig(smoothing="none", ratio_search=False, range_search=False))
    ours = quantize(model, calibration)
    assert points(naive.module) < in_float - 10
    assert points(ours.module) > in_float - 1
