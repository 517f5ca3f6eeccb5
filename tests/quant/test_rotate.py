"""A residual stream that is turned: the float function stays, what few channels carry is spread, reasons are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.config import MPTQConfig
from leanvit.quant import quantize
from leanvit.quant.graph import QuantGraph, trace
from leanvit.quant.mptq import prepare
from leanvit.quant.rotate import mean_keeping_rotation, turn_stream
from leanvit.quant.sq_b import add_missing_biases, readers_noise
from leanvit.quant.streams import CHECK, find_streams


def uneven(name: str, **kwargs: Any) -> nn.Module:
    """A random network whose gains, biases and scales are far from what they begin with."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
        else:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3)
    return model


def in_float64(graph: QuantGraph) -> QuantGraph:
    """The same graph in float64, without the checks that ask for float32."""
    graph = copy.deepcopy(graph)
    for node in list(graph.module.graph.nodes):
        if node.target is CHECK:
            graph.module.graph.erase_node(node)
    graph.module.recompile()
    graph.module.double()
    add_missing_biases(graph)
    return graph


def logits(graph: QuantGraph, x: Tensor) -> Tensor:
    with torch.no_grad():
        value = graph.module(x)
    return torch.stack(list(value)).mean(0) if isinstance(value, tuple | list) else value


SMALL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
SWIN = {"img_size": 32, "window_size": 4, "depths": (1, 2, 1), "embed_dim": 24, "num_heads": (2, 4, 4), "patch_size": 2}
# Channels of the streams that turn: plain, distilled, LayerScale behind and before what it scales, registers, an
# average of all tokens, class attention on two joined streams, residual attention, merged patches.
MODELS = [
    ("vit_tiny_patch16_224", SMALL, [48]),
    ("deit_tiny_distilled_patch16_224", SMALL, [48]),
    ("deit3_small_patch16_224", SMALL, [48]),
    ("beit_base_patch16_224", SMALL, [48]),
    ("vit_small_patch14_reg4_dinov2", {**SMALL, "global_pool": "avg"}, [48]),
    ("cait_xxs24_224", {**SMALL, "depth": 2}, [48]),
    ("revit_micro", {}, [96]),
    ("swin_tiny_patch4_window7_224", SWIN, [48, 96]),
    ("reswin_micro", {}, [64, 128]),
]


@pytest.mark.parametrize(("name", "kwargs", "channels"), MODELS, ids=[m[0] for m in MODELS])
def test_the_float_function_stays_to_a_billionth(name: str, kwargs: dict[str, Any], channels: list[int]) -> None:
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    graph = in_float64(trace(uneven(name, **kwargs), x[:2].float()))
    before = logits(graph, x)
    weights = {key: value.clone() for key, value in graph.module.state_dict().items()}
    streams, _ = find_streams(graph, x[:2])
    assert [stream.channels for stream in streams] == channels
    for number, stream in enumerate(streams):
        turn_stream(graph, stream, mean_keeping_rotation(stream.channels, number))
    assert (logits(graph, x) - before).abs().max() < 1e-9 * before.abs().max()
    moved = [key for key, value in graph.module.state_dict().items() if not torch.equal(value, weights[key])]
    assert len(moved) > 0.5 * len(weights)


@pytest.mark.parametrize("channels", [1, 2, 3, 16, 48, 64, 96, 192, 384])
def test_the_matrix_is_orthogonal_and_keeps_the_mean(channels: int) -> None:
    turn = mean_keeping_rotation(channels, seed=1)
    eye = torch.eye(channels, dtype=torch.float64)
    assert (turn @ turn.t() - eye).abs().max() < 1e-12
    assert (turn.sum(0) - 1).abs().max() < 1e-12
    assert (turn.sum(1) - 1).abs().max() < 1e-12


@pytest.mark.parametrize("channels", [4, 16, 64, 256])
def test_powers_of_four_have_entries_of_one_size(channels: int) -> None:
    turn = mean_keeping_rotation(channels, seed=0)
    assert torch.allclose(turn.abs(), torch.full_like(turn, channels**-0.5))


def test_one_channel_of_many_is_spread_over_all() -> None:
    x = torch.randn(1000, 192, dtype=torch.float64)
    x[:, 7] *= 50
    turned = x @ mean_keeping_rotation(192, seed=0)
    peak = turned.square().mean(0).max() / turned.square().mean()
    # Nothing but the random part of order 3 can leave more than the mean in a channel: three times at most.
    assert peak < 3.1 < 100 < x.square().mean(0).max() / x.square().mean()


def test_streams_that_cannot_turn_are_told_with_the_reason() -> None:
    def reasons(model: nn.Module, size: int = 32) -> list[str]:
        x = torch.randn(2, 3, size, size)
        streams, left_out = find_streams(trace(model.eval(), x), x)
        assert not streams
        return left_out

    # An embedding is read as it stands; a convolution behind a norm pads without its bias; a shared weight serves two.
    assert "output" in reasons(timm.create_model("vit_tiny_patch16_224", **{**SMALL, "num_classes": 0}))[0]
    assert all("reads its norm" in line for line in reasons(timm.create_model("mobilevit_xxs", num_classes=5), 64))
    shared = timm.create_model("vit_tiny_patch16_224", **SMALL, num_classes=48)
    shared.blocks[0].attn.proj.weight = shared.head.weight
    assert "read by something else" in reasons(shared)[0]


def test_noise_behind_norms_falls_with_bits_as_that_of_a_normal_variable() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    traced = trace(uneven("vit_tiny_patch16_224", **SMALL), x[:2])
    noise = [
        readers_noise(prepare(traced, [x], MPTQConfig(weight_bits=bits, activation_bits=bits))) for bits in (3, 5, 7)
    ]
    # Even steps, ends clipped where that is best: 14.27, 24.57 and 35.17 dB at 3, 5 and 7 bits (Max, 1960; Hui, 2001).
    assert noise[0] - noise[1] == pytest.approx(10.3, abs=2.0)
    assert noise[1] - noise[2] == pytest.approx(10.6, abs=2.0)


def test_what_has_less_noise_is_taken_and_told() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 32, 32)
    config = MPTQConfig(weight_bits=5, activation_bits=5, passes=("rotate", "correct"))
    found = quantize(uneven("vit_tiny_patch16_224", **SMALL), x, config).report
    rotation = found["rotation"]
    turned = [{"channels": 48, "writers": 5, "readers": 5}]
    assert rotation["taken"] == (rotation["noise_db"]["rotated"] < rotation["noise_db"]["as it is"])
    assert found.get("rotated") == (turned if rotation["taken"] else None)
    assert ("rotate" in found["passes"]) == rotation["taken"]


def test_a_network_without_such_a_stream_is_quantized_as_it_is() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mobilevit_xxs", num_classes=5).eval()
    found = quantize(model, torch.randn(4, 3, 64, 64), MPTQConfig(passes=("rotate",))).report
    assert found["rotation"]["taken"] is False
    assert len(found["rotation"]["left_out"]) == 3
