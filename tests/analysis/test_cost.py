"""Cost against counts by hand."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

import leanvit.models
from leanvit.analysis import cost_at
from leanvit.errors import ModelError


def test_multiply_adds_and_activations_of_linears_are_those_on_paper() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 1000), nn.ReLU(), nn.Linear(1000, 10))
    (row,) = cost_at(model, [4])
    assert row["macs"] == 48 * 1000 + 1000 * 10
    # The hidden layer before and after its ReLU; the image is the caller's.
    assert row["activation_bytes"] == 4 * (1000 + 1000)
    assert row["latency_ms"] is None


def test_a_skip_keeps_its_tensor_alive() -> None:
    class Skip(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x + 1.0
            return y + (y * 2.0 + 1.0)

    (row,) = cost_at(Skip(), [8])
    # y, 2 y and 2 y + 1 at once; then 2 y is gone and the sum takes its place.
    assert row["activation_bytes"] == 3 * 4 * 3 * 64


def test_fused_attention_holds_no_weights_and_carried_logits_do() -> None:
    vit, revit = (cost_at(timm.create_model(n), [64, 128]) for n in ("vit_micro", "revit_micro"))
    growth = [rows[1]["activation_bytes"] / rows[0]["activation_bytes"] for rows in (vit, revit)]
    assert 3.5 < growth[0] < 4.5  # with the tokens
    assert 12 < growth[1] < 16.5  # with their square
    heads, tokens = 3, 1024
    assert revit[1]["activation_bytes"] >= 4 * heads * tokens**2


def test_logits_that_are_computed_in_blocks_are_not_held() -> None:
    model = timm.create_model("revit_micro")
    (whole,) = cost_at(model, [128])
    model.set_attention_memory("linear")
    (blocks,) = cost_at(model, [128])
    assert blocks["activation_bytes"] != whole["activation_bytes"]
    assert blocks["macs"] > whole["macs"]


@pytest.mark.parametrize("name", ["vit_micro", "swin_micro", "vitaev2_micro"])
def test_the_model_s_own_size_costs_what_the_table_of_models_says(name: str) -> None:
    (entry,) = leanvit.models.list_models(name)
    (row,) = cost_at(timm.create_model(name), [entry["input_size"][0]])
    assert row["macs"] / 1e9 == pytest.approx(entry["macs"])


def test_windows_keep_their_size_as_images_grow() -> None:
    model = timm.create_model("swin_micro")
    rows = cost_at(model, [32, 64, 128])
    assert rows[1]["macs"] == pytest.approx(4 * rows[0]["macs"], rel=1e-3)
    assert rows[2]["macs"] == pytest.approx(16 * rows[0]["macs"], rel=1e-3)


def test_the_model_itself_is_not_changed() -> None:
    model = timm.create_model("vit_micro").train()
    cost_at(model, [56])
    assert model.patch_embed.img_size == (28, 28)
    assert all(module.training for module in model.modules())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_size_that_does_not_fit_is_a_row_that_says_so_and_only_such_sizes_an_error() -> None:
    model = timm.create_model("revit_micro")
    good, bad = cost_at(model, [32, 33])
    assert "error" not in good
    assert bad["side"] == 33
    assert "ReViT can't take 33 x 33 pixels (image is 33 x 33, expected multiples" in bad["error"]
    with pytest.raises(ModelError, match="can't take 33 x 33 pixels"):
        cost_at(model, [33, 35])


def test_a_model_of_one_size_is_named_with_its_reason() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            if x.shape[-1] != 28:
                raise ValueError(f"{x.shape[-1]} pixels, made for 28")
            return x * 2.0

    with pytest.raises(ModelError, match=r"Fixed can't take 30 x 30 pixels \(30 pixels, made for 28\)"):
        cost_at(Fixed(), [30])


def test_time_is_measured_only_where_it_is_asked_for() -> None:
    seen: list[None] = []
    rows = cost_at(timm.create_model("vit_micro"), [28], measure=True, tick=lambda: seen.append(None))
    assert rows[0]["latency_ms"] > 0
    assert rows[0]["latency_iqr_ms"] >= 0
    assert len(seen) == 1
