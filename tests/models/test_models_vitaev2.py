"""ViTAEv2 against the authors' program, a slow float64 form of the paper at any size, and its own options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batches import images
from common import GOLDEN_FOLDER
from leanvit.errors import CheckpointError, ConfigError, ShapeError
from leanvit.models import _cells, count_macs, vitaev2
from leanvit.models._convert_vitae import _authors_names, convert
from leanvit.models.vitaev2 import PAPER, VARIANTS, ViTAEv2, WindowAttention
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

REDUCED, RELATIVE = "vitaev2_64", "vitaev2_relpos_64"


class SlowViTAEv2(Slow):
    """ViTAEv2: logits and tokens by cell."""

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        found = {}
        x = image.double()
        for layer, ratio in enumerate(self.config["downsample_ratios"]):
            windowed = self.config["RC_tokens_type"][layer] == "window"
            name = f"layers.{layer}.RC"
            tokens, grid = self.prm(x, f"{name}.PRM.convs", ratio)
            normed = self.norm(tokens, f"{name}.attn.norm1", 1e-5)
            y = self.attend(normed, grid, f"{name}.attn.attn", self.config["RC_heads"][layer], windowed, skip=True)
            strides = {4: (2, 2, 1), 2: (2, 1, 1)}[ratio]
            y = y + self.sequence(x, f"{name}.PCM", strides, final=False)
            normed = self.norm(y, f"{name}.attn.norm2", 1e-5)
            tokens = y + self.mlp(normed, f"{name}.attn.mlp.fc1", f"{name}.attn.mlp.fc2")
            found[f"feat.rc{layer}"] = tokens
            for cell in range(self.config["NC_depth"][layer]):
                name = f"layers.{layer}.NC.{cell}"
                as_image = tokens.transpose(1, 2).unflatten(2, grid)
                normed = self.norm(tokens, f"{name}.norm1", 1e-6)
                heads = self.config["NC_heads"][layer]
                y = tokens + self.attend(normed, grid, f"{name}.attn", heads, windowed, skip=False)
                y = y + self.sequence(as_image, f"{name}.PCM", (1, 1, 1), final=False)
                tokens = y + self.mlp(self.norm(y, f"{name}.norm2", 1e-6), f"{name}.mlp.fc1", f"{name}.mlp.fc2")
            found[f"feat.stage{layer}"] = tokens
            x = tokens.transpose(1, 2).unflatten(2, grid)
        found["logits"] = self.linear(tokens.mean(1), "head")
        return found

    def attend(self, x: Tensor, grid: tuple[int, int], name: str, heads: int, windowed: bool, skip: bool) -> Tensor:
        if not windowed:
            out, v = self.attention(x, name, heads)
            return out + v if skip else out
        (height, width), size = grid, self.config["window_size"]
        top, left = (-height % size) // 2, (-width % size) // 2
        bias = self.relative_bias(name, size)
        out = torch.zeros(x.shape[0], height, width, self.weights[f"{name}.proj.weight"].shape[0]).double()
        x = x.unflatten(1, grid)
        for row in range(-top, height, size):
            for column in range(-left, width, size):
                ys, xs = range(row, row + size), range(column, column + size)
                inside = [(i, y, c) for i, (y, c) in enumerate((y, c) for y in ys for c in xs)]
                inside = [(i, y, c) for i, y, c in inside if 0 <= y < height and 0 <= c < width]
                window = torch.zeros(x.shape[0], size * size, x.shape[-1]).double()
                for i, y, c in inside:
                    window[:, i] = x[:, y, c]
                window, _ = self.attention(window, name, heads, bias)
                for i, y, c in inside:
                    out[:, y, c] = window[:, i]
        return out.flatten(1, 2)

    def relative_bias(self, name: str, size: int) -> Tensor | None:
        """(heads, w w, w w), pair by pair."""
        if (table := self.weights.get(f"{name}.relative_position_bias_table")) is None:
            return None
        places = [(y, x) for y in range(size) for x in range(size)]
        rows = [[(y - v + size - 1) * (2 * size - 1) + x - u + size - 1 for v, u in places] for y, x in places]
        return table[torch.tensor(rows)].permute(2, 0, 1)


@pytest.mark.parametrize("name", [REDUCED, RELATIVE])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_official_weights_give_official_logits_and_features(name: str, fused: bool) -> None:
    _, golden, _ = load_golden(name)
    model = official(name, ViTAEv2)
    if fused:
        model.fuse_()
    x = golden["input"]
    torch.testing.assert_close(model(x), golden["logits"], **CLOSE)
    features, maps = model.forward_intermediates(x)
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), golden["feat.pooled"], **CLOSE)
    for index, stage in enumerate(maps):
        torch.testing.assert_close(stage.flatten(2).transpose(1, 2), golden[f"feat.stage{index}"], **CLOSE)
    found = tokens_by_cell(model, x)
    assert found.keys() == {key for key in golden if key.startswith("feat.") and key != "feat.pooled"}
    for key, tokens in found.items():
        torch.testing.assert_close(tokens, golden[key], **CLOSE)


@pytest.mark.parametrize("name", [REDUCED, RELATIVE])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_the_official_ones(name: str, recompute: bool) -> None:
    model = official(name, ViTAEv2)
    model.set_grad_checkpointing(recompute)
    check_gradients(model, name)


@torch.no_grad()
def test_published_small_gives_official_logits_and_features() -> None:
    golden = np.load(GOLDEN_FOLDER / "full_ViTAEv2_S.npz")
    converted = convert(filled_official("vitaev2_small"))
    model = ViTAEv2(**converted.kwargs).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    x = torch.from_numpy(fill_module("fill_vitae").input_array(*golden["input_shape"]))
    check_published_stages(tokens_by_cell(model, x), golden)
    for form in (model, model.fuse_()):
        torch.testing.assert_close(form(x), torch.from_numpy(golden["logits"]), **CLOSE)
        torch.testing.assert_close(form(x).double(), torch.from_numpy(golden["logits_f64"]), **CLOSE)


@pytest.mark.parametrize("name", [REDUCED, RELATIVE])
@torch.no_grad()
def test_slow_form_gives_official_logits(name: str) -> None:
    weights, golden, config = load_golden(name)
    for key, value in SlowViTAEv2(weights, config)(golden["input"]).items():
        torch.testing.assert_close(value.float(), golden[key], **CLOSE)


@pytest.mark.parametrize("name", [REDUCED, RELATIVE])
@pytest.mark.parametrize("size", [(64, 96), (96, 160), (32, 32), (128, 32), (56, 84), (100, 68)])
@torch.no_grad()
def test_four_stages_are_right_at_any_size(name: str, size: tuple[int, int]) -> None:
    """Also where neither a window nor 32 divides the map: what reaches the edge are zeros behind the norm."""
    weights, _, config = load_golden(name)
    model, x = official(name, ViTAEv2), images(2, *size)
    expected = SlowViTAEv2(weights, config)(x)
    torch.testing.assert_close(model(x).double(), expected["logits"], **CLOSE)
    for key, tokens in tokens_by_cell(model, x).items():
        torch.testing.assert_close(tokens.double(), expected[key], **CLOSE)


@pytest.mark.parametrize("size", [(64, 96), (96, 160), (61, 50), (33, 35), (3, 1)])
@torch.no_grad()
def test_backbone_has_true_strides_and_batches_do_not_matter(size: tuple[int, int]) -> None:
    backbone = timm.create_model("vitaev2_small", features_only=True).eval()
    x = images(2, *size)
    maps = backbone(x)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert backbone.feature_info.channels() == [64, 128, 256, 512]
    for stage, stride, width in zip(maps, (4, 8, 16, 32), (64, 128, 256, 512), strict=True):
        assert stage.shape == (2, width, -(-size[0] // stride), -(-size[1] // stride))
        assert stage.is_contiguous(memory_format=torch.channels_last)
    for alone, together in zip(backbone(x[1:]), maps, strict=True):
        torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_images_that_four_does_not_divide_are_padded_below_and_to_the_right() -> None:
    model, x = official(REDUCED, ViTAEv2), images(2, 61, 50)
    torch.testing.assert_close(model(x), model(F.pad(x, (0, 2, 0, 3))), atol=1e-6, rtol=0)
    with pytest.raises(ShapeError, match=r"expected \(B, 3, H, W\)"):
        model(torch.zeros(1, 1, 32, 32))


@pytest.mark.parametrize("name", PAPER)
def test_parameters_and_macs_are_those_of_the_paper(name: str) -> None:
    paper = {
        "vitaev2_small": (19_355_688, 5.753),
        "vitaev2_48m": (48_674_632, 13.34),
        "vitaev2_base": (89_693_352, 24.37),
    }
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == paper[name][0] == PAPER[name].params
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(paper[name][1], rel=1e-3)
    assert PAPER[name].macs == paper[name][1]


@pytest.mark.parametrize(("size", "macs"), [(448, 25.22), (896, 136.3)])
def test_macs_at_high_resolution_are_those_of_the_paper(size: int, macs: float) -> None:
    with torch.device("meta"):
        model = timm.create_model("vitaev2_small")
    assert count_macs(model, (size, size)) / 1e9 == pytest.approx(macs, rel=1e-3)


@torch.no_grad()
def test_windows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    attention = WindowAttention(16, 16, num_heads=2, window_size=4, relative_position=True)
    x = torch.randn(1, 8 * 12, 16)
    changed = x.clone().unflatten(1, (8, 12))
    changed[:, 4:, :4] += 1.0
    difference = (attention(changed.flatten(1, 2), (8, 12)) - attention(x, (8, 12))).abs().amax(-1)
    touched = difference.view(8, 12) > 1e-6
    expected = torch.zeros(8, 12, dtype=torch.bool)
    expected[4:, :4] = True
    assert torch.equal(touched, expected)


@torch.no_grad()
def test_attention_written_out_is_the_fused_one() -> None:
    for name in (REDUCED, RELATIVE):
        model, x = official(name, ViTAEv2), images(2, 64, 72)
        before = model(x)
        for module in model.modules():
            if isinstance(module, _cells.Attention):
                assert module.fused_attn
                module.fused_attn = False
        torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)


def test_reduction_cells_have_options_of_their_own() -> None:
    model = ViTAEv2(
        window_size=8, drop_path_rate=0.3, proj_drop_rate=0.2, reduction_drop_rate=0.15, relative_position=True
    )
    cell, normal = model.stages[0].reduction, model.stages[0].blocks[0]
    assert (cell.attn.window_size, normal.attn.window_size) == (7, 8)
    assert (cell.attn.proj_drop.p, normal.attn.proj_drop.p) == (0.15, 0.2)
    assert isinstance(cell.drop_path, nn.Identity)
    rates = [getattr(block.drop_path2, "drop_prob", 0.0) for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.3 * i / 13 for i in range(14)])
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) == 6
    assert model.no_weight_decay() == tables


@torch.no_grad()
def test_autocast_takes_relative_positions_along() -> None:
    _, golden, _ = load_golden(RELATIVE)
    model = official(RELATIVE, ViTAEv2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(golden["input"])
    assert (low.float() - golden["logits"]).abs().amax() < 0.05 * golden["logits"].abs().amax()


@torch.no_grad()
def test_fuse_folds_every_batch_norm_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vitaev2_micro", num_classes=10).eval()
    random_norms(model)
    x = images(2, 40, 28)
    before = model(x)
    assert model.fuse_() is model
    assert not [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    torch.testing.assert_close(model(x), before, atol=1e-5, rtol=0)


@torch.no_grad()
def test_inference_in_pieces_gives_the_same_and_overwrites_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = official(REDUCED, ViTAEv2), images(3, 64, 72)
    with torch.enable_grad():
        expected = model(x)
        maps = model.forward_intermediates(x, intermediates_only=True)
    for module in (_cells, vitaev2):
        monkeypatch.setattr(module, "CACHE_TOKENS", 50)
    monkeypatch.setattr(_cells, "MANY_TOKENS", 2)
    kept: list[tuple[Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, _cells.Attention | _cells.ParallelConv):
            module.register_forward_hook(lambda _m, _i, out: kept.append((out, out.clone())))
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)
    for piecewise, whole in zip(model.forward_intermediates(x, intermediates_only=True), maps, strict=True):
        torch.testing.assert_close(piecewise, whole, atol=1e-5, rtol=0)
    assert kept
    for out, copy in kept:
        assert torch.equal(out, copy)


@torch.no_grad()
def test_convolutions_in_bands_of_rows_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = timm.create_model("vitaev2_micro", num_classes=10).eval(), images(2, 96, 160)
    random_norms(model)
    whole = model(x)
    bands: list[int] = []
    band = _cells.ParallelConv._band

    def counted(self: _cells.ParallelConv, image: Tensor, start: int, stop: int, heights: Sequence[int]) -> Tensor:
        bands.append(stop - start)
        return band(self, image, start, stop, heights)

    monkeypatch.setattr(_cells.ParallelConv, "_band", counted)
    monkeypatch.setattr(_cells, "CACHE_BYTES", 1 << 12)
    torch.testing.assert_close(model(x), whole, atol=1e-5, rtol=0)
    assert len(bands) > len(model.stages)


@torch.no_grad()
def test_batch_norm_in_training_mode_sees_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(4, 32, 32)
    models = [timm.create_model("vitaev2_micro", num_classes=10).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    whole = models[0](x)
    monkeypatch.setattr(_cells, "CACHE_TOKENS", 1)
    torch.testing.assert_close(models[1](x), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_exported_graph_takes_any_batch() -> None:
    model = official(RELATIVE, ViTAEv2).fuse_()
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(model, (images(2, 64, 96),), dynamic_shapes=({0: batch},), strict=False)
    operations = {str(node.target) for node in program.graph.nodes}
    assert not [name for name in operations if name.endswith("_.default") or "split" in name]
    for size in (1, 3):
        x = images(size, 64, 96)
        torch.testing.assert_close(program.module()(x), model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", PAPER)
def test_converter_reads_published_networks_from_their_shapes(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    authors = _authors_names(model, 0)
    state = {f"{authors[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": t for n, t in model.state_dict().items()}
    state["layers.0.RC.attn.attn.relative_position_index"] = torch.zeros(49, 49, dtype=torch.int64)
    converted = convert(state)
    with torch.device("meta"):
        again = ViTAEv2(**converted.kwargs)
    again.load_state_dict(converted.state_dict, strict=True)
    for ours, read in zip(model.modules(), again.modules(), strict=True):
        if isinstance(ours, _cells.Attention):
            assert (ours.num_heads, ours.value_skip, type(ours)) == (read.num_heads, read.value_skip, type(read))


def test_converter_lists_problems() -> None:
    weights, _, config = load_golden(REDUCED)
    with pytest.raises(CheckpointError, match=r"NC_tokens_type is .*expected \['window', 'window', 'transformer'"):
        convert(weights, {**config, "NC_tokens_type": "window"})
    with pytest.raises(CheckpointError, match="relative_pos is False in the weights, True in the config"):
        convert(weights, {**config, "relative_pos": True})
    with pytest.raises(CheckpointError, match="no published ViTAEv2 has token widths"):
        convert(weights)
    weights["layers.1.NC.0.PCM.9.weight"] = torch.zeros(1)
    del weights["layers.3.NC.0.PCM.4.running_var"]
    with pytest.raises(CheckpointError, match=r"missing layers\.3\.NC\.0\.PCM\.4\.running_var.*PCM\.9\.weight"):
        convert(weights, config)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attention": ("window", "window", "full", "linear")}, "attention is 'linear'"),
        ({"global_pool": "token"}, "global_pool is 'token'"),
        ({"reduction_heads": (1, 1, 2)}, "reduction_heads has 3 entries, expected 4"),
        ({"ratios": (8, 2, 2, 2)}, "ratio is 8, expected one of"),
    ],
)
def test_wrong_options_are_named(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViTAEv2(**kwargs)


def test_preprocessing_is_stated() -> None:
    for name in VARIANTS:
        cfg = timm.get_pretrained_cfg(name)
        with torch.device("meta"):
            model = timm.create_model(name)
        found = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3}
        assert set(cfg.first_conv) == found
        assert cfg.classifier == "head"
