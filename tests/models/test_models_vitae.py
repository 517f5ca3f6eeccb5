"""ViTAE against the authors' program, a slow float64 form of the paper, and its own options.

The slow form works on the authors' weights under their names, one window, head and token at a time; it is
first held against the golden files itself, and is then the truth at sizes for which there is no file.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from batches import images
from common import GOLDEN_FOLDER
from leanvit.errors import CheckpointError, ConfigError, ShapeError
from leanvit.models import _cells, count_macs, vitae
from leanvit.models._cellnet import drop_path_rates
from leanvit.models._convert_vitae import _authors_names, convert
from leanvit.models.vitae import PAPER, VARIANTS, Performer, ViTAE
from official import fill_module, load_golden
from official_vitae import (
    CLOSE,
    Slow,
    check_gradients,
    check_published_stages,
    filled_official,
    official,
    random_norms,
    tokens_by_cell,
)

PYRAMID, PLAIN = "vitae_v1_performer_64", "vitae_v1_clstoken_64"


class SlowViTAE(Slow):
    """ViTAE's pyramid: logits and tokens by cell."""

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        found = {}
        x = image.double()
        for layer, ratio in enumerate(self.config["downsample_ratios"]):
            name = f"layers.{layer}.RC"
            tokens, grid = self.prm(x, f"{name}.PRM.convs", ratio)
            if f"{name}.attn.w" in self.weights:
                strides = {4: (2, 2, 1), 2: (2, 1, 1)}[ratio]
                y = self.performer(self.norm(tokens, f"{name}.attn.norm1", 1e-5), f"{name}.attn")
                y = y + self.sequence(x, f"{name}.PCM", strides, final=True)
                tokens = y + self.mlp(
                    self.norm(y, f"{name}.attn.norm2", 1e-5), f"{name}.attn.mlp.0", f"{name}.attn.mlp.2"
                )
            found[f"feat.rc{layer}"] = tokens
            for cell in range(self.config["NC_depth"][layer]):
                name = f"layers.{layer}.NC.{cell}"
                as_image = tokens.transpose(1, 2).unflatten(2, grid)
                normed = self.norm(tokens, f"{name}.norm1", 1e-6)
                y = tokens + self.attention(normed, f"{name}.attn", self.config["NC_heads"][layer])[0]
                y = y + self.sequence(as_image, f"{name}.PCM", (1, 1, 1), final=True)
                tokens = y + self.mlp(self.norm(y, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1", f"{name}.mlp.fc2")
            found[f"feat.stage{layer}"] = tokens
            x = tokens.transpose(1, 2).unflatten(2, grid)
        found["logits"] = self.linear(tokens.mean(1), "head")
        return found

    def performer(self, x: Tensor, name: str) -> Tensor:
        k, q, v = self.linear(x, f"{name}.kqv").chunk(3, -1)
        out = slow_performer(k, q, v, self.weights[f"{name}.w"])
        return v + self.linear(out, f"{name}.proj")


def slow_performer(k: Tensor, q: Tensor, v: Tensor, w: Tensor, epsilon: float = 1e-8) -> Tensor:
    """Random-feature attention as an N x N matrix, float64."""
    k, q, v, w = (t.double() for t in (k, q, v, w))

    def features(x: Tensor) -> Tensor:
        return (x @ w.T - x.square().sum(-1, keepdim=True) / 2).exp() / w.shape[0] ** 0.5

    kernel = features(q) @ features(k).transpose(1, 2)
    return kernel @ v / (kernel.sum(-1, keepdim=True) + epsilon)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_official_weights_give_official_logits_and_features(fused: bool) -> None:
    _, golden, _ = load_golden(PYRAMID)
    model = official(PYRAMID)
    if fused:
        model.fuse_()
    x = golden["input"]
    torch.testing.assert_close(model(x), golden["logits"], **CLOSE)
    features = model.forward_features(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), golden["feat.pooled"], **CLOSE)
    found = tokens_by_cell(model, x)
    assert found.keys() == {key for key in golden if key.startswith("feat.") and key != "feat.pooled"}
    for key, tokens in found.items():
        torch.testing.assert_close(tokens, golden[key], **CLOSE)


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_official_plain_weights_give_official_logits_and_features(fused: bool) -> None:
    _, golden, _ = load_golden(PLAIN)
    model = official(PLAIN)
    if fused:
        model.fuse_()
    x = golden["input"]
    torch.testing.assert_close(model(x), golden["logits"], **CLOSE)
    features, steps = model.forward_intermediates(x, return_prefix_tokens=True, output_fmt="NLC")
    torch.testing.assert_close(features, golden["feat.stage2"], **CLOSE)
    torch.testing.assert_close(torch.cat(steps[-1][::-1], dim=1), golden["feat.stage2"], **CLOSE)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), golden["feat.pooled"], **CLOSE)
    embedded, _ = model.embedding(x)
    for key in ("feat.rc0", "feat.stage0", "feat.rc2"):
        torch.testing.assert_close(embedded, golden[key], **CLOSE)


@pytest.mark.parametrize("name", [PYRAMID, PLAIN])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_official_ones(name: str, recompute: bool) -> None:
    model = official(name)
    model.set_grad_checkpointing(recompute)
    check_gradients(model, name)


@torch.no_grad()
def test_published_tiny_gives_official_logits_and_features() -> None:
    golden = np.load(GOLDEN_FOLDER / "full_ViTAE_basic_Tiny.npz")
    converted = convert(filled_official("vitae_tiny"))
    model = ViTAE(**converted.kwargs).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    x = torch.from_numpy(fill_module("fill_vitae").input_array(*golden["input_shape"]))
    check_published_stages(tokens_by_cell(model, x), golden)
    for form in (model, model.fuse_()):
        torch.testing.assert_close(form(x), torch.from_numpy(golden["logits"]), **CLOSE)
        torch.testing.assert_close(form(x).double(), torch.from_numpy(golden["logits_f64"]), **CLOSE)


@torch.no_grad()
def test_slow_form_gives_official_logits() -> None:
    weights, golden, config = load_golden(PYRAMID)
    found = SlowViTAE(weights, config)(golden["input"])
    for key, value in found.items():
        torch.testing.assert_close(value.float(), golden[key], **CLOSE)


@pytest.mark.parametrize("size", [(64, 96), (96, 160), (64, 144), (16, 16), (80, 16)])
@torch.no_grad()
def test_maps_that_are_not_square_keep_their_layout(size: tuple[int, int]) -> None:
    weights, _, config = load_golden(PYRAMID)
    model, x = official(PYRAMID), images(2, *size)
    expected = SlowViTAE(weights, config)(x)
    torch.testing.assert_close(model(x).double(), expected["logits"], **CLOSE)
    for key, tokens in tokens_by_cell(model, x).items():
        torch.testing.assert_close(tokens.double(), expected[key], **CLOSE)


@torch.no_grad()
def test_other_sizes_are_padded_with_zeros_below_and_to_the_right() -> None:
    model, x = official(PYRAMID), images(2, 61, 50)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 2, 0, 3))), atol=1e-6, rtol=0)
    shapes = [tuple(m.shape[2:]) for m in model.forward_intermediates(x, intermediates_only=True)]
    assert shapes == [(16, 13), (8, 7), (4, 4)]


def test_plain_network_resamples_positions_and_names_the_patch_it_needs() -> None:
    model = official(PLAIN)
    with torch.no_grad():
        maps = model.forward_intermediates(images(1, 64, 96), intermediates_only=True)
        assert [tuple(m.shape) for m in maps] == [(1, 64, 4, 6)] * 2
        at_once = model(images(1, 96, 32))
        model.set_input_size((96, 32))
        torch.testing.assert_close(model(images(1, 96, 32)), at_once, atol=1e-6, rtol=0)
    with pytest.raises(ShapeError, match="64 x 72, expected multiples of the patch 16 x 16"):
        model(images(1, 64, 72))
    with pytest.raises(ShapeError, match=r"expected \(B, 3, H, W\)"):
        model(torch.zeros(1, 4, 64, 64))


@torch.no_grad()
def test_plain_pooling_leaves_the_class_token_out() -> None:
    """The mean over patches is classified; global_pool='token' takes the class token instead."""
    _, golden, _ = load_golden(PLAIN)
    norm = official(PLAIN).fc_norm
    tokens = golden["feat.stage2"]
    mean = official(PLAIN).forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(mean, norm(tokens[:, 1:].mean(1)))
    first = official(PLAIN, global_pool="token").forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(first, norm(tokens[:, 0]))


@pytest.mark.parametrize("name", PAPER)
def test_parameters_and_macs_are_those_of_the_paper(name: str) -> None:
    paper = {
        "vitae_tiny": (4_886_888, 1.757),
        "vitae_6m": (6_614_120, 2.152),
        "vitae_13m": (10_834_728, 3.036),
        "vitae_small": (24_032_136, 6.180),
        "vitae_base": (89_341_672, 18.08),
        "vitae_large": (311_724_008, 62.94),
        "vitae_huge": (644_528_360, 129.6),
    }
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == paper[name][0] == PAPER[name].params
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(paper[name][1], rel=1e-3)
    assert PAPER[name].macs == paper[name][1]


@pytest.mark.parametrize("stable", [False, True])
@torch.no_grad()
def test_performer_is_random_feature_attention(stable: bool) -> None:
    torch.manual_seed(0)
    performer = Performer(24, 16, stable=stable)
    k, q, v = (0.5 * torch.randn(3, 2, 50, 16)).unbind(0)
    expected = slow_performer(k, q, v, performer.w)
    torch.testing.assert_close(performer.attend(k, q, v).double(), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_stable_performer_goes_on_where_the_official_one_vanishes() -> None:
    torch.manual_seed(0)
    k, q, v = torch.randn(3, 2, 50, 16).unbind(0)
    k, q = 3 * k, 3 * q
    official_form, stable = Performer(24, 16), Performer(24, 16, stable=True)
    stable.load_state_dict(official_form.state_dict())
    exact = slow_performer(k, q, v, stable.w, epsilon=0.0)
    torch.testing.assert_close(stable.attend(k, q, v).double(), exact, atol=1e-3, rtol=1e-3)
    vanished = slow_performer(k, q, v, stable.w)
    assert vanished.abs().amax() < 1e-3 * exact.abs().amax()
    torch.testing.assert_close(official_form.attend(k, q, v).double(), vanished, atol=1e-5, rtol=0)


def test_stable_performer_has_the_same_gradients() -> None:
    torch.manual_seed(0)
    performer, stable = Performer(24, 16), Performer(24, 16, stable=True)
    stable.load_state_dict(performer.state_dict())
    x = torch.randn(2, 30, 24)
    for form in (performer, stable):
        form(x, (5, 6)).square().mean().backward()
    torch.testing.assert_close(performer.kqv.weight.grad, stable.kqv.weight.grad, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_performer_computes_in_float32_under_autocast_and_in_half_precision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.dtype] = []
    attend = Performer.attend

    def spy(self: Performer, k: Tensor, q: Tensor, v: Tensor) -> Tensor:
        out = attend(self, k, q, v)
        seen.extend([k.dtype, q.dtype, v.dtype, self.exponents(k).dtype, out.dtype])
        return out

    monkeypatch.setattr(Performer, "attend", spy)
    _, golden, _ = load_golden(PYRAMID)
    x, scale = golden["input"], golden["logits"].abs().amax()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = official(PYRAMID)(x)
    assert (low.float() - golden["logits"]).abs().amax() < 0.05 * scale
    half = official(PYRAMID).half()(x.half())
    assert (half.float() - golden["logits"]).abs().amax() < 0.05 * scale
    assert set(seen) == {torch.float32}


def test_random_features_are_saved_and_never_trained() -> None:
    model = timm.create_model("vitae_micro", num_classes=10)
    names = {f"stages.{i}.reduction.attn.w" for i in range(2)}
    assert names <= model.state_dict().keys()
    assert names == {name for name, p in model.named_parameters() if not p.requires_grad}
    assert names <= model.no_weight_decay() <= dict(model.named_parameters()).keys()
    before = {name: model.get_parameter(name).clone() for name in names}
    optimizer = create_optimizer_v2(model, "adamw", lr=0.1, weight_decay=0.1)
    model(torch.rand(2, 3, 28, 28)).sum().backward()
    optimizer.step()
    assert all(torch.equal(model.get_parameter(name), values) for name, values in before.items())
    w = model.stages[0].reduction.attn.w.double()
    torch.testing.assert_close(w @ w.T, w.shape[0] * torch.eye(w.shape[0]).double(), atol=1e-4, rtol=0)


@torch.no_grad()
def test_no_weight_decay_names_are_real() -> None:
    assert official(PLAIN).no_weight_decay() == {"embedding.cls_token", "embedding.pos_embed"}


def test_official_drop_path_starts_again_by_the_depth_before() -> None:
    rule = drop_path_rates(0.13, (2, 2, 8, 2), "official")
    steps = [0.01 * i for i in range(14)]
    expected = [steps[0:2], steps[2:4], steps[2:10], steps[8:10]]
    for ours, theirs in zip(rule, expected, strict=True):
        assert ours == pytest.approx(theirs)
    linear = drop_path_rates(0.13, (2, 2, 8, 2), "linear")
    assert [rate for stage in linear for rate in stage] == pytest.approx(steps)


def test_reduction_cells_have_options_of_their_own() -> None:
    model = ViTAE(drop_path_rate=0.3, proj_drop_rate=0.2, reduction_drop_path_rate=0.05)
    performer = model.stages[0].reduction
    assert performer.attn.proj_drop.p == 0.1
    assert performer.mlp.drop2.p == 0.1
    assert performer.drop_path.drop_prob == 0.05
    assert model.stages[2].blocks[-1].drop_path2.drop_prob == pytest.approx(0.3)


@pytest.mark.parametrize("name", ["vitae_micro", PLAIN])
@torch.no_grad()
def test_fuse_folds_every_batch_norm_and_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    model = official(PLAIN) if name == PLAIN else timm.create_model(name, num_classes=10).eval()
    random_norms(model)
    x = images(2, 64, 64)
    before = model(x)
    assert model.fuse_() is model
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [PYRAMID, PLAIN])
@torch.no_grad()
def test_inference_in_pieces_gives_the_same_and_overwrites_no_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = official(name), images(3, 64, 64)
    with torch.enable_grad():
        expected = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    monkeypatch.setattr(_cells, "CACHE_TOKENS", 5)
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, _cells.Attention | _cells.ParallelConv | Performer):
            module.register_forward_hook(lambda _m, _i, out: kept.append((out, out.clone())))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    for piecewise, whole in zip(model.forward_intermediates(x, intermediates_only=True), maps, strict=True):
        torch.testing.assert_close(piecewise, whole, atol=1e-5, rtol=0)
    assert kept
    for out, copy in kept:
        assert torch.equal(out, copy)


@pytest.mark.parametrize("name", [n for n in VARIANTS if n in PAPER])
def test_converter_reads_published_networks_from_their_shapes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    authors = _authors_names(model, 2)
    state = {f"{authors[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in model.state_dict().items()}
    kwargs = convert(state).kwargs
    with torch.device("meta"):
        again = ViTAE(**kwargs)
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    heads = {n: [m.num_heads for m in net.modules() if isinstance(m, _cells.Attention)] for n, net in
             (("ours", model), ("read", again))}  # fmt: skip
    assert heads["ours"] == heads["read"]


def test_converter_lists_unknown_missing_and_misshapen_keys() -> None:
    weights, _, config = load_golden(PYRAMID)
    weights["extra.weight"] = torch.zeros(1)
    del weights["layers.0.RC.attn.norm1.bias"]
    weights["layers.2.NC.0.mlp.fc2.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"missing layers\.0\.RC\.attn\.norm1\.bias.*fc2\.bias has shape \(3,\)"):
        convert(weights, config)
    with pytest.raises(CheckpointError, match=r"unknown extra\.weight"):
        convert(weights, config)
    weights, _, config = load_golden(PYRAMID)
    with pytest.raises(CheckpointError, match=r"token_dims is \(16, 24, 64\) in the weights"):
        convert(weights, {**config, "token_dims": [16, 24, 72]})
    with pytest.raises(CheckpointError, match="no published ViTAE"):
        convert(weights)
    with pytest.raises(CheckpointError, match="no reduction cell"):
        convert({"head.weight": torch.zeros(10, 4)})
    del weights["head.weight"]
    with pytest.raises(CheckpointError, match=r"missing head\.weight"):
        convert(weights, config)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"global_pool": "token"}, "global_pool is 'token'"),
        ({"drop_path_rule": "cosine"}, "drop_path_rule is 'cosine'"),
        ({"depths": (0, 7)}, "token_dims has 3 entries, expected 2"),
        ({"reductions": ("performer", "performer", "window")}, "reduction is 'window'"),
        ({"token_dims": (64, 64, 192)}, "token width is 192, expected 256"),
        ({"ratios": (4, 2, 3)}, "ratio is 3, expected one of"),
        ({"num_heads": (1, 1, 3)}, "width 256 is not a multiple of num_heads 3"),
        ({"patch_size": 16}, "expected one entry where patch_size is given"),
    ],
)
def test_wrong_options_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViTAE(**kwargs)


def test_preprocessing_is_stated() -> None:
    assert {cfg.default.crop_pct for name, cfg in vitae.default_cfgs.items() if name in PAPER} == {0.875, 0.9}
    for name in VARIANTS:
        cfg = timm.get_pretrained_cfg(name)
        with torch.device("meta"):
            model = timm.create_model(name)
        first = (cfg.first_conv,) if isinstance(cfg.first_conv, str) else cfg.first_conv
        found = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3}
        assert set(first) == found
