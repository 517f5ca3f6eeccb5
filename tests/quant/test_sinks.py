"""Tokens far above the others are found where LayerNorms read them, and said."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from leanvit.quant import quantize
from leanvit.quant.graph import trace
from leanvit.quant.sinks import SINK_TIMES, find_sinks

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SINK = 7
"""Position of the token that is made large, the class token counted."""


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SIZES).eval()


IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def streams(network: nn.Module) -> list[torch.Tensor]:
    """What the norms read, by hooks on the network itself."""
    found: list[torch.Tensor] = []
    norms = [m for m in network.modules() if isinstance(m, nn.LayerNorm)]
    hooks = [norm.register_forward_pre_hook(lambda _m, args: found.append(args[0])) for norm in norms]
    with torch.no_grad():
        network(IMAGES)
    for hook in hooks:
        hook.remove()
    return found


def test_a_network_without_sinks_has_none(network: nn.Module) -> None:
    found = find_sinks(trace(network, IMAGES[:2]), IMAGES)
    assert found == {"times": SINK_TIMES, "layers": [], "summary": None}


def test_a_large_token_is_found_and_said(network: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    with torch.no_grad():
        network.pos_embed[:, SINK] += 40.0  # along the mean, which LayerNorm takes off: no output changes
    norms = [torch.linalg.vector_norm(x.double(), dim=-1) for x in streams(network)]
    assert all((n.argmax(1) == SINK).all() for n in norms)
    report = quantize(network, IMAGES).report
    rows = report["sinks"]["layers"]
    names = [f"blocks.{block}.norm{number}" for block in (0, 1) for number in (1, 2)]
    assert [row["layer"] for row in rows] == [*names, "norm"]
    for row, n in zip(rows, norms, strict=True):
        assert row["largest"] == pytest.approx(float(n.amax(1).mean()), rel=1e-4)
        assert row["median"] == pytest.approx(float(n.median(1).values.mean()), rel=1e-4)
        assert row["sinks"] == 1.0
    assert report["sinks"]["summary"] in capsys.readouterr().err
    assert "before 5 of the norms" in report["sinks"]["summary"]
