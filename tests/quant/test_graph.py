"""The traced graph equals the module, and its sites are those of the architecture."""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import cache

import pytest
import timm
import torch
from torch import nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.config import MPTQConfig
from leanvit.errors import ExportError
from leanvit.quant.attach import attach
from leanvit.quant.graph import OPERANDS, QuantGraph, end_sites, trace
from leanvit.quant.plan import make_plan

# (architecture, arguments, input side, linears, convolutions, products of activations)
MODELS = [
    ("vit_tiny_patch16_224", {"img_size": 64, "depth": 3}, 64, 3 * 4 + 1, 1, 3 * 2),
    ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 2}, 64, 2 * 4 + 2, 1, 2 * 2),
    (
        "swin_tiny_patch4_window7_224",
        {"img_size": 56, "depths": (2, 2), "embed_dim": 24, "num_heads": (2, 4)},
        56,
        4 * 4 + 1 + 1,
        1,
        4 * 2,
    ),
    ("mobilevit_xxs", {}, 64, (2 + 4 + 3) * 4 + 1, 35, (2 + 4 + 3) * 2),
    ("revit_micro", {}, 32, None, 1, None),
]


@pytest.mark.parametrize(("name", "kwargs", "side", "linears", "convolutions", "products"), MODELS)
def test_graph_equals_the_module_and_counts_its_sites(
    name: str, kwargs: dict, side: int, linears: int | None, convolutions: int, products: int | None
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, **kwargs).eval()
    graph = trace(model, torch.randn(2, 3, side, side))
    x = torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = model(x)
        found = graph.module(x)
    assert torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
    kinds = [site.kind for site in graph.sites.values()]
    modules = list(model.modules())
    blocks = len(getattr(model, "blocks", []))
    assert kinds.count("linear") == (linears or sum(isinstance(m, nn.Linear) for m in modules))
    assert kinds.count("conv2d") == sum(isinstance(m, nn.Conv2d) for m in modules) == convolutions
    assert kinds.count("matmul") == (products or 2 * blocks)
    assert graph.unquantized == []


def test_sites_are_named_after_the_module_path() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    names = list(trace(model, torch.randn(1, 3, 32, 32)).sites)
    block = "blocks.0"
    assert names == [
        "patch_embed.proj",
        f"{block}.attn.qkv",
        f"{block}.attn.qk",
        f"{block}.attn.av",
        f"{block}.attn.proj",
        f"{block}.mlp.fc1",
        f"{block}.mlp.fc2",
        "head",
    ]


def test_residual_logits_of_revit_are_query_key_sites() -> None:
    model = timm.create_model("revit_micro", num_classes=10)
    names = set(trace(model, torch.randn(1, 3, 32, 32)).sites)
    for index in range(len(model.blocks)):
        assert {f"blocks.{index}.attn.qk", f"blocks.{index}.attn.av"} <= names


def test_macs_of_sites_are_those_of_the_formula() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    sites = trace(model, torch.randn(1, 3, 32, 32)).sites
    tokens, width, heads = 5, 192, 3
    assert sites["patch_embed.proj"].macs == 4 * width * 3 * 16 * 16
    assert sites["blocks.0.attn.qkv"].macs == tokens * width * 3 * width
    assert sites["blocks.0.attn.qk"].macs == heads * tokens * tokens * (width // heads)
    assert sites["head"].macs == width * 10


def test_the_model_itself_is_not_changed() -> None:
    model = timm.create_model("revit_micro", num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = trace(model, torch.randn(1, 3, 32, 32))
    for parameter in graph.module.parameters():
        parameter.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_cannot_be_traced_is_named() -> None:
    class DataDependent(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if float(x.sum()) > 0 else -x

    with pytest.raises(ExportError, match=r"torch\.export can't follow DataDependent"):
        trace(DataDependent(), torch.randn(1, 3, 8, 8))


def test_masked_attention_is_written_out_exactly() -> None:
    class Masked(nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            mask = torch.randn(6, 6) > 0 if dtype == torch.bool else torch.randn(6, 6)
            self.register_buffer("mask", mask | torch.eye(6, dtype=torch.bool) if dtype == torch.bool else mask)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.flatten(2)
            return nn.functional.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=self.mask, scale=0.3)

    for dtype in (torch.bool, torch.float32):
        model = Masked(dtype)
        x = torch.randn(2, 6, 2, 4)
        graph = trace(model, x)
        assert [s.kind for s in graph.sites.values()] == ["matmul", "matmul"]
        assert torch.allclose(graph.module(x), model(x), atol=1e-6)


def test_a_mask_that_hides_nothing_is_left_out_and_others_have_no_infinity() -> None:
    class Masked(nn.Module):
        def __init__(self, last: int) -> None:
            super().__init__()
            self.last = last

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = x.flatten(2)
            mask = (torch.arange(6) <= self.last)[None, None].expand(x.shape[0], 6, -1)  # as transformers makes its own
            return nn.functional.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=mask)

    x = torch.randn(3, 6, 2, 4)
    for last, masks in ((5, 0), (3, 1)):
        graph = trace(Masked(last), x)
        fills = [n for n in graph.module.graph.nodes if n.target is torch.ops.aten.masked_fill.Scalar]
        assert [math.isfinite(node.args[2]) for node in fills] == [True] * masks
        assert torch.allclose(graph.module(x), Masked(last)(x), atol=1e-6)


@cache
def traced(name: str, side: int) -> QuantGraph:
    """A network of ten classes with all its sites; shared, so nobody may change it."""
    torch.manual_seed(0)
    return trace(timm.create_model(name, num_classes=10).eval(), torch.randn(2, 3, side, side), "full")


# Sites by kind: linear, conv2d, matmul; norm, softmax, activation, add.
ALL_SITES = [
    # Four linears, two products, two norms, a softmax, a GELU and two additions a block.
    ("vit_micro", 28, (6 * 4 + 1, 1, 12), (13, 6, 6, 12)),
    # A second classifier, and the mean of both.
    ("deit_micro", 28, (6 * 4 + 2, 1, 12), (13, 6, 6, 13)),
    # Two patch mergings, each a norm and a linear; a norm behind the patch embedding and one at the end.
    ("swin_micro", 32, (6 * 4 + 2 + 1, 1, 12), (16, 6, 6, 12)),
    ("revit_micro", 32, (6 * 4 + 1, 1, 12), (13, 6, 6, 12)),
    # As Swin's, and five blocks add the logits that are carried to them.
    ("reswin_micro", 32, (6 * 4 + 2 + 1, 1, 12), (16, 6, 6, 17)),
    # Two Performers, of which the random projection is a site, three attentions.
    ("vitae_micro", 32, (5 * 4 + 2 + 1, 23, 3 * 2), (10, 3, 28, 15)),
    ("vitaev2_micro", 32, (9 * 4 + 1, 37, 9 * 2), (18, 9, 37, 25)),
    ("exmobilevit_micro", 32, (6 * 4 + 1, 37, 12), (12, 6, 36, 15)),
    # Two products a block for relative positions, three pooling convolutions with norms of their own.
    ("remvitv2_micro", 32, (5 * 4 + 2 + 1, 1 + 5 * 3, 5 * 4), (26, 5, 5, 25)),
    # Separable attention multiplies elementwise, its norms are group norms.
    ("mobilevitv2_050", 64, (1, 64, 0), (0, 9, 25, 19)),
]


@pytest.mark.parametrize(("name", "side", "products", "others"), ALL_SITES, ids=[m[0] for m in ALL_SITES])
def test_full_scope_counts_every_site(name: str, side: int, products: tuple[int, ...], others: tuple[int, ...]) -> None:
    graph = traced(name, side)
    kinds = Counter(site.kind for site in graph.sites.values())
    assert tuple(kinds[kind] for kind in ("linear", "conv2d", "matmul")) == products
    assert tuple(kinds[kind] for kind in ("norm", "softmax", "activation", "add")) == others
    # The three products of a Performer's features stay in float, and the report says so.
    features = [f"stages.{stage}.reduction.attn" for stage in (0, 1) for _ in range(3)] if name == "vitae_micro" else []
    assert graph.unquantized == [f"aten.matmul.default of exponentials at {path}" for path in features]
    assert all(len(site.elements) == OPERANDS[site.kind] and min(site.elements) > 0 for site in graph.sites.values())
    model = timm.create_model(name)
    weights = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert kinds["conv2d"] == weights


def test_full_scope_adds_what_stands_between_products() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    x = torch.randn(1, 3, 32, 32)
    plain, full = trace(model, x).sites, trace(model, x, "full").sites
    assert list(plain) == [name for name in full if full[name].kind in ("linear", "conv2d", "matmul")]
    added = [(name, site.kind) for name, site in full.items() if name not in plain]
    assert added == [
        ("blocks.0.norm1.norm", "norm"),
        ("blocks.0.attn.softmax", "softmax"),
        ("blocks.0.add", "add"),
        ("blocks.0.norm2.norm", "norm"),
        ("blocks.0.mlp.act.activation", "activation"),
        ("blocks.0.add#2", "add"),
        ("norm.norm", "norm"),
    ]
    tokens, width, heads = 5, 192, 3
    assert full["blocks.0.add"].elements == (tokens * width, tokens * width)
    assert full["blocks.0.attn.softmax"].elements == (heads * tokens * tokens,)
    assert full["blocks.0.mlp.act.activation"].elements == (tokens * 4 * width,)
    assert all(full[name].macs == 0 and full[name].weight is None for name, _ in added)


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("vit_micro", 28, {"patch_embed.proj", "head"}),
        ("deit_micro", 28, {"patch_embed.proj", "head", "head_dist"}),
        ("swin_micro", 32, {"patch_embed.proj", "head.fc"}),
        ("reswin_micro", 32, {"patch_embed.proj", "head"}),
        ("remvitv2_micro", 32, {"patch_embed.proj", "head"}),
        ("exmobilevit_micro", 32, {"backbone.stem.conv", "fc"}),
        ("mobilevitv2_050", 64, {"stem.conv", "head.fc"}),
        ("vitae_micro", 32, {"head", *(f"stages.0.reduction.{n}" for n in
                                       ("prm.convs.0", "prm.convs.1", "prm.convs.2", "pcm.convs.0"))}),
        ("vitaev2_micro", 32, {"head", *(f"stages.0.reduction.{n}" for n in
                                         ("prm.convs.0", "prm.convs.1", "prm.convs.2", "pcm.convs.0"))}),
    ],
)  # fmt: skip
def test_ends_are_what_reads_the_image_and_what_gives_the_logits(name: str, side: int, expected: set[str]) -> None:
    graph = traced(name, side)
    assert end_sites(graph) == expected
    quantized = copy.deepcopy(graph)
    attach(quantized, make_plan(quantized, MPTQConfig()))
    assert end_sites(quantized) == expected


class Caching(nn.Module):
    """Keeps a value of its weights from the first forward in eval mode to the next change of mode, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.BatchNorm1d(3).eval()
        self.head = nn.Linear(3, 3)
        self.gain = nn.Parameter(torch.ones(3))
        self.cache: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Caching:
        self.cache = {}
        return super().train(mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return self.head(self.frozen(x.mean((2, 3))) * self.gain.exp())
        if "gain" not in self.cache:
            self.cache["gain"] = self.gain.exp()
        return self.head(self.frozen(x.mean((2, 3))) * self.cache["gain"])


def test_what_a_network_cached_before_its_weights_changed_is_not_traced() -> None:
    model, x = Caching().eval(), torch.randn(2, 3, 4, 4)
    model(x)  # with gradients: such a tensor can't be copied
    with torch.no_grad():
        model.gain.fill_(2.0)
    graph = trace(model, x)
    with torch.no_grad():
        torch.testing.assert_close(graph.module(x), model.train().eval()(x))
    assert "gain" in graph.module.state_dict()


def test_a_traced_model_keeps_the_mode_of_every_module() -> None:
    model = Caching()
    model.head.eval()
    before = [module.training for module in model.modules()]
    trace(model, torch.randn(2, 3, 4, 4))
    assert [module.training for module in model.modules()] == before
    assert len(set(before)) == 2
