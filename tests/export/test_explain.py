"""What runs on integer kernels is counted by hand; the site that was broken on purpose is the one that costs most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from leanvit.config import MPTQConfig
from leanvit.export.explain import explain, integer_share, site_costs
from leanvit.export.explained import cost_lines, integer_lines
from leanvit.export.onnx.profiles import find
from leanvit.quant import QuantizedModel, quantize
from leanvit.quant.costs import site_key
from leanvit.quant.quantizers import ActivationQuantizer
from leanvit.tasks.parts import WHOLE
from small_vit import small_vit

TOKENS, WIDTH = 17, 32
MACS = {
    "patch_embed.proj": 16 * 3 * 8 * 8 * WIDTH,
    "blocks.0.attn.qkv": TOKENS * WIDTH * 3 * WIDTH,
    "blocks.0.attn.qk": TOKENS * TOKENS * WIDTH,
    "blocks.0.attn.av": TOKENS * TOKENS * WIDTH,
    "blocks.0.attn.proj": TOKENS * WIDTH * WIDTH,
    "blocks.0.mlp.fc1": TOKENS * WIDTH * 4 * WIDTH,
    "blocks.0.mlp.fc2": TOKENS * 4 * WIDTH * WIDTH,
    "head": WIDTH * 3,
}
"""By hand; attention has two heads of 16 channels, 32 in all."""


def images(count: int = 16) -> torch.Tensor:
    coarse = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return small_vit()


@pytest.fixture(scope="module")
def quantized(network: nn.Module) -> QuantizedModel:
    return quantize(network, images(), MPTQConfig(ignored_scope=("head",)))


def in_float(found: dict[str, Any]) -> dict[str, str]:
    """{site: reason}"""
    return {site: entry["reason"] for entry in found["float"] for site in entry["sites"]}


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        ("w8a8", {"blocks.0.attn.qk": "attention", "blocks.0.attn.av": "attention", "head": "by the plan"}),
        ("exact", {"head": "by the plan"}),
        ("w4a16", {**dict.fromkeys(MACS, "multiplies in float"), "blocks.0.attn.qk": "attention",
                   "blocks.0.attn.av": "attention", "head": "by the plan"}),
    ],
)  # fmt: skip
def test_what_a_profile_runs_in_float_is_named_with_the_reason(
    profile: str, words: dict[str, str], quantized: QuantizedModel
) -> None:
    found = integer_share(quantized, find(profile))
    assert found["macs"] == sum(MACS.values())
    assert found["integer_macs"] == sum(macs for site, macs in MACS.items() if site not in words)
    reasons = in_float(found)
    assert set(reasons) == set(words)
    for site, word in words.items():
        assert word in reasons[site], site
    assert [entry["macs"] for entry in found["float"]] == sorted((e["macs"] for e in found["float"]), reverse=True)


def test_a_lifted_site_is_named_as_lifted(quantized: QuantizedModel) -> None:
    found = integer_share(quantized, find("w8a8"), ["blocks.0.mlp.fc1"])
    assert in_float(found)["blocks.0.mlp.fc1"] == "lifted to float to hold the accuracy"
    outside = ("blocks.0.attn.qk", "blocks.0.attn.av", "blocks.0.mlp.fc1", "head")
    assert found["integer_macs"] == sum(macs for site, macs in MACS.items() if site not in outside)


def test_convolutions_that_integers_would_not_make_faster_are_named() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    ).eval()  # fmt: skip
    found = integer_share(quantize(network, images()), find("w8a8"))
    assert found["integer_macs"] == 8 * 3
    assert [entry["macs"] for entry in found["float"]] == [30 * 30 * 27 * 8 + 28 * 28 * 9 * 8]
    assert "would not make faster" in found["float"][0]["reason"]


@pytest.mark.parametrize("broken", ["blocks.0.attn.proj", "blocks.0.mlp.fc2"])
def test_a_broken_site_costs_most_and_its_price_is_that_of_the_table(broken: str, network: nn.Module) -> None:
    quantized = quantize(network, images())
    graph = quantized.graph
    source = next(iter(graph.node(graph.sites[broken].node).all_input_nodes))
    quantizer = graph.module.get_submodule(str(source.target))
    assert isinstance(quantizer, ActivationQuantizer)
    quantizer.scale *= 40.0  # three values are left of 256
    table = {site_key(graph.sites[broken]): {"float_ms": 0.5, "int8_ms": 0.2}}
    costs = site_costs(quantized, network, {WHOLE: images()}, find("w8a8"), table=table)
    assert costs[0]["site"] == broken
    assert costs[0]["share"] > 0.8
    assert costs[0]["lifting_ms"] == pytest.approx(0.3)
    assert costs[0]["macs"] == pytest.approx(MACS[broken] / sum(MACS.values()))
    assert all(entry["lifting_ms"] is None for entry in costs[1:] if entry["macs"] != costs[0]["macs"])
    assert cost_lines(costs)[0].startswith(f"sites that cost most of the quantized network's error: {broken} ")


def test_explain_says_both_in_words(network: nn.Module, quantized: QuantizedModel) -> None:
    found = explain(quantized, network, images(), find("w8a8"))
    assert {entry["site"] for entry in found["costs"]} == set(MACS) - {"blocks.0.attn.qk", "blocks.0.attn.av", "head"}
    assert (
        integer_lines(found)[0]
        == f"{found['integer_macs'] / found['macs']:.0%} of the multiply-adds run on integer kernels"
    )
    assert any("attention" in line and "blocks.0.attn.qk" in line for line in integer_lines(found))
