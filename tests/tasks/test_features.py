"""Backbones as feature pyramids: shapes by arithmetic, maps and copied weights against timm's own forward."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from batches import images
from leanvit.errors import ConfigError, UnknownModelError
from leanvit.tasks.features import STRIDES, BackboneConfig, Features, Pyramid, check_strides, load_backbone

ARCHITECTURES = [
    "vitaev2_micro",
    "revit_micro",
    "exmobilevit_micro",
    "reswin_micro",
    "remvitv2_micro",
    "vitae_micro",
    "resnet18",
    "swin_tiny_patch4_window7_224",
    "vit_tiny_patch16_224",
]
# Those whose tables of positions belong to one size of the image.
TABLES = ["revit_micro", "remvitv2_micro", "swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"]


def scramble(model: nn.Module) -> None:
    """Give no weight or statistic the value that it is born with: zeros would stop gradients, ones hide mistakes."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                noise = torch.rand(value.shape, generator=generator)
                value.mul_(0.5 + noise) if "var" in key else value.add_(0.05 * (noise - 0.5))


def classifier(name: str, size: tuple[int, int] | None = None) -> nn.Module:
    """timm's own network, in eval mode."""
    options = {"img_size": size} if size and (name in TABLES or name == "reswin_micro") else {}
    model = timm.create_model(name, num_classes=7, **options).eval()
    scramble(model)
    return model


def own_maps(model: nn.Module, features: Features, x: Tensor) -> list[Tensor]:
    """timm's forward_intermediates of a classifier, at the levels that features_only gives."""
    wanted: Any = features.backbone.feature_info.out_indices  # type: ignore[union-attr]
    forward: Any = model.forward_intermediates
    options = {"output_fmt": "NCHW"} if "output_fmt" in inspect.signature(forward).parameters else {}
    found: list[Tensor] = forward(x, indices=list(wanted), intermediates_only=True, **options)
    return found


@pytest.mark.parametrize("size", [(64, 96), (160, 128)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_maps_have_strides_4_8_16_32(name: str, size: tuple[int, int]) -> None:
    features = Features(BackboneConfig(name, size)).eval()
    with torch.no_grad():
        levels = features(images(2, *size))
        own = features.own(images(2, *size))
    assert len(levels) == len(features.widths) == 4
    for level, width, stride in zip(levels, features.widths, (4, 8, 16, 32), strict=True):
        assert level.shape == (2, width, size[0] // stride, size[1] // stride)
        assert torch.isfinite(level).all()
    stride, width = features.deepest
    assert own[-1].shape == (2, width, size[0] // stride, size[1] // stride)
    check_strides(features)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_the_whole_backbone(name: str) -> None:
    features = Features(BackboneConfig(name, (64, 96)))
    scramble(features)
    features.eval()  # stochastic depth leaves out whole blocks
    levels = features(images(2, 64, 96))
    weights = torch.Generator().manual_seed(3)
    total = sum((level * torch.randn(level.shape, generator=weights)).sum() for level in levels)
    assert isinstance(total, Tensor)
    total.backward()
    without = [
        key
        for key, parameter in features.named_parameters()
        if parameter.requires_grad
        and (parameter.grad is None or not torch.isfinite(parameter.grad).all() or not parameter.grad.any())
    ]
    assert without == []


def test_a_pyramid_has_the_same_channels_at_every_level() -> None:
    pyramid = Pyramid(BackboneConfig("remvitv2_micro", (64, 96), channels=24)).eval()
    levels = pyramid(images(2, 64, 96))
    assert list(levels) == ["0", "1", "2", "3"]
    for level, stride in zip(levels.values(), STRIDES, strict=True):
        assert level.shape == (2, 24, 64 // stride, 96 // stride)


def test_levels_are_the_maps_of_the_stages_and_pooled_below_the_deepest() -> None:
    resnet = Features(BackboneConfig("resnet18", (64, 96))).eval()
    alone = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    alone.load_state_dict(resnet.backbone.state_dict())
    remvit = Features(BackboneConfig("remvitv2_micro", (64, 96))).eval()
    x = images(2, 64, 96)
    with torch.no_grad():
        for found, expected in zip(resnet(x), alone(x), strict=True):
            assert torch.equal(found, expected)
        _, second, third = remvit.own(x)
        expected_levels = [second, third, F.max_pool2d(third, 2, 2), F.max_pool2d(third, 4, 4)]
        for found, expected in zip(remvit(x), expected_levels, strict=True):
            assert torch.equal(found, expected)


def test_a_map_of_another_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    features = Features(BackboneConfig("resnet18", (64, 96)))
    forward = features.forward

    def wrong(x: Tensor) -> list[Tensor]:
        levels = forward(x)
        return [*levels[:2], levels[2][..., :-1], levels[3]]

    check_strides(features)
    monkeypatch.setattr(features, "forward", wrong)
    with pytest.raises(ConfigError, match=r"resnet18 returns a map of \(4, 5\) at stride 16 .* expected \(4, 6\)"):
        check_strides(features)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_loaded_backbone_computes_what_the_classifier_does(name: str) -> None:
    size = (64, 96)
    model = classifier(name, size)
    features = Features(BackboneConfig(name, size)).eval()
    x = images(2, *size)
    with torch.no_grad():
        expected = own_maps(model, features, x)
        assert not torch.allclose(features.own(x)[-1], expected[-1], atol=1e-3)
        assert load_backbone(features, model) == []
        found = features.own(x)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_backbone_of_another_size_computes_what_the_resized_classifier_does(name: str, size: tuple[int, int]) -> None:
    """Where positions belong to a size, timm's set_input_size (its own code for ViT and Swin) says what is right."""
    model = classifier(name)
    features = Features(BackboneConfig(name, size)).eval()
    assert load_backbone(features, model) == []
    resize: Any = getattr(model, "set_input_size", None)
    if name in TABLES:
        resize(img_size=size, **({"window_size": 7} if name.startswith("swin") else {}))
    x = images(2, *size)
    with torch.no_grad():
        for one, other in zip(features.own(x), own_maps(model, features, x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_tensors_that_the_classifier_lacks_are_listed_and_stay_as_they_were() -> None:
    model: Any = classifier("resnet18")
    features = Features(BackboneConfig("resnet18", (64, 64)))
    before = {key: value.clone() for key, value in features.backbone.state_dict().items()}
    model.layer4 = nn.Identity()
    missing = load_backbone(features, model)
    given, after = model.state_dict(), features.backbone.state_dict()
    assert set(missing) == before.keys() - given.keys()
    assert {key.partition(".")[0] for key in missing} == {"layer4"}
    for key, value in after.items():
        assert torch.equal(value, before[key] if key in missing else given[key])


@pytest.mark.parametrize(("name", "other"), [("resnet18", "vit_tiny_patch16_224"), ("revit_micro", "reswin_micro")])
def test_weights_of_another_architecture_are_refused(name: str, other: str) -> None:
    features = Features(BackboneConfig(name, (64, 64)))
    before = {key: value.clone() for key, value in features.backbone.state_dict().items()}
    with pytest.raises(ConfigError, match=rf"tensors of {name}'s features are not in .*Give weights of the same"):
        load_backbone(features, classifier(other))
    for key, value in features.backbone.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_of_another_width_are_missing_and_not_resampled() -> None:
    wider = timm.create_model("vit_tiny_patch16_224", num_classes=7, mlp_ratio=2)
    missing = load_backbone(Features(BackboneConfig("vit_tiny_patch16_224", (64, 64))), wider)
    assert len(missing) == 36  # fc1.weight, fc1.bias, fc2.weight of twelve blocks
    assert all(".mlp.fc" in key for key in missing)


@pytest.mark.parametrize("size", [(64, 100), (100, 64), (0, 64), (16, 32), (-32, 32)])
def test_sizes_that_are_no_multiples_of_32_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"size is .*multiples of 32"):
        BackboneConfig("resnet18", size)


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'revit_micro'"):
        Features(BackboneConfig("revit_mikro", (64, 64)))
