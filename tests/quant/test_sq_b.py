"""SQ-b leaves the float function alone and evens the channels."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.quant.graph import trace
from leanvit.quant.observe import observe
from leanvit.quant.sq_b import find_groups, smooth


class NormLinear(nn.Module):
    """LayerNorm that feeds two linears, one without bias, behind a window-like reshape."""

    def __init__(self, channels: int, seed: int, spread: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm = nn.LayerNorm(channels)
        self.norm.weight.data = torch.exp(spread * torch.randn(channels))
        self.norm.bias.data = torch.exp(spread * torch.randn(channels)) * torch.randn(channels)
        self.a, self.b = nn.Linear(channels, 5), nn.Linear(channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(2).transpose(1, 2))
        y = y.reshape(y.shape[0], 2, -1, y.shape[-1]).permute(0, 2, 1, 3)
        return torch.cat([self.a(y), self.b(y)], -1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@settings(deadline=None, max_examples=20)
@given(st.integers(2, 24), st.integers(0, 1000), st.floats(0, 2), st.sampled_from(["sq", "sq-b"]), st.floats(0, 1))
def test_smoothing_leaves_float_output_unchanged(
    channels: int, seed: int, spread: float, kind: str, alpha: float
) -> None:
    model = NormLinear(channels, seed, spread)
    x = torch.randn(4, channels, 4, 2)
    graph = trace(model, x)
    groups, left_out = find_groups(graph)
    assert (len(groups), left_out) == (1, [])
    statistics = observe(graph, {groups[0].norm}, [x], "test")
    smooth(graph, statistics, kind, alpha)
    with torch.no_grad():
        expected = model.double()(x.double())
        assert relative_error(graph.module(x).double(), expected) < 1e-4


@pytest.mark.parametrize(
    ("name", "kwargs", "side", "norms"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, 64, 7),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)},
            56,
            9,
        ),
        ("revit_micro", {}, 32, 12),
    ],
)
def test_sqb_leaves_whole_networks_unchanged(name: str, kwargs: dict, side: int, norms: int) -> None:
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.data.mul_(torch.exp(torch.randn_like(module.weight)))
            module.bias.data.add_(torch.randn_like(module.bias))
    x = torch.randn(4, 3, side, side)
    graph = trace(model, x)
    groups, _ = find_groups(graph)
    assert len(groups) == norms
    statistics = observe(graph, {group.norm for group in groups}, [x], "test")
    smooth(graph, statistics, "sq-b")
    with torch.no_grad():
        assert relative_error(graph.module(x), model(x)) < 1e-4


def test_sqb_centres_channels_and_evens_their_ranges() -> None:
    model = NormLinear(16, 3, 1.5)
    x = torch.randn(64, 16, 4, 2)
    graph = trace(model, x)
    (group,), _ = find_groups(graph)
    before = observe(graph, {group.norm}, [x], "test")[group.norm]
    smooth(graph, {group.norm: before}, "sq-b", alpha=1.0)
    after = observe(graph, {group.norm}, [x], "test")[group.norm]
    # With all weight on the activations every channel reaches from -1 to 1.
    assert torch.allclose(after.channel_maximum, torch.ones(16), atol=1e-3)
    assert torch.allclose(after.channel_minimum, -torch.ones(16), atol=1e-3)


def test_a_norm_that_a_residual_reads_is_left_out_and_named() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x.flatten(2))
            return y + self.linear(y)

    graph = trace(Residual(), torch.randn(2, 3, 2, 4))
    groups, left_out = find_groups(graph)
    assert groups == []
    assert len(left_out) == 1
    assert "norm" in left_out[0]
    assert "add" in left_out[0]


def test_a_shared_linear_is_left_out() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.linear = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2)
            return self.linear(self.one(x)) + self.linear(self.two(x))

    groups, left_out = find_groups(trace(Shared(), torch.randn(2, 3, 2, 4)))
    assert groups == []
    assert all("shared" in line for line in left_out)


def test_a_dead_channel_keeps_its_scale() -> None:
    model = NormLinear(8, 0, 0.5)
    model.norm.weight.data[3] = 0.0
    x = torch.randn(8, 8, 4, 2)
    graph = trace(model, x)
    (group,), _ = find_groups(graph)
    smooth(graph, observe(graph, {group.norm}, [x], "test"), "sq-b")
    with torch.no_grad():
        assert graph.module(x).isfinite().all()
        assert relative_error(graph.module(x), model(x)) < 1e-4
