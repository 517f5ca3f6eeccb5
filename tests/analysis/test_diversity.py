"""Token diversity on tokens that are known, against scikit-learn, and on the tokens that models themselves return."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import attention_layers, layer_tokens, rank_one_residual, token_diversity
from leanvit.errors import ModelError


def test_equal_tokens_have_no_diversity() -> None:
    tokens = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0)).expand(-1, 7, -1)
    assert torch.allclose(token_diversity(tokens), torch.zeros(2).double(), atol=1e-7)
    assert torch.allclose(rank_one_residual(tokens), torch.zeros(2).double(), atol=1e-7)


def test_orthogonal_tokens_have_all_of_it() -> None:
    tokens = 3.0 * torch.eye(8)[None, :6]
    assert token_diversity(tokens).item() == pytest.approx(1.0)
    assert rank_one_residual(tokens).item() == pytest.approx((1 - 1 / 6) ** 0.5)


def test_opposite_tokens_have_the_most() -> None:
    tokens = torch.tensor([[[1.0, 2.0], [-1.0, -2.0]]])
    assert token_diversity(tokens).item() == pytest.approx(2.0)
    assert rank_one_residual(tokens).item() == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_both_measures_are_those_of_plain_numpy(count: int, width: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(0.5, 1.0, (count, width))
    tokens = torch.from_numpy(x)[None]
    pairs = cosine_similarity(x)[~np.eye(count, dtype=bool)]
    assert token_diversity(tokens).item() == pytest.approx(1 - pairs.mean(), abs=1e-9)
    residual = np.linalg.norm(x - np.ones((count, 1)) * x.mean(0)) / np.linalg.norm(x)
    assert rank_one_residual(tokens).item() == pytest.approx(residual, abs=1e-9)


@pytest.mark.parametrize("measure", [token_diversity, rank_one_residual])
def test_zeros_are_no_nan_and_one_token_is_an_error(measure: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert torch.isfinite(measure(torch.zeros(1, 4, 3))).all()
    with pytest.raises(ModelError, match="1 token, expected at least two"):
        measure(torch.ones(1, 1, 3))


@pytest.mark.parametrize("name", ["vit_micro", "deit_micro", "revit_micro", "vitae_base"])
def test_tokens_of_plain_models_are_their_intermediates_without_class_tokens(name: str) -> None:
    torch.manual_seed(0)
    options = {"depths": (2,), "token_dims": (64,), "num_heads": (2,), "groups": (16,)} if name == "vitae_base" else {}
    model = timm.create_model(name, num_classes=10, **options).eval()
    side = {"revit_micro": 32, "vitae_base": 64}.get(name, 28)
    x = torch.randn(2, 3, side, side)
    tokens = layer_tokens(model, x, attention_layers(model, x))
    with torch.no_grad():
        expected = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    assert len(tokens) == len(expected)
    for found, wanted in zip(tokens.values(), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["swin_micro", "reswin_micro", "vitaev2_micro", "vitae_micro", "remvitv2_micro"])
def test_tokens_of_the_last_blocks_of_stages_are_the_maps_of_the_model(name: str) -> None:
    """Their order may be that of windows, which no measure sees."""
    torch.manual_seed(0)
    size = (32, 32) if name == "swin_micro" else (36, 44)
    model = timm.create_model(name, num_classes=10).eval()
    x = torch.randn(2, 3, *size)
    tokens = list(layer_tokens(model, x, attention_layers(model, x)).values())
    with torch.no_grad():
        maps = model.forward_intermediates(x, intermediates_only=True)
    assert torch.allclose(sums(tokens[-1]), sums(maps[-1].flatten(2).transpose(1, 2)), atol=1e-4)
    assert {found.shape[1:] for found in tokens} >= {(m.shape[2] * m.shape[3], m.shape[1]) for m in maps[-1:]}


def sums(tokens: torch.Tensor) -> torch.Tensor:
    """What does not depend on the order of tokens."""
    return torch.cat([tokens.sum(1), tokens.square().sum(1)], dim=-1)


def test_tokens_of_mobilevit_are_all_positions_of_the_map() -> None:
    torch.manual_seed(0)
    model = timm.create_model("exmobilevit_micro", num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    tokens = layer_tokens(model, x, attention_layers(model, x))
    assert [tuple(t.shape) for t in tokens.values()] == [(2, 64, 48)] * 2 + [(2, 16, 64)] * 2 + [(2, 4, 80)] * 2
    # An image alone has the tokens that it has in a batch.
    alone = layer_tokens(model, x[1:], attention_layers(model, x[1:]))
    for name, found in tokens.items():
        assert torch.allclose(found[1:], alone[name], atol=1e-5)


def test_padding_is_no_token() -> None:
    torch.manual_seed(0)
    model = timm.create_model("reswin_micro", num_classes=10).eval()
    x = torch.randn(1, 3, 36, 44)
    tokens = layer_tokens(model, x, attention_layers(model, x))
    assert tokens["layers.0.blocks.0"].shape[1] == 18 * 22
