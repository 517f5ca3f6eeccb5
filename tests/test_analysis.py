"""Attention maps against a computation by hand."""

from __future__ import annotations

import pytest
import timm
import torch

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import received_attention
from leanvit.errors import ModelError


def test_maps_are_the_attention_that_patches_receive() -> None:
    torch.manual_seed(0)
    model = timm.create_model("revit_micro", num_classes=10).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = received_attention(model, x)
    assert len(maps) == len(model.blocks)
    for layer in maps:
        assert layer.shape == (2, 8, 8)
        assert torch.allclose(layer.sum((1, 2)), torch.ones(2), atol=1e-5)
    # First layer by hand: softmax(q k^T / sqrt(d)), mean over heads and queries.
    block = model.blocks[0]
    tokens = model.patch_embed(x) + model.pos_embed
    heads = block.attn.num_heads
    q, k, _ = block.attn.qkv(block.norm1(tokens)).chunk(3, dim=-1)
    q, k = (t.reshape(2, 64, heads, -1).transpose(1, 2) for t in (q, k))
    expected = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1).mean((1, 2)).reshape(2, 8, 8)
    assert torch.allclose(maps[0], expected, atol=1e-6)


def test_a_model_without_attention_output_is_named() -> None:
    with pytest.raises(ModelError, match="ResNet shows no attention"):
        received_attention(timm.create_model("resnet10t"), torch.randn(1, 3, 64, 64))
