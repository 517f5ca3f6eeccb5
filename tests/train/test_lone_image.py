"""A step with one image: BatchNorm over pooled features has no variance to divide by."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leanvit.train.lone_image import running_averages


def network() -> nn.Sequential:
    torch.manual_seed(0)
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(pooled, nn.BatchNorm1d(4), nn.Linear(4, 2))
    model(torch.randn(8, 3, 6, 6))  # averages that are not the initial ones
    return model.train()


def test_only_a_layer_that_sees_one_value_uses_its_averages_and_learns_none() -> None:
    model, x = network(), torch.randn(1, 3, 6, 6)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(x)
    maps, pooled = model[0][1], model[1]
    before = maps.running_mean.clone(), pooled.running_mean.clone(), pooled.running_var.clone()
    with running_averages(model, 1):
        found = model(x)
    features = model[0][0](x)
    normal = (features - features.mean((0, 2, 3), keepdim=True)) / (features.var((0, 2, 3), False, True) + 1e-5).sqrt()
    mean = normal.mean((2, 3))
    expected = model[2]((mean - before[1]) / (before[2] + 1e-5).sqrt())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(pooled.running_mean, before[1])
    assert not torch.equal(maps.running_mean, before[0])
    assert all(module.training for module in model.modules())
    assert not pooled._forward_pre_hooks


def test_with_more_images_nothing_is_changed() -> None:
    model, x = network(), torch.randn(2, 3, 6, 6)
    with running_averages(model, 2):
        assert not model[1]._forward_pre_hooks
        model(x)
