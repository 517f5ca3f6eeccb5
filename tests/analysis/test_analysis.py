"""Attention read from a running model, against attention computed by hand and against what models return."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import attention_layers, received_attention
from leanvit.errors import ModelError

LAYERS = {
    "deit_micro": 6,
    "exmobilevit_micro": 6,
    "remvitv2_micro": 5,
    "reswin_micro": 6,
    "revit_micro": 6,
    "swin_micro": 6,
    "vit_micro": 6,
    "vitae_micro": 5,
    "vitaev2_micro": 9,
    "mobilevit_xxs": 9,
}


def build(name: str, **options: Any) -> tuple[Any, Tensor]:
    """A model whose weights are large enough for attention that is far from even, and two images."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "qkv.weight" in key or "kqv.weight" in key:
                parameter.mul_(4.0)
    side = 64 if name == "mobilevit_xxs" else model.pretrained_cfg["input_size"][-1]
    return model, torch.randn(2, 3, side, side)


def heard(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What every module is given and what it gives, by name, while the model runs."""
    given: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            given[name], made[name] = args[0], out

        return hook

    handles = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if n.endswith(("qkv", "kqv", "proj"))]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return given, made


def test_attention_of_a_timm_vit_is_that_of_its_queries_and_keys() -> None:
    model, x = build("vit_micro")
    model, x = model.double(), x.double()
    layers, (_, made) = attention_layers(model, x), heard(model, x)
    for index, layer in enumerate(layers):
        q, k, _ = made[f"blocks.{index}.attn.qkv"].reshape(2, 50, 3, 3, 32).permute(2, 0, 3, 1, 4)
        expected = torch.einsum("bhqd,bhkd->bhqk", q, k).div(32**0.5).softmax(-1)
        assert expected.std() > 0.01
        assert layer.weights.shape == (2, 1, 3, 50, 50)
        assert torch.allclose(layer.weights[:, 0].double(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["revit_micro", "remvitv2_micro"])
def test_carried_logits_are_those_that_the_model_returns(name: str) -> None:
    model, x = build(name)
    with torch.no_grad():
        _, logits = model.forward_features(x, return_attention=True)
    layers = attention_layers(model, x)
    assert len(layers) == len(logits)
    for layer, carried in zip(layers, logits, strict=True):
        assert torch.allclose(layer.weights[:, 0], carried.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"remvitv2_micro"}))
def test_the_weights_of_every_family_times_its_values_are_what_it_projects(name: str) -> None:
    model, x = build(name)
    given, made = heard(model, x)
    for layer in attention_layers(model, x):
        weights = layer.weights.flatten(0, 1)
        packed = made.get(f"{layer.name}.qkv", made.get(f"{layer.name}.kqv"))
        assert packed is not None
        heads, tokens = weights.shape[1], weights.shape[-1]
        v = packed.reshape(-1, tokens, 3, heads, packed.shape[-1] // (3 * heads))[:, :, 2].transpose(1, 2)
        mixed = torch.matmul(weights, v).transpose(1, 2).flatten(2)
        projected = given[f"{layer.name}.proj"].reshape(mixed.shape)
        assert torch.allclose(mixed, projected, atol=1e-5), layer.name


@pytest.mark.parametrize("name", LAYERS)
def test_every_attention_layer_is_there_once_and_its_rows_sum_to_one(name: str) -> None:
    model, x = build(name)
    layers = attention_layers(model, x)
    assert len(layers) == len({layer.name for layer in layers}) == LAYERS[name]
    modules = dict(model.named_modules())
    assert all(hasattr(modules[layer.name], "proj") for layer in layers)
    for layer in layers:
        sums = layer.weights.sum(-1)
        assert sums.max() <= 1 + 1e-5
        # A performer's denominators have an epsilon.
        assert sums.min() >= 1 - 1e-5 or name == "vitae_micro"


@pytest.mark.parametrize("name", LAYERS)
def test_maps_of_received_attention_sum_to_one_or_leave_the_rest_to_class_tokens(name: str) -> None:
    model, x = build(name)
    layers = attention_layers(model, x)
    for layer, maps in zip(layers, received_attention(model, x), strict=True):
        assert maps.shape == (2, *layer.places()[1].grid)
        # By hand: what patches give to patches, over the number of patches that look.
        patches = slice(model.num_prefix_tokens if hasattr(model, "num_prefix_tokens") else 0, None)
        given = layer.weights[..., patches, patches]
        expected = given.sum((1, 3, 4)).mean(1) / (given.shape[1] * given.shape[3])
        assert torch.allclose(maps.sum((1, 2)), expected, atol=1e-5)


def test_received_attention_of_a_global_layer_is_the_mean_over_heads_and_queries() -> None:
    model, x = build("revit_micro")
    layers = attention_layers(model, x)
    for layer, maps in zip(layers, received_attention(model, x), strict=True):
        assert torch.allclose(maps, layer.weights.mean((1, 2, 3)).reshape(2, 8, 8), atol=1e-6)


def test_images_worked_on_in_pieces_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    from leanvit.models import _cells, vitaev2

    model, x = build("vitaev2_micro")
    whole = attention_layers(model, x)
    for module in (_cells, vitaev2):
        monkeypatch.setattr(module, "CACHE_TOKENS", 64)
    for one, other in zip(whole, attention_layers(model, x), strict=True):
        assert one.name == other.name
        assert torch.allclose(one.weights, other.weights, atol=1e-5)


def test_logits_mixed_in_place_and_images_that_would_be_read_in_blocks_give_the_same_maps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from leanvit.models import _attention, revit

    model, x = build("revit_micro")
    expected = [layer.weights for layer in attention_layers(model, x)]
    monkeypatch.setattr(revit, "LINEAR_FROM_BYTES", 0)
    monkeypatch.setattr(_attention, "BLOCK_BYTES", 1)  # 16 queries of one head at a time
    model.set_attention_memory("linear")
    found = [layer.weights for layer in attention_layers(model, x)]
    assert model.attention_memory == "linear"
    model.fuse_()
    fused = [layer.weights for layer in attention_layers(model, x)]
    for one, *others in zip(expected, found, fused, strict=True):
        assert all(torch.allclose(one, other, atol=1e-5) for other in others)


def test_masks_and_causal_attention_are_part_of_the_weights() -> None:
    class Masked(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            self.options = options

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2)[:, None].transpose(2, 3)
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens, **self.options)

    x = torch.randn(2, 3, 2, 3)
    hidden = torch.tensor([True, False, True, True, True, True])
    (layer,) = attention_layers(Masked(attn_mask=hidden.expand(6, 6)), x)
    assert torch.equal(layer.weights[..., 1], torch.zeros(2, 1, 1, 6))
    (layer,) = attention_layers(Masked(is_causal=True, scale=2.0), x)
    assert torch.equal(layer.weights, layer.weights.tril())
    tokens = x.flatten(2).transpose(1, 2)
    last = (2.0 * tokens[:, 5:] @ tokens.transpose(1, 2)).softmax(-1)
    assert torch.allclose(layer.weights[:, 0, 0, 5:], last, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_micro", "revit_micro", "swin_micro", "vitaev2_micro"])
def test_a_model_is_left_as_it_was_and_gives_what_it_gave(name: str) -> None:
    model, x = build(name)
    with torch.no_grad():
        before = model(x)
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, nn.LayerNorm))
    frozen.eval()
    modes = [module.training for module in model.modules()]
    fused = [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")]
    attention_layers(model, x)
    assert [module.training for module in model.modules()] == modes
    assert [module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")] == fused
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), before)


def test_a_model_that_fails_is_left_as_it_was_too() -> None:
    model, _ = build("vit_micro")
    model.train()
    with pytest.raises(AssertionError):
        attention_layers(model, torch.randn(1, 3, 30, 30))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["resnet10t", "mobilevitv2_050"])
def test_a_model_without_attention_is_named(name: str) -> None:
    # MobileViTv2 has a softmax over tokens, but no weights between pairs of them.
    with pytest.raises(ModelError, match="shows no attention, expected softmax"):
        received_attention(timm.create_model(name), torch.randn(1, 3, 64, 64))


def test_windows_whose_layout_is_not_known_are_read_but_not_placed() -> None:
    torch.manual_seed(0)
    model = timm.create_model("maxvit_rmlp_pico_rw_256", img_size=64, num_classes=2)
    layers = attention_layers(model, torch.randn(1, 3, 64, 64))
    assert all(torch.allclose(layer.weights.sum(-1), torch.ones(()), atol=1e-5) for layer in layers)
    windowed = next(layer for layer in layers if layer.weights.shape[1] > 1)
    with pytest.raises(ModelError, match=r"where its tokens stand is not known \(\d+ groups of"):
        windowed.received()
