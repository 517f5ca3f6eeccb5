"""Norms of tokens: known ones, and a sink that is put into a network."""

from __future__ import annotations

import pytest
import timm
import torch

import leanvit.models  # noqa: F401 - registers the micro models
from leanvit.analysis import attention_layers, layer_tokens, norm_facts, token_norms


def test_norms_are_those_of_torch() -> None:
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(token_norms(tokens), torch.linalg.vector_norm(tokens.double(), dim=-1))


def test_a_sink_is_far_above_the_median_of_its_own_image() -> None:
    tokens = torch.ones(2, 9, 4)
    tokens[1] *= 10  # all large alike: none is a sink
    tokens[0, 3] *= 5
    tokens[0, 4] *= 2.9
    median, largest, sinks = norm_facts(tokens).T
    assert median.tolist() == [2.0, 20.0]
    assert largest.tolist() == pytest.approx([10.0, 20.0])
    assert sinks.tolist() == [1.0, 0.0]


def test_a_sink_that_is_put_into_a_network_is_found_in_every_layer_behind_it() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_micro", num_classes=10).eval()
    x = torch.randn(2, 3, *model.pretrained_cfg["input_size"][1:])
    layers = attention_layers(model, x)

    def sinks() -> list[list[float]]:
        return [norm_facts(tokens)[:, 2].tolist() for tokens in layer_tokens(model, x, layers).values()]

    assert all(count == [0.0, 0.0] for count in sinks())
    place = torch.tensor([model.num_prefix_tokens + 5])
    model.blocks[2].register_forward_hook(lambda _m, _a, out: out.index_add(1, place, 50 * out[:, :1]))
    found = sinks()
    assert all(count == [0.0, 0.0] for count in found[:2])
    assert all(min(count) >= 1.0 for count in found[3:])
