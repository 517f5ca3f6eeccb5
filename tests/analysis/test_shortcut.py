"""The ablation of the shortcut against a classifier whose weights are zero by hand."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import leanvit.models
from leanvit.analysis import shortcut_ablation
from leanvit.errors import DataError, ModelError

CHANNELS = ((0, 32), (32, 80), (80, 208))


def case() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """A model whose answers depend on every scale, and its own answers as labels."""
    torch.manual_seed(0)
    model = timm.create_model("exmobilevit_micro", num_classes=10).eval()
    with torch.no_grad():
        model.fc.weight.normal_()
    x = torch.randn(24, 3, 32, 32)
    with torch.no_grad():
        labels = model(x).argmax(1)
    return model, x, labels


def test_a_scale_left_out_is_a_classifier_without_its_weights() -> None:
    model, x, labels = case()
    found = shortcut_ablation(model, [(x[:10], labels[:10]), (x[10:], labels[10:])])
    assert found["images"] == 24
    strides = found["strides"]
    assert [row["without"] for row in found["rows"]] == [[], *([s] for s in strides), strides[:2]]
    slices = dict(zip(strides, CHANNELS, strict=True))
    for row in found["rows"]:
        without = copy.deepcopy(model)
        with torch.no_grad():
            for stride in row["without"]:
                without.fc.weight[:, slice(*slices[stride])] = 0.0
            correct = int((without(x).argmax(1) == labels).sum())
        assert row["correct"] == correct
        assert row["top1"] == pytest.approx(100 * correct / 24)
        assert row["channels"] == sum(slices[s][1] - slices[s][0] for s in row["without"])
    assert found["rows"][0]["correct"] == 24
    assert len({row["correct"] for row in found["rows"]}) > 1


def test_a_scale_left_out_is_a_shortcut_that_gives_zeros() -> None:
    model, x, labels = case()
    rows = shortcut_ablation(model, [(x, labels)])["rows"]
    for index in range(3):
        model.shortcut.convs[index].register_forward_hook(lambda m, a, out: torch.zeros_like(out))
        with torch.no_grad():
            assert rows[1 + index]["correct"] == int((model(x).argmax(1) == labels).sum())
        model.shortcut.convs[index]._forward_hooks.clear()


def test_strides_are_those_of_the_maps() -> None:
    model, x, labels = case()
    maps = model.forward_intermediates(x[:1], intermediates_only=True, indices=3)
    strides = shortcut_ablation(model, [(x, labels)])["strides"]
    assert strides == [32 // m.shape[-1] for m in maps]


def test_a_timm_model_with_a_shortcut_of_ours_is_taken() -> None:
    torch.manual_seed(0)
    model = leanvit.models.add_exshortcut(timm.create_model("resnet10t", num_classes=4), (8, 16))
    found = shortcut_ablation(model, [(torch.randn(3, 3, 64, 64), torch.zeros(3, dtype=torch.int64))])
    assert found["strides"] == [16, 32]
    assert [row["without"] for row in found["rows"]] == [[], [16], [32]]


@pytest.mark.parametrize("name", ["vit_micro", "mobilevit_s_exbase"])
def test_a_model_without_several_scales_is_an_error(name: str) -> None:
    with pytest.raises(ModelError, match="has no ExShortcut over several scales"):
        shortcut_ablation(timm.create_model(name), [])


def test_no_images_are_an_error() -> None:
    with pytest.raises(DataError, match="no images to measure the shortcut on"):
        shortcut_ablation(case()[0], [])
