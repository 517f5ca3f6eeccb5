"""ReSwin against the authors' program, timm's Swin, and windows computed the long way."""

from __future__ import annotations

import pytest
import timm
import torch

from batches import images
from leanvit.errors import CheckpointError, ConfigError
from leanvit.models import count_macs, reswin
from leanvit.models._attention import make_windows, match_by_pair
from leanvit.models._convert_reswin import convert
from leanvit.models.reswin import PAPER, ReSwin
from official import load_golden

CLOSE = {"atol": 1e-4, "rtol": 0}
CPU = torch.device("cpu")


def micro(**kwargs: object) -> ReSwin:
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model("reswin_micro", num_classes=10, **kwargs).eval()
    for name, parameter in model.named_parameters():
        if name == "alpha":
            parameter.data.uniform_(0.2, 0.8, generator=generator)
        elif "norm" not in name:
            parameter.data.normal_(std=0.15 if parameter.ndim > 1 else 0.05, generator=generator)
    return model


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_official_weights_give_official_logits_and_scores(fused: bool) -> None:
    weights, golden, meta = load_golden("reswin_small_w7")
    converted = convert(weights, meta)
    model = ReSwin(**converted.kwargs).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    if fused:
        model.fuse_()
    tokens, scores = model.forward_features(golden["input"], return_attention=True)
    torch.testing.assert_close(model(golden["input"]), golden["logits"], **CLOSE)
    torch.testing.assert_close(model.forward_head(tokens), golden["logits"], **CLOSE)
    assert len(scores) == 6
    for layer in range(1, 6):
        torch.testing.assert_close(scores[layer], golden[f"scores/{layer}"], **CLOSE)


def test_converter_reads_networks_from_their_shapes() -> None:
    weights, _, meta = load_golden("reswin_small_w7")
    assert {**convert(weights).kwargs, "img_size": 112} == convert(weights, meta).kwargs
    with torch.device("meta"):
        state = timm.create_model("reswin_tiny_patch4_window7_224").state_dict()
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    converted = convert(state)
    assert converted.kwargs["depths"] == (2, 2, 6, 2)
    assert converted.kwargs["num_heads"] == (3, 6, 12, 24)
    assert converted.kwargs["window_size"] == 7
    assert not [key for key in converted.state_dict if "mask" in key or "index" in key]


def test_converter_lists_problems() -> None:
    weights, _, meta = load_golden("reswin_small_w7")
    weights["head.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"head\.bias is \(3,\), expected \(10,\)"):
        convert(weights, meta)
    with pytest.raises(CheckpointError, match="config is of 'ReViT-B', expected 'ReSwin-T'"):
        convert(weights, {"yaml": "ReViT-B"})


def test_parameters_and_macs_are_those_of_the_paper() -> None:
    name = "reswin_tiny_patch4_window7_224"
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == PAPER[name].params == 28_288_354
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(4.49, rel=1e-3)


@torch.no_grad()
def test_without_residual_it_is_timm_s_swin() -> None:
    """alpha = "none" against timm's own Swin-T, weights mapped by name, shifts and merging included."""
    torch.manual_seed(0)
    plain = timm.create_model("reswin_tiny_patch4_window7_224", alpha="none", num_classes=10).eval()
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10).eval()
    for name, parameter in plain.named_parameters():
        parameter.normal_(mean=float("norm" in name and "weight" in name), std=0.05)
    state = {}
    for key, value in plain.state_dict().items():
        if ".downsample." in key:
            # timm merges at the start of a stage, and orders the four neighbours as the authors do.
            stage = int(key.split(".")[1])
            key = key.replace(f"layers.{stage}.", f"layers.{stage + 1}.")
        state[key.replace("head.", "head.fc.") if key.startswith("head.") else key] = value
    theirs.load_state_dict(state, strict=True)
    x = images(1, 224, 224)
    torch.testing.assert_close(plain(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("grid", [(8, 8), (12, 8), (4, 12), (7, 10), (3, 5)])
def test_windows_hold_what_rolling_and_cutting_gives(grid: tuple[int, int]) -> None:
    window = 4
    rows, columns = (-(-side // window) * window for side in grid)
    raster = torch.arange(rows * columns).reshape(rows, columns)
    inside = torch.zeros(rows, columns, dtype=torch.bool)
    inside[: grid[0], : grid[1]] = True
    kinds = make_windows(grid, window, True, CPU)
    shifts = [(0, 0), (2 * (grid[0] > window), 2 * (grid[1] > window))]
    for kind, shift in zip(kinds, shifts, strict=True):
        rolled = torch.roll(raster, (-shift[0], -shift[1]), (0, 1))
        cells = rolled.unfold(0, window, window).unfold(1, window, window).reshape(-1, 16)
        assert torch.equal(kind.order, cells.flatten())
        assert torch.equal(kind.order[kind.inverse], raster.flatten())
        for number, cell in enumerate(cells):
            y, x = cell // columns, cell % columns
            # Before the roll, tokens of one window are neighbours unless the roll wrapped one around.
            near = ((y[:, None] - y[None]).abs() < window) & ((x[:, None] - x[None]).abs() < window)
            seen = near & inside.flatten()[cell][None, :]
            mask = torch.zeros(16, 16) if kind.mask is None else kind.mask[number, 0]
            if min(rows, columns) > window or shift == (0, 0):
                assert torch.equal(mask == 0, seen)


def test_aligned_residual_brings_the_same_pairs_together() -> None:
    """Logits that spell out their pair of tokens must still do so after matching."""
    grid, window, area = (8, 12), 4, 16
    kinds = make_windows(grid, window, True, CPU)
    for below, here in (kinds, kinds[::-1]):
        cells = below.order.reshape(-1, area)
        named = (cells[:, :, None] * 1000 + cells[:, None, :]).double()
        carried = torch.stack([named, -named], dim=1)[None]
        matched = match_by_pair(carried, here.source)[0]
        cells = here.order.reshape(-1, area)
        expected = (cells[:, :, None] * 1000 + cells[:, None, :]).double()
        known = here.known[:, 0]
        assert torch.equal(matched[:, 0][known], expected[known])
        assert torch.equal(matched[:, 1][known], -expected[known])
        found_below = {int(p) for p in named.flatten()}
        assert torch.equal(known, torch.tensor([[[int(p) in found_below for p in r] for r in w] for w in expected]))


@torch.no_grad()
def test_aligned_differs_from_index_only_where_windows_shift() -> None:
    index, aligned = micro(), micro(residual="aligned")
    aligned.load_state_dict(index.state_dict(), strict=True)
    scores = [model.forward_features(images(), return_attention=True)[1] for model in (index, aligned)]
    torch.testing.assert_close(scores[0][0], scores[1][0])
    assert (scores[0][1] - scores[1][1]).abs().max() > 1e-2
    one = aligned.forward_features(images(1), return_attention=True)[1]
    torch.testing.assert_close(one[3], scores[1][3][: one[3].shape[0]], atol=1e-5, rtol=0)
    assert all(score.isfinite().all() for score in scores[1])


@torch.no_grad()
def test_any_size_and_shape_of_image() -> None:
    for kwargs in ({}, {"residual": "aligned"}):
        model = micro(**kwargs)
        for height, width in [(32, 32), (33, 47), (5, 9), (1, 1), (28, 64), (20, 8)]:
            maps = model.forward_intermediates(images(1, height, width), intermediates_only=True)
            rows, columns = -(-height // 2), -(-width // 2)
            for stage, found in enumerate(maps):
                assert found.shape == (1, 32 * 2**stage, -(-rows // 2**stage), -(-columns // 2**stage))
            assert model(images(1, height, width)).isfinite().all()


@torch.no_grad()
def test_padding_of_windows_is_no_key() -> None:
    """A stage of one padded window gives its tokens what attention among them alone gives."""
    model = micro(depths=(1,), num_heads=(1,), window_size=4)
    x = images(1, 6, 6)
    tokens, scores = model.forward_features(x, return_attention=True)
    block, cell = model.layers[0].blocks[0], torch.arange(16).reshape(4, 4)[:3, :3].flatten()
    patches = model.patch_embed(x).flatten(1, 2)
    q, k, v = block.attn.qkv(block.norm1(patches)).chunk(3, dim=-1)
    y, x_ = cell // 4, cell % 4
    offset = (y[:, None] - y[None] + 3) * 7 + (x_[:, None] - x_[None] + 3)
    logits = q @ k.transpose(1, 2) / 32**0.5 + block.attn.relative_position_bias_table[offset][..., 0]
    torch.testing.assert_close(scores[0][0, 0][cell][:, cell], logits[0], atol=1e-5, rtol=0)
    after = patches + block.attn.proj(logits.softmax(-1) @ v)
    after = model.norm(after + block.mlp(block.norm2(after)))
    torch.testing.assert_close(tokens, after, atol=1e-5, rtol=0)


@torch.no_grad()
def test_set_input_size_equals_windows_made_in_every_forward() -> None:
    model, x = micro(), images(1, 48, 40)
    expected = model(x)
    model.set_input_size((48, 40))
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["learned", "per_layer", "fixed", "none"])
@pytest.mark.parametrize("residual", ["index", "aligned"])
def test_alpha_options_train_and_fuse(mode: str, residual: str) -> None:
    model, x = micro(alpha=mode, residual=residual), images()
    logits = model(x)
    logits.square().mean().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    model.fuse_()
    with torch.no_grad():
        torch.testing.assert_close(model(x), logits.detach(), atol=1e-5, rtol=0)
    assert "alpha" not in dict(model.named_parameters())


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="residual is 'shifted'"):
        micro(residual="shifted")
    with pytest.raises(ConfigError, match="unequal length"):
        micro(depths=(2, 2))


@pytest.mark.parametrize("kwargs", [{}, {"residual": "aligned"}, {"alpha": "learned"}])
def test_export_has_a_dynamic_batch_and_no_index_arithmetic(kwargs: dict) -> None:
    model = micro(**kwargs)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (images(),), dynamic_shapes=dynamic)
    for batch in (1, 3):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images(batch)), model(images(batch)), atol=1e-6, rtol=0)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not {"aten.arange.default", "aten.argsort.default", "aten.add_.Tensor", "aten.to.dtype"} & targets


def test_timm_builds_every_name_of_the_family() -> None:
    names = {"reswin_tiny_patch4_window7_224", "reswin_micro"}
    assert set(reswin.VARIANTS) == set(timm.list_models("reswin*")) == names
