"""Balanced heads: the float function stays, q and k come to the same second moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.quant.graph import QuantGraph, site_inputs, trace
from leanvit.quant.heads import balance_heads, balancing, rotation
from leanvit.quant.interpret import observe_nodes
from leanvit.quant.sq_b import add_missing_biases


def strengthened(name: str, **kwargs: Any) -> nn.Module:
    """A random network whose attention is far from even, with biases, so that a wrong sign anywhere shows."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.5)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0, std=0.3)
            nn.init.normal_(module.bias, std=0.3)
    return model


def logits(function: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    with torch.no_grad():
        value = function(x)
    return torch.stack(list(value)).mean(0) if isinstance(value, tuple | list) else value


# Products with a balanced q and k, and with a balanced v and projection.
MODELS = [
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32, 2, 2),
    ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}, 32, 2, 2),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 28, "window_size": 4, "depths": (2, 1), "embed_dim": 24, "num_heads": (2, 4)},
        28,
        3,
        3,
    ),
    ("revit_micro", {}, 32, 6, 6),
    ("reswin_micro", {}, 32, 6, 6),
    ("mobilevit_xxs", {}, 64, 9, 9),
    # Both reduction cells with window attention have a skip around the attention that reads v.
    ("vitaev2_micro", {}, 32, 9, 7),
    # Pooling stands between the linear and the heads.
    ("remvitv2_micro", {}, 32, 0, 0),
]


@pytest.mark.parametrize(("name", "kwargs", "side", "scores", "values"), MODELS, ids=[m[0] for m in MODELS])
def test_balancing_leaves_float_logits_unchanged(
    name: str, kwargs: dict[str, Any], side: int, scores: int, values: int
) -> None:
    model = strengthened(name, **kwargs)
    x = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = logits(model, x)
    graph = trace(model, x)
    add_missing_biases(graph)
    before = [p.clone() for p in graph.module.parameters()]
    done = balance_heads(graph, x)
    assert done == {"qk": scores, "vo": values}
    found = logits(graph.module, x)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    changed = any(not torch.equal(a, b) for a, b in zip(before, graph.module.parameters(), strict=True))
    assert changed == bool(scores)


def moments(graph: QuantGraph, x: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments of q, without its factor, and of centred k, in the one block of a ViT: (heads, D, D) each."""
    site = graph.sites["blocks.0.attn.qk"]
    q_node, k_node = site_inputs(graph, site)
    seen: dict[str, Tensor] = {}
    observe_nodes(graph.module, {q_node.name, k_node.name}, x, seen.__setitem__)
    q, k = seen[q_node.name], seen[k_node.name].transpose(-2, -1)
    q = q * q.shape[-1] ** 0.5

    def second(value: Tensor) -> Tensor:
        rows = value.double().movedim(1, 0).flatten(1, 2)
        return rows.transpose(1, 2) @ rows / rows.shape[1]

    return second(q), second(k - k.mean(dim=(0, 2), keepdim=True))


def test_balanced_q_and_k_have_the_same_even_second_moments() -> None:
    model = strengthened("vit_tiny_patch16_224", img_size=64, depth=1)
    for scale, rows in ((5.0, slice(0, 192)), (0.2, slice(192, 384))):
        model.blocks[0].attn.qkv.weight.data[rows] *= scale
    x = torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    graph = trace(model, x)
    q, k = moments(graph, x)
    assert float(q.diagonal(dim1=1, dim2=2).mean() / k.diagonal(dim1=1, dim2=2).mean()) > 50
    balance_heads(graph, x)
    q, k = (m.diagonal(dim1=1, dim2=2) for m in moments(graph, x))
    assert torch.allclose(q, k, rtol=0.05)
    for diagonal in (q, k):
        assert bool((diagonal.amax(1) / diagonal.amin(1) < 1.05).all())


@pytest.mark.parametrize("dim", [6, 8])
def test_balancing_gives_both_sides_one_matrix_and_keeps_the_product(dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    a, b = (torch.randn(2, dim, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    a, b = a @ a.transpose(1, 2), b @ b.transpose(1, 2) * 30
    forward, inverse = balancing(a, b, seed=0)
    eye = torch.eye(dim, dtype=torch.float64).expand(2, -1, -1)
    assert torch.allclose(forward @ inverse, eye, atol=1e-9)
    left, right = forward.transpose(1, 2) @ a @ forward, inverse @ b @ inverse.transpose(1, 2)
    # The ridge, a thousandth of the mean diagonal, is all that keeps them apart.
    assert float((left - right).norm() / left.norm()) < 0.05
    assert float(left.diagonal(dim1=1, dim2=2).sum() * right.diagonal(dim1=1, dim2=2).sum()) < float(
        a.diagonal(dim1=1, dim2=2).sum() * b.diagonal(dim1=1, dim2=2).sum()
    )


@pytest.mark.parametrize("dim", [3, 8, 64])
def test_rotations_are_orthogonal(dim: int) -> None:
    matrix = rotation(dim, seed=3)
    assert torch.allclose(matrix @ matrix.t(), torch.eye(dim, dtype=torch.float64), atol=1e-12)


def test_values_that_something_else_reads_are_left_alone() -> None:
    class Skip(nn.Module):
        """Attention with a skip around it that reads v, as ViTAEv2's reduction cells have."""

        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            tokens = x.flatten(2).transpose(1, 2)
            q, k, v = self.qkv(tokens).reshape(-1, tokens.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.proj(y) + v.transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    model, x = Skip(), torch.randn(6, 8, 3, 4)
    graph = trace(model, x)
    assert balance_heads(graph, x) == {"qk": 1, "vo": 0}
    with torch.no_grad():
        assert torch.allclose(graph.module(x), model(x), atol=1e-5)
