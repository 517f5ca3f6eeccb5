"""ExMobileViT against the authors' program, and ExShortcut against its definition on other backbones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

import leanvit.models.exmobilevit
from batches import OLDER_TIMM, images
from common import GOLDEN_FOLDER
from leanvit.errors import CheckpointError, ConfigError, ShapeError
from leanvit.models import count_macs
from leanvit.models._convert_exmobilevit import convert
from leanvit.models._mobilevit import fold, unfold
from leanvit.models.exmobilevit import PAPER, ExMobileViT, ExShortcutNet, add_exshortcut
from official import fill_module, load_golden, official_keys

SMALL = ["mobilevit_s_base_small", "exmobilevit_576_small", "exmobilevit_928_small"]
PUBLISHED = ["mobilevit_s_exbase", "exmobilevit_576", "exmobilevit_640", "exmobilevit_928"]


def randomize(model: nn.Module) -> nn.Module:
    """Weights and BatchNorm statistics with nothing left at 0 or 1, in eval mode; activations stay near 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=1.4 / parameter[0].numel() ** 0.5, generator=generator)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_official_weights_give_official_logits_and_maps(name: str, fused: bool) -> None:
    weights, golden, meta = load_golden(name)
    config = meta["cfg"]
    converted = convert(weights, config)
    model = ExMobileViT(**converted.kwargs).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    if fused:
        model.fuse_()
    means: dict[str, Tensor] = {}
    taps = {"conv1": model.backbone.stem, **{f"mvit.{i}": model.backbone.stages[i + 2] for i in range(3)}}
    taps |= dict(zip(("conv2", "conv2_2", "conv2_1"), reversed(model.shortcut.convs), strict=False))
    for key, module in taps.items():
        module.register_forward_hook(lambda _m, _i, out, key=key: means.update({key: out.mean((2, 3))}))

    torch.testing.assert_close(model(golden["input"]), golden["logits"], atol=1e-4, rtol=0)
    pooled = model.forward_head(model.forward_features(golden["input"]), pre_logits=True)
    torch.testing.assert_close(pooled, golden["pooled"], atol=1e-4, rtol=0)
    expected = {key.removeprefix("tapmean/") for key in golden if key.startswith("tapmean/")}
    assert expected == means.keys()
    for key in expected:
        torch.testing.assert_close(means[key], golden[f"tapmean/{key}"], atol=1e-4, rtol=0)


@torch.no_grad()
def test_published_640_gives_official_logits() -> None:
    fill, golden = fill_module("fill_revit_exmobilevit"), np.load(GOLDEN_FOLDER / "full_exmobilevit_640.npz")
    keys = official_keys("exmobilevit_640")
    weights = {key: torch.from_numpy(np.asarray(fill.value(key, shape))) for key, shape in keys.items()}
    converted = convert(weights, None)
    model = ExMobileViT(**converted.kwargs).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    features = model.forward_features(fill.image("exmobilevit_640", 2, 256))
    pooled = model.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pooled, torch.from_numpy(golden["pooled"]), atol=1e-4, rtol=0)
    logits = torch.from_numpy(golden["logits"])
    torch.testing.assert_close(model.forward_head(features), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("mobilevit_s_exbase", 5_636_720, 1.7601e9),
        ("exmobilevit_576", 5_558_256, 1.7636e9),
        ("exmobilevit_640", 5_630_576, 1.7658e9),
        ("exmobilevit_928", 5_958_064, 1.7782e9),
    ],
)
def test_parameters_and_macs_are_those_of_the_authors(name: str, params: int, macs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == params == PAPER[name].params
    assert count_macs(model, (256, 256)) == pytest.approx(macs, rel=1e-3)
    assert PAPER[name].macs == pytest.approx(macs / 1e9, rel=1e-9)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoint_is_recognised_from_its_shapes(name: str) -> None:
    weights = {key: torch.empty(shape, device="meta") for key, shape in official_keys(name).items()}
    converted = convert(weights, None)
    with torch.device("meta"):
        official, ours = ExMobileViT(**converted.kwargs), timm.create_model(name)
    assert {k: v.shape for k, v in converted.state_dict.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert official.taps == ours.taps


def test_wrong_checkpoint_lists_unknown_missing_and_misshapen_keys() -> None:
    weights, _, meta = load_golden("exmobilevit_576_small")
    config = meta["cfg"]
    weights["stray.weight"] = torch.zeros(1)
    weights["mvit.1.conv4.1.bias"] = torch.zeros(3)
    del weights["mv2.3.conv.4.running_var"]
    with pytest.raises(CheckpointError) as caught:
        convert(weights, config)
    message = str(caught.value)
    assert "unknown stray.weight" in message
    assert "missing mv2.3.conv.4.running_var" in message
    assert "mvit.1.conv4.1.bias has shape (3,), expected (20,)" in message
    assert "\n" not in message


@pytest.mark.parametrize("key", ["conv1.0.weight", "mvit.2.conv2.0.weight", "conv2_1.0.weight", "fc.weight"])
def test_checkpoint_without_a_weight_that_sets_a_width_names_it(key: str) -> None:
    weights, _, _ = load_golden("exmobilevit_576_small")
    del weights[key]
    with pytest.raises(CheckpointError, match=f"missing {key}"):
        convert(weights, None)


def test_checkpoint_of_another_shape_than_its_config_is_refused() -> None:
    weights, _, meta = load_golden("mobilevit_s_base_small")
    config = meta["cfg"]
    with pytest.raises(CheckpointError, match=r"dims is .*24, 32, 40.* in the weights"):
        convert(weights, {**config, "dims": [144, 192, 240]})


def test_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"missing conv1\.0\.weight"):
        convert({"blocks.0.weight": torch.zeros(1)}, None)


def defined_logits(model: ExShortcutNet, maps: list[Tensor]) -> Tensor:
    """The equation of the paper, with torch's own pooling."""
    scales = [F.adaptive_avg_pool2d(conv(x), 1).flatten(1) for conv, x in zip(model.shortcut.convs, maps, strict=True)]
    return F.linear(torch.cat(scales, dim=1), model.fc.weight)


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (37, 51)])
@torch.no_grad()
def test_global_pool_is_the_equation_of_the_paper(size: tuple[int, int]) -> None:
    model = randomize(timm.create_model("exmobilevit_micro", num_classes=10))
    x = images(2, *size)
    maps = model.forward_intermediates(x, indices=3, intermediates_only=True)
    torch.testing.assert_close(model(x), defined_logits(model, maps), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_official_pool_reads_the_corner_of_the_early_maps_only() -> None:
    model = randomize(ExMobileViT(pool="official", channels=(8, 8, 16), num_classes=10))
    maps = [torch.randn(1, c, s, s) for c, s in ((96, 32), (128, 16), (160, 8))]
    changed = [x.clone() for x in maps]
    changed[0][:, :, 25:] += 1
    changed[1][:, :, :, 9:] += 1
    first, second = (model.forward_head(model.shortcut(x, "avg")) for x in (maps, changed))
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    changed[1][:, :, 8, 8] += 1
    assert not torch.allclose(first, model.forward_head(model.shortcut(changed, "avg")))


def test_official_pool_takes_256_px_only() -> None:
    model = timm.create_model("exmobilevit_576", pool="official", num_classes=10).eval()
    with pytest.raises(ShapeError, match="25x25 corner of a 32x32 map, found a map of 28x28"):
        model(torch.zeros(1, 3, 224, 224))
    with pytest.raises(ConfigError, match="img_size is 224"):
        timm.create_model("exmobilevit_576", pool="official", img_size=224)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"pool": "corner"}, "pool is 'corner'"),
        ({"global_pool": "token"}, "global_pool is 'token'"),
        ({"global_pool": ""}, "with 10 classes"),
        ({"channels": (8, 8, 0)}, "the last above 0"),
        ({"channels": (8,) * 6}, "has 5 scales"),
        ({"channels": (-1, 8)}, "has 5 scales"),
    ],
)
def test_wrong_argument_is_named(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        timm.create_model("exmobilevit_micro", **kwargs)


def test_unfold_puts_each_position_of_the_patches_into_one_sequence() -> None:
    x = torch.randn(2, 3, 6, 8)
    tokens = unfold(x).reshape(2, 4, 12, 3)
    expected = F.unfold(x, kernel_size=2, stride=2).reshape(2, 3, 4, 12).permute(0, 2, 3, 1)
    torch.testing.assert_close(tokens, expected, atol=0, rtol=0)
    torch.testing.assert_close(fold(unfold(x), (6, 8)), x, atol=0, rtol=0)


@pytest.mark.parametrize("size", [(7, 7), (8, 5), (1, 2)])
@torch.no_grad()
def test_map_with_an_odd_side_is_resized_to_even_and_back(size: tuple[int, int]) -> None:
    block = randomize(timm.create_model("exmobilevit_micro")).backbone.stages[2][1]
    x = torch.randn(2, 32, *size)
    even = tuple(side + side % 2 for side in size)
    y = F.interpolate(block.conv_1x1(block.conv_kxk(x)), even, mode="bilinear", align_corners=False)
    tokens = F.unfold(y, 2, stride=2).reshape(2, 48, 4, -1).permute(0, 2, 3, 1).flatten(0, 1)
    tokens = block.transformer(tokens).unflatten(0, (2, 4)).permute(0, 3, 1, 2).flatten(1, 2)
    y = F.interpolate(F.fold(tokens, even, 2, stride=2), size, mode="bilinear", align_corners=False)
    expected = block.conv_fusion(torch.cat([block.conv_proj(y), x], dim=1))
    torch.testing.assert_close(block(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["exmobilevit_micro", "mobilevitv2_050_exshortcut"])
@torch.no_grad()
def test_fused_model_gives_the_same_logits_without_batch_norm(name: str) -> None:
    model = randomize(timm.create_model(name, num_classes=10)).train()
    x = images(2, 64, 64)
    expected = model.eval()(x)
    assert expected.std() > 0.1
    model.train().fuse_()
    assert not model.training
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.fuse_()(x), expected, atol=1e-4, rtol=0)


def test_drop_path_grows_with_depth_over_all_transformers() -> None:
    with torch.device("meta"):
        model = timm.create_model("exmobilevit_640", drop_path_rate=0.8)
    rates = [getattr(m.drop_path, "drop_prob", 0.0) for m in model.modules() if hasattr(m, "drop_path")]
    assert rates == pytest.approx([0.1 * i for i in range(9)])


def test_pruned_model_keeps_what_its_maps_need_only() -> None:
    features = timm.create_model("exmobilevit_micro", features_only=True, out_indices=(1, 2))
    x = images()
    assert [tuple(y.shape[1:]) for y in features(x)] == [(24, 16, 16), (32, 8, 8)]
    sum(y.square().mean() for y in features(x)).backward()
    assert all(parameter.grad is not None for parameter in features.parameters())
    assert len(features.model.backbone.stages) == 3


def test_stop_early_ends_at_the_last_map_chosen() -> None:
    model = timm.create_model("exmobilevit_micro").eval()
    x = images()
    last, maps = model.forward_intermediates(x, indices=[0, 2], stop_early=True)
    assert last is maps[1]
    assert [y.shape[1] for y in maps] == [16, 32]


def test_compilation_is_per_image_size() -> None:
    torch._dynamo.reset()
    model = timm.create_model("exmobilevit_micro", num_classes=10).eval()
    shapes = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, Tensor) and x.ndim == 4])
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for side in (32, 28):
        x = images(2, side, side)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    assert [all(isinstance(side, int) for side in shape[-1]) for shape in shapes] == [True, True]


FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "efficientformer_l1": ({}, 224),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 1, 2, 2)},
        64,
    ),
    "convnext_atto": ({}, 64),
    "resnet10t": ({}, 65),
}


def as_nchw(x: Tensor, channels: int) -> Tensor:
    """A stage's output as a map: from tokens (B, N, C) of a square map, from (B, H, W, C), or as it is."""
    if x.ndim == 3:
        x = x.unflatten(1, (int(x.shape[1] ** 0.5), -1))
    return x if x.shape[1] == channels else x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_exshortcut_on_another_family_is_the_equation_on_its_features(name: str) -> None:
    kwargs, size = FAMILIES[name]
    source = randomize(timm.create_model(name, num_classes=10, **kwargs))
    weights = {key: value.clone() for key, value in source.state_dict().items()}
    maps: list[Tensor] = []
    for info in source.feature_info[-3:]:
        stage = source.get_submodule(info["module"])
        stage.register_forward_hook(lambda _m, _i, out, width=info["num_chs"]: maps.append(as_nchw(out, width)))
    x = images(2, size, size)
    source(x)
    expected = maps[:]

    model = add_exshortcut(source, (8, 16, 32)).eval()
    logits = model(x)
    assert logits.shape == (2, 10)
    torch.testing.assert_close(logits, defined_logits(model, expected), atol=1e-4, rtol=1e-4)
    kept = model.backbone.state_dict()
    assert all(torch.equal(kept[key], weights[key]) for key in kept)


@pytest.mark.parametrize("name", FAMILIES)
def test_exshortcut_on_another_family_trains_every_parameter_in_order(name: str) -> None:
    kwargs, size = FAMILIES[name]
    with torch.device("meta"):
        model = add_exshortcut(timm.create_model(name, **kwargs), (8, 16, 32), num_classes=5)
        model(torch.empty(2, 3, size, size)).sum().backward()
    # timm before 1.0.31 leaves the norm of a head that it takes away.
    left = {key for key, p in model.named_parameters() if p.grad is None}
    assert left <= ({"backbone.head.norm.weight", "backbone.head.norm.bias"} if OLDER_TIMM else set())
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    backbone = [group for key, group in groups.items() if key.startswith("backbone.") and key not in left]
    head = {group for key, group in groups.items() if not key.startswith("backbone.")}
    assert len(head) == 1
    assert max(backbone) < max(head)
    assert len(set(backbone)) >= 5
    assert all(key in groups for key in model.no_weight_decay() if not key.endswith("relative_position_index"))


def test_exshortcut_on_a_backbone_with_a_function_for_groups() -> None:
    with torch.device("meta"):
        model = add_exshortcut(timm.create_model("cait_xxs24_224"), (8, 16, 32))
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["fc.weight"] == max(groups.values()) > groups["backbone.blocks.3.attn.qkv.weight"]


def test_exshortcut_leaves_out_a_scale_of_0_channels() -> None:
    model = add_exshortcut(timm.create_model("resnet10t", num_classes=7), (16, 0, 32), drop_rate=0.1)
    assert model.taps == [2, 4]
    assert model.num_features == 48
    assert model(images(2, 64, 64)).shape == (2, 7)
    assert model.pretrained_cfg["first_conv"].startswith("backbone.")
    assert model.pretrained_cfg["classifier"] == "fc"


def test_exshortcut_refuses_a_model_without_intermediate_maps() -> None:
    with pytest.raises(ConfigError, match="without features_only"):
        add_exshortcut(timm.create_model("resnet10t", features_only=True), (8, 8, 8))


def test_exshortcut_refuses_more_scales_than_the_model_has() -> None:
    with pytest.raises(ConfigError, match="has 5 scales"):
        add_exshortcut(timm.create_model("resnet10t"), (8,) * 6)


def test_registered_names_are_those_of_the_specification() -> None:
    registered = set(leanvit.models.exmobilevit.VARIANTS)
    assert {*PUBLISHED, "exmobilevit_micro", "mobilevitv2_050_exshortcut"} == registered
    assert set(PUBLISHED) == PAPER.keys()
    for name in registered:
        assert timm.is_model(name)
