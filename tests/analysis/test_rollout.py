"""Rollout against NumPy, and what it says of models that it does not fit."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import AttentionLayer, attention_layers, attention_rollout, rollout_map
from leanvit.analysis.places import Places
from leanvit.errors import ModelError


def random_layers(depth: int, tokens: int, prefix: int = 0) -> list[AttentionLayer]:
    generator = torch.Generator().manual_seed(0)
    places = Places(torch.arange(-prefix, tokens - prefix).clamp(min=-1)[None], (2, (tokens - prefix) // 2))
    weights = [torch.randn(2, 1, 3, tokens, tokens, generator=generator).softmax(-1) for _ in range(depth)]
    return [AttentionLayer(f"blocks.{i}.attn", w, places, places) for i, w in enumerate(weights)]


def test_rollout_is_the_product_of_half_attention_and_half_identity() -> None:
    layers = random_layers(4, 6)
    for image, found in enumerate(attention_rollout(layers).double().numpy()):
        expected = np.eye(6)
        for layer in layers:
            expected = (0.5 * layer.weights[image, 0].double().numpy().mean(0) + 0.5 * np.eye(6)) @ expected
        assert np.allclose(found, expected, atol=1e-6)
        assert np.allclose(found.sum(-1), 1.0, atol=1e-6)


def test_layers_that_attend_to_themselves_mix_nothing() -> None:
    layers = [AttentionLayer(layer.name, torch.eye(6).expand(2, 1, 3, 6, 6), layer.queries, layer.keys)
              for layer in random_layers(3, 6)]  # fmt: skip
    assert torch.equal(attention_rollout(layers), torch.eye(6).expand(2, 6, 6))


def test_the_map_is_the_row_of_the_class_token_or_the_mean_over_patches() -> None:
    with_class, without = random_layers(2, 7, prefix=1), random_layers(2, 6)
    expected = attention_rollout(with_class)[:, 0, 1:].reshape(2, 2, 3)
    assert torch.equal(rollout_map(with_class), expected)
    assert torch.equal(rollout_map(without), attention_rollout(without).mean(1).reshape(2, 2, 3))


@pytest.mark.parametrize(("name", "size"), [("vit_micro", 28), ("deit_micro", 28), ("revit_micro", 32)])
def test_models_with_global_attention_at_one_resolution_have_a_rollout(name: str, size: int) -> None:
    torch.manual_seed(0)
    layers = attention_layers(timm.create_model(name), torch.randn(1, 3, size, size))
    assert rollout_map(layers).shape == (1, size // 4, size // 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("swin_micro", r"layers\.0\.blocks\.0\.attn has 16 groups of 16 queries and 16 keys"),
        ("exmobilevit_micro", "has 4 groups of 16 queries"),
        ("remvitv2_micro", "queries and .* keys"),
        ("vitae_micro", r"expected 256 queries and keys in each of them; stages\.1\.reduction\.attn has 64 queries"),
    ],
)
def test_models_in_windows_or_of_several_resolutions_say_why_not(name: str, words: str) -> None:
    torch.manual_seed(0)
    layers = attention_layers(timm.create_model(name), torch.randn(1, 3, 32, 32))
    with pytest.raises(ModelError, match=words):
        rollout_map(layers)
