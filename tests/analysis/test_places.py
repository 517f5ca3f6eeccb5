"""Where tokens stand: each token depends most on the pixels of its place."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import AttentionLayer, attention_layers
from leanvit.analysis.places import Places, grid_of

# reach: how many places the pixels that a token is made of may lie off its middle; convolutions look further.
CASES = [
    ("vit_micro", {}, (28, 28), 0.5),
    ("deit_micro", {"img_size": (28, 44)}, (28, 44), 0.5),
    ("revit_micro", {}, (24, 40), 0.5),
    ("swin_micro", {}, (32, 32), 0.5),
    ("swin_micro", {"img_size": (36, 44)}, (36, 44), 0.5),
    ("reswin_micro", {}, (36, 44), 0.5),
    ("vitaev2_micro", {}, (36, 44), 2.0),
    ("vitae_micro", {}, (32, 48), 2.0),
    ("exmobilevit_micro", {}, (32, 64), 1.5),
    ("mobilevit_xxs", {}, (64, 96), 1.5),
]


def inputs_of(model: nn.Module, x: Tensor, layer: AttentionLayer) -> Tensor:
    """What the queries of a layer are made of, (groups, tokens, C), with the image's gradient."""
    module: Any = model.get_submodule(layer.name)
    kept: list[Tensor] = []
    handle = (getattr(module, "qkv", None) or module.kqv).register_forward_hook(lambda m, a, out: kept.append(a[0]))
    model(x)
    handle.remove()
    return kept[0].reshape(layer.weights.shape[1], layer.weights.shape[3], -1)


@pytest.mark.parametrize(("name", "options", "size", "reach"), CASES, ids=lambda value: str(value))
def test_a_token_depends_most_on_the_pixels_around_its_place(
    name: str, options: dict[str, Any], size: tuple[int, int], reach: float
) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0, **options).eval()
    x = torch.randn(1, 3, *size, requires_grad=True)
    # Two layers of the first stage: a plain and a shifted one where there are windows.
    for layer in attention_layers(model, x.detach())[:2]:
        places, _ = layer.places()
        step = torch.tensor(size) / torch.tensor(places.grid)
        tokens = inputs_of(model, x, layer)
        generator = torch.Generator().manual_seed(1)
        known = torch.nonzero(places.known)
        for group, token in known[torch.randperm(len(known), generator=generator)[:4]].tolist():
            signs = torch.randn(tokens.shape[-1], generator=generator)
            (gradient,) = torch.autograd.grad((tokens[group, token] * signs).sum(), x, retain_graph=True)
            # A wrong window, shift or order is several places off.
            apart = (centroid(gradient) - places.centres(size)[group, token]) / step
            assert apart.abs().max() <= reach, (layer.name, group, token)


def centroid(gradient: Tensor) -> Tensor:
    """Centre (y, x) in pixels of the energy of an image's gradient."""
    energy = gradient.square().sum((0, 1))
    return torch.stack(
        [(energy.sum(1 - axis) * (torch.arange(energy.shape[axis]) + 0.5)).sum() / energy.sum() for axis in (0, 1)]
    )


@pytest.mark.parametrize(
    ("name", "path"), [("exmobilevit_micro", "backbone.stages.2.1"), ("mobilevit_xxs", "stages.2.1")]
)
def test_patches_of_a_mobilevit_block_are_cut_as_the_block_cuts_them(name: str, path: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    layer = next(layer for layer in attention_layers(model, torch.randn(1, 3, 64, 96)) if layer.name.startswith(path))
    places, _ = layer.places()
    block: Any = model.get_submodule(path)
    block.conv_kxk = block.conv_1x1 = nn.Identity()
    seen: list[Tensor] = []

    class Seen(Exception):
        pass

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise Seen

    block.transformer[0].register_forward_pre_hook(look)
    rows, columns = places.grid
    with pytest.raises(Seen):
        block(torch.arange(rows * columns, dtype=torch.float32).reshape(1, 1, rows, columns))
    assert torch.equal(seen[0][:, :, 0].long(), places.index)


@pytest.mark.parametrize("name", ["swin_micro", "reswin_micro", "vitaev2_micro"])
def test_padding_has_no_place_and_every_patch_has_one(name: str) -> None:
    torch.manual_seed(0)
    size = (36, 44)
    options = {"img_size": size} if name == "swin_micro" else {}
    model = timm.create_model(name, num_classes=0, **options).eval()
    x = torch.randn(1, 3, *size, requires_grad=True)
    layers = attention_layers(model, x.detach())
    for layer in layers[:2]:
        places, _ = layer.places()
        assert places.grid == (18, 22)
        assert sorted(places.index[places.known].tolist()) == list(range(18 * 22))
        assert int((~places.known).sum()) == 20 * 24 - 18 * 22
    # Tokens of padding alone don't depend on the image.
    places, tokens = layers[0].places()[0], inputs_of(model, x, layers[0])
    (gradient,) = torch.autograd.grad(tokens[~places.known].square().sum(), x, allow_unused=True)
    assert gradient is None or float(gradient.abs().max()) == 0.0


def test_pooled_keys_stand_on_a_coarser_grid_than_queries() -> None:
    torch.manual_seed(0)
    model = timm.create_model("remvitv2_micro", num_classes=0)
    layers = attention_layers(model, torch.randn(1, 3, 32, 48))
    for layer in layers:
        queries, keys = layer.places()
        assert queries.index.shape[1] == queries.grid[0] * queries.grid[1] == layer.weights.shape[3]
        assert keys.index.shape[1] == keys.grid[0] * keys.grid[1] == layer.weights.shape[4]
        assert queries.grid[1] * 2 == queries.grid[0] * 3
    assert any(layer.places()[0].grid != layer.places()[1].grid for layer in layers)


@pytest.mark.parametrize(
    ("tokens", "size", "grid"),
    [
        (196, (224, 224), (14, 14)),
        (24, (64, 96), (4, 6)),
        (30, (65, 96), (5, 6)),
        (35, (20, 28), (5, 7)),
        (48, (30, 32), None),
        (1, (32, 32), (1, 1)),
        (0, (32, 32), None),
    ],
)
def test_a_grid_is_the_image_divided_by_one_number(
    tokens: int, size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    assert grid_of(tokens, size) == grid


def test_centres_are_in_the_middle_of_patches() -> None:
    places = Places(torch.tensor([[0, 1, 5]]), (2, 3))
    assert places.centres((8, 24)).tolist() == [[[2.0, 4.0], [2.0, 12.0], [6.0, 20.0]]]
