"""ReViT against the authors' program, and its three exact forms of attention against each other."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models
from batches import images
from common import GOLDEN_FOLDER
from leanvit.errors import CheckpointError, ConfigError, ShapeError
from leanvit.models import _attention, count_macs, revit
from leanvit.models._convert_revit import convert
from leanvit.models.revit import PAPER, ReViT
from official import fill_module, load_golden


def micro(**kwargs: object) -> ReViT:
    """A small network whose attention is far from uniform and whose alphas differ."""
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model("revit_micro", num_classes=10, **kwargs).eval()
    for name, parameter in model.named_parameters():
        if name == "alpha":
            parameter.data.uniform_(0.2, 0.8, generator=generator)
        elif "norm" not in name:
            std = 0.15 if parameter.ndim > 1 else 0.05
            parameter.data.normal_(std=std, generator=generator)
    return model


@pytest.mark.parametrize("name", ["revit_small", "revit_small_cls"])
@pytest.mark.parametrize("memory", ["quadratic", "linear"])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_official_weights_give_official_logits_and_scores(name: str, memory: str, fused: bool) -> None:
    weights, golden, meta = load_golden(name)
    converted = convert(weights, meta["cfg"])
    model = ReViT(**converted.kwargs, attention_memory=memory).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    if fused:
        model.fuse_()
    x = golden["input"]
    tokens, scores = model.forward_features(x, return_attention=True)
    torch.testing.assert_close(model(x), golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.forward_head(tokens), golden["logits"], atol=1e-4, rtol=0)
    pooled = model.forward_head(tokens, pre_logits=True)
    torch.testing.assert_close(pooled, golden["pooled"], atol=1e-4, rtol=0)
    assert len(scores) == 4
    for layer, score in enumerate(scores):
        torch.testing.assert_close(score, golden[f"scores/{layer}"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_published_base_gives_official_logits_and_scores() -> None:
    fill, golden = fill_module("fill_revit_exmobilevit"), np.load(GOLDEN_FOLDER / "full_revit_b16.npz")
    with torch.device("meta"):
        ours = timm.create_model("revit_base_patch16_224").state_dict()
    weights = {
        key: torch.from_numpy(fill.value(key, value.shape))
        for key, value in ((k.replace("head.", "head.projection."), v) for k, v in ours.items())
    }
    converted = convert(weights)
    model = ReViT(**converted.kwargs).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    tokens, scores = model.forward_features(fill.image("revit_b16", 2, 224), return_attention=True)
    expected = torch.from_numpy(golden["logits"])
    torch.testing.assert_close(model.forward_head(tokens), expected, atol=1e-4, rtol=0)
    for layer, score in enumerate(scores):
        first = torch.from_numpy(golden[f"first8_scores_{layer}"])
        torch.testing.assert_close(score.flatten()[:8], first, atol=1e-4, rtol=0)
    model.fuse_()
    torch.testing.assert_close(model(fill.image("revit_b16", 2, 224)), expected, atol=1e-4, rtol=0)


def test_converter_reads_the_published_network_from_its_shapes() -> None:
    with torch.device("meta"):
        state = timm.create_model("revit_base_patch16_224").state_dict()
    kwargs = convert({k.replace("head.", "head.projection."): v for k, v in state.items()}).kwargs
    expected = {"embed_dim": 768, "depth": 12, "num_heads": 12, "img_size": 224, "num_classes": 1000}
    assert {key: kwargs[key] for key in expected} == expected


def test_converter_lists_unknown_missing_and_misshapen_keys() -> None:
    weights, _, meta = load_golden("revit_small")
    weights["extra.weight"] = torch.zeros(1)
    del weights["norm.bias"]
    weights["pos_embed"] = weights["pos_embed"][:, :9]
    with pytest.raises(CheckpointError, match=r"extra\.weight.*norm\.bias.*pos_embed is \(1, 9, 48\)"):
        convert(weights, meta["cfg"])
    with pytest.raises(CheckpointError, match="rel_pos_zero_init"):
        convert(weights, {**meta["cfg"], "rel_pos_zero_init": True})


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("revit_base_patch16_224", 86_566_121),
        # ViT-S and ViT-Ti (22,050,664 and 5,717,416) without class token and its position, with alpha.
        ("revit_small_patch16_224", 22_050_664 - 2 * 384 + 1),
        ("revit_tiny_patch16_224", 5_717_416 - 2 * 192 + 1),
    ],
)
def test_parameter_counts_are_exact(name: str, params: int) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params
    if name in PAPER:
        assert PAPER[name].params == params


def test_macs_of_base_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        macs = count_macs(timm.create_model("revit_base_patch16_224"), (224, 224))
    # Patches, then per layer qkv, proj, two of the MLP and both attention products; the head.
    by_hand = 196 * 768 * 768 + 12 * (196 * 12 * 768**2 + 2 * 196**2 * 768) + 768_000
    assert macs == by_hand
    assert macs / 1e9 == pytest.approx(17.47, rel=1e-3)


def test_first_layers_follow_the_equation() -> None:
    """R_2 = alpha S_2 + (1 - alpha) R_1, with q, k, v taken from the packed linear by hand."""
    model = micro(alpha="fixed", alpha_init=0.3)
    tokens: list[Tensor] = []
    handles = [block.norm1.register_forward_hook(lambda _m, _i, out: tokens.append(out)) for block in model.blocks]
    with torch.no_grad():
        _, scores = model.forward_features(images(), return_attention=True)
        own = []
        for block, x in zip(model.blocks[:2], tokens[:2], strict=True):
            q, k, _ = block.attn.qkv(x).chunk(3, dim=-1)
            q, k = (t.unflatten(-1, (3, 32)).transpose(1, 2) for t in (q, k))
            own.append(q @ k.transpose(-2, -1) / 32**0.5)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(scores[0], own[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[1], 0.3 * own[1] + 0.7 * own[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_alpha_of_one_is_the_plain_baseline() -> None:
    residual, plain = micro(alpha="fixed", alpha_init=1.0), micro(alpha="none")
    plain.load_state_dict(residual.state_dict(), strict=True)
    torch.testing.assert_close(residual(images()), plain(images()), atol=1e-5, rtol=0)
    timm_names = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=96,
        depth=6,
        num_heads=3,
        num_classes=10,
        class_token=False,
        global_pool="avg",
        fc_norm=False,
    ).eval()
    timm_names.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(plain(images()), timm_names(images()), atol=1e-5, rtol=0)


def test_alpha_options_have_the_parameters_they_say() -> None:
    sizes = {mode: getattr(micro(alpha=mode), "alpha", None) for mode in ("learned", "fixed", "per_layer", "none")}
    assert sizes["fixed"] is None
    assert sizes["none"] is None
    assert sizes["learned"].shape == (1,)
    assert sizes["per_layer"].shape == (5,)
    for mode in ("learned", "per_layer"):
        model = micro(alpha=mode)
        model(images()).square().mean().backward()
        assert (model.alpha.grad.abs() > 0).all()
    assert not hasattr(ReViT(depth=2, alpha=None), "alpha")
    with pytest.raises(ConfigError, match="alpha is 'maybe'"):
        ReViT(alpha="maybe")
    with pytest.raises(ConfigError, match="alpha_init"):
        ReViT(alpha_init=1.5)


@torch.no_grad()
def test_equal_alphas_per_layer_are_one_alpha() -> None:
    one, each = micro(), micro(alpha="per_layer")
    state = one.state_dict()
    each.load_state_dict({**state, "alpha": state["alpha"].expand(5)}, strict=True)
    torch.testing.assert_close(one(images()), each(images()), atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["learned", "per_layer", "fixed", "none"])
@pytest.mark.parametrize("block_bytes", [16 << 20, 4096])
def test_linear_memory_gives_the_same_logits_and_gradients(
    mode: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_attention, "BLOCK_BYTES", block_bytes)
    model, x = micro(alpha=mode), images(2, 48, 32)

    def run(memory: str) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        model.set_attention_memory(memory)
        model.zero_grad()
        logits = model(x)
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        with torch.no_grad():
            torch.testing.assert_close(model(x), logits, atol=1e-5, rtol=0)
            scores = model.forward_features(x, return_attention=True)[1]
        return logits.detach(), gradients, scores

    quadratic, linear = run("quadratic"), run("linear")
    torch.testing.assert_close(linear[0], quadratic[0], atol=1e-5, rtol=0)
    for name, expected in quadratic[1].items():
        torch.testing.assert_close(linear[1][name], expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert len(linear[2]) == len(quadratic[2]) == 6
    for found, expected in zip(linear[2], quadratic[2], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_linear_memory_never_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_attention, "BLOCK_BYTES", 64 << 10)
    monkeypatch.setattr(revit, "LINEAR_FROM_BYTES", 1 << 20)
    model = micro()
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        model(images(1, 160, 160))
    assert max(sizes) < 1600 * 1600
    sizes.clear()
    with Watch():
        model(images(1, 32, 32))
    assert max(sizes) >= 64 * 96


@pytest.mark.parametrize("mode", ["learned", "per_layer", "fixed", "none"])
def test_fuse_keeps_logits_and_leaves_nothing_to_learn_of_alpha(mode: str) -> None:
    model, x = micro(alpha=mode), images(5)
    with torch.no_grad():
        expected, scores = model(x), model.forward_features(x, return_attention=True)[1]
        assert model.fuse_() is model
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
        for found, score in zip(model.forward_features(x, return_attention=True)[1], scores, strict=True):
            torch.testing.assert_close(found, score, atol=1e-5, rtol=0)
    assert "alpha" not in dict(model.named_parameters())
    model(x).sum().backward()


@torch.no_grad()
def test_any_multiple_of_the_patch_is_a_size() -> None:
    model = micro()
    for height, width in [(32, 32), (28, 44), (4, 4), (64, 20)]:
        assert model(images(1, height, width)).shape == (1, 10)
        maps = model.forward_intermediates(images(1, height, width), indices=[1], intermediates_only=True)
        assert maps[0].shape == (1, 96, height // 4, width // 4)
    for height, width in [(30, 32), (32, 33), (2, 32)]:
        with pytest.raises(ShapeError, match=f"{height} x {width}.*multiples of the patch 4 x 4"):
            model(images(1, height, width))


@torch.no_grad()
def test_set_input_size_equals_resampling_in_every_forward() -> None:
    model, x = micro(class_token=True), images(1, 48, 40)
    expected = model(x)
    model.set_input_size((48, 40))
    assert model.pos_embed.shape == (1, 121, 96)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kwargs", [{}, {"alpha": "fixed"}, {"alpha": "none"}, {"class_token": True}])
def test_export_has_a_dynamic_batch_and_plain_products(kwargs: dict) -> None:
    leave = timm.layers.use_fused_attn()
    timm.layers.set_fused_attn(False)
    try:
        model = micro(**kwargs)
    finally:
        timm.layers.set_fused_attn(leave)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (images(),), dynamic_shapes=dynamic)
    for batch in (1, 3):
        with torch.no_grad():
            assert torch.equal(program.module()(images(batch)), model(images(batch)))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("aten.matmul.default") == 12
    assert targets.count("aten.softmax.int") == 6


def test_bf16_training_keeps_large_tensors_in_bf16() -> None:
    model = micro().train()
    with torch.autocast("cpu", torch.bfloat16):
        _, scores = model.forward_features(images(), return_attention=True)
    assert all(score.dtype == torch.bfloat16 for score in scores)


def test_timm_builds_every_name_of_the_family() -> None:
    names = {"revit_tiny_patch16_224", "revit_small_patch16_224", "revit_base_patch16_224", "revit_micro"}
    assert names == set(revit.VARIANTS) == set(timm.list_models("revit*"))
    assert leanvit.models.revit is revit
    assert isinstance(timm.create_model("revit_micro", features_only=True, out_indices=(1, 3)), nn.Module)
