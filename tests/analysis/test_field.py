"""The effective receptive field of convolutions whose field is known."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import area_share, effective_field
from leanvit.errors import ModelError


def conv(weight: torch.Tensor, **options: int) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], bias=False, **options)
    layer.weight = nn.Parameter(weight)
    return layer


def test_the_field_of_one_convolution_is_its_weight_around_the_middle() -> None:
    weight = torch.randn(1, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    layer = conv(weight, padding=1)
    field = effective_field(layer, torch.randn(2, 3, 9, 11), features=layer)
    expected = np.zeros((9, 11))
    expected[3:6, 4:7] = weight[0].abs().mean(0).numpy()
    assert field.shape == (2, 9, 11)
    assert np.allclose(field.numpy(), expected, atol=1e-6)


def test_the_field_of_stacked_convolutions_is_the_convolution_of_their_kernels() -> None:
    one, two = torch.rand(1, 1, 3, 3), torch.rand(1, 1, 3, 3)
    stack = nn.Sequential(conv(one, padding=1), conv(two, padding=1))
    field = effective_field(stack, torch.randn(1, 1, 11, 11), features=stack)[0].numpy()
    full = np.zeros((5, 5))
    for y in range(3):
        for x in range(3):
            full[y : y + 3, x : x + 3] += two[0, 0, y, x].item() * one[0, 0].numpy()
    expected = np.zeros((11, 11))
    expected[3:8, 3:8] = full
    assert np.allclose(field, expected, atol=1e-6)


def test_channels_that_cancel_in_a_sum_are_seen() -> None:
    weight = torch.zeros(2, 1, 1, 1)
    weight[0], weight[1] = 1.0, -1.0
    layer = conv(weight)
    fields = [effective_field(layer, torch.zeros(8, 1, 3, 3), features=layer, seed=s) for s in (0, 0, 1)]
    assert torch.equal(fields[0], fields[1])
    assert fields[0][:, 1, 1].max() == 2.0
    assert fields[0].sum() == fields[0][:, 1, 1].sum()


@pytest.mark.parametrize("name", ["vit_micro", "swin_micro", "vitaev2_micro", "exmobilevit_micro"])
def test_a_model_is_left_without_gradients_and_in_its_mode(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).train()
    side = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, side, side)
    field = effective_field(model, x)
    assert field.shape == (2, side, side)
    assert field.amax() > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    # Images don't mix: batch norm is in eval mode.
    assert not x.requires_grad
    model.eval()
    assert torch.allclose(effective_field(model, x), field)


def test_a_field_in_windows_ends_where_the_window_does() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_micro", num_classes=0).eval()
    stage = nn.Sequential(model.patch_embed, model.layers[0].blocks[0])
    field = effective_field(
        stage, torch.randn(1, 3, 32, 32), features=lambda x: stage(x).permute(0, 3, 1, 2)
    )[0]  # fmt: skip
    # Middle token (8, 8) of 16 x 16: its window of 4 x 4 tokens of 2 px starts there.
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[16:24, 16:24] = True
    assert (field[inside] > 0).all()
    assert (field[~inside] == 0).all()


def test_areas_count_the_fewest_pixels() -> None:
    field = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    assert area_share(field, 0.4) == 0.25
    assert area_share(field, 0.5) == 0.5
    assert area_share(field, 0.7) == 0.5
    assert area_share(field, 0.95) == 1.0
    assert area_share(torch.full((10, 10), 0.1), 0.5) == 0.5
    assert area_share(torch.full((10, 10), 0.1), 1.0) == 1.0


def test_what_does_not_depend_on_the_image_is_an_error() -> None:
    with pytest.raises(ModelError, match="no gradient"):
        area_share(torch.zeros(3, 3), 0.5)
    with pytest.raises(ModelError, match="does not depend on the image"):
        effective_field(nn.Identity(), torch.ones(1, 3, 4, 4), features=lambda x: torch.ones(1, 1, 2, 2))
    with pytest.raises(ModelError, match="Conv2d returns no intermediate maps"):
        effective_field(nn.Conv2d(3, 1, 1), torch.ones(1, 3, 4, 4))
