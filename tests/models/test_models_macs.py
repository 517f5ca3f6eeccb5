"""The MAC counter against arithmetic done by hand and against what the authors state of their models."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from leanvit.models import count_macs, list_models, model_names

ENTRIES = {entry["name"]: entry for entry in list_models()}


def on_meta(name: str, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


def test_linear_convolution_and_both_attention_products_count_and_nothing_else() -> None:
    tokens, width, depth, hidden, patch = 64, 96, 6, 384, 4
    layer = tokens * width * (3 * width + width + 2 * hidden) + 2 * tokens * tokens * width
    by_hand = tokens * width * 3 * patch * patch + depth * layer + width * 10
    assert count_macs(on_meta("revit_micro", num_classes=10), (32, 32)) == by_hand


def test_grouped_convolutions_count_what_they_do() -> None:
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4, device="meta")
    conv.in_chans = 8
    assert count_macs(conv, (10, 6)) == 5 * 3 * 16 * 2 * 9


@pytest.mark.parametrize("fused", [True, False])
def test_fused_attention_counts_as_much_as_written_out(fused: bool) -> None:
    timm.layers.set_fused_attn(fused)
    model = on_meta("vit_tiny_patch16_224")
    timm.layers.set_fused_attn(True)
    by_hand = 196 * 192 * 768 + 12 * (197 * 12 * 192**2 + 2 * 197**2 * 192) + 192_000
    assert count_macs(model, (224, 224)) == by_hand


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_stays(training: bool) -> None:
    model = on_meta("vitaev2_micro").train(training)
    count_macs(model, (32, 32))
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("name", [n for n, e in ENTRIES.items() if e["paper_macs"] is not None])
def test_counts_are_those_of_the_authors(name: str) -> None:
    entry = ENTRIES[name]
    assert entry["params"] == entry["paper_params"]
    assert entry["macs"] == pytest.approx(entry["paper_macs"], rel=1e-3)


def test_listing_names_every_registered_model_and_hands_out_copies() -> None:
    assert list(ENTRIES) == model_names()
    list_models("revit_micro")[0]["params"] = 0
    assert list_models("revit_micro")[0]["params"] == ENTRIES["revit_micro"]["params"] > 0
