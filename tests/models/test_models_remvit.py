"""ReMViTv2 against the authors' program, and on grids that theirs can't take."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from batches import images
from leanvit.errors import CheckpointError, ConfigError, ShapeError
from leanvit.models import _pooling_history, count_macs, remvit
from leanvit.models._convert_remvit import convert
from leanvit.models._pooling_attention import Carried, relative_index, resize_logits
from leanvit.models._pooling_history import PoolingHistory
from leanvit.models.remvit import PAPER, ReMViT
from official import load_golden

CLOSE = {"atol": 1e-4, "rtol": 0}


def micro(**kwargs: object) -> ReMViT:
    generator = torch.Generator().manual_seed(0)
    model = timm.create_model("remvitv2_micro", num_classes=10, **kwargs).eval()
    for name, parameter in model.named_parameters():
        if name == "alpha":
            parameter.data.uniform_(0.2, 0.8, generator=generator)
        elif "norm" not in name:
            parameter.data.normal_(std=0.15 if parameter.ndim > 1 else 0.05, generator=generator)
    return model


@pytest.mark.parametrize("memory", ["quadratic", "linear"])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_official_weights_give_official_logits_and_scores(fused: bool, memory: str) -> None:
    weights, golden, meta = load_golden("remvitv2_small")
    converted = convert(weights, meta)
    model = ReMViT(**converted.kwargs, attention_memory=memory).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    if fused:
        model.fuse_()
    tokens, scores = model.forward_features(golden["input"], return_attention=True)
    torch.testing.assert_close(model(golden["input"]), golden["logits"], **CLOSE)
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), golden["pooled"], **CLOSE)
    assert len(scores) == 6
    for layer, score in enumerate(scores):
        torch.testing.assert_close(score, golden[f"scores/{layer}"], **CLOSE)


@pytest.mark.parametrize("mode", ["learned", "per_layer", "fixed", "none"])
@pytest.mark.parametrize("block_bytes", [16 << 20, 4096])
def test_linear_memory_gives_the_same_logits_and_gradients(
    mode: str, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_pooling_history, "BLOCK_BYTES", block_bytes)
    # Grids of odd sides, whose last cells are incomplete, in float64, where only a mistake is larger than 1e-9.
    model, x = micro(alpha=mode).double(), images(2, 45, 70).double()

    def run(memory: str) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        model.set_attention_memory(memory)
        model.zero_grad()
        logits = model(x)
        logits.square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            scores = model.forward_features(x, return_attention=True)[1]
        return logits.detach(), gradients, scores

    quadratic, linear = run("quadratic"), run("linear")
    torch.testing.assert_close(linear[0], quadratic[0], atol=1e-9, rtol=0)
    assert linear[1].keys() == quadratic[1].keys()
    for name, expected in quadratic[1].items():
        torch.testing.assert_close(linear[1][name], expected, atol=1e-9, rtol=0)
    assert len(linear[2]) == len(quadratic[2]) == 5
    for found, expected in zip(linear[2], quadratic[2], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


@torch.no_grad()
def test_large_images_carry_no_logits_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = micro(), images(1, 64, 96)
    # 32 x 48 queries by 8 x 12 keys of 4 bytes, in one head.
    for limit, linear in ((32 * 48 * 96 * 4 - 1, True), (32 * 48 * 96 * 4, False)):
        monkeypatch.setattr(remvit, "LINEAR_FROM_BYTES", limit)
        assert isinstance(model._start((32, 48), x), PoolingHistory) is linear
    with torch.enable_grad():
        monkeypatch.setattr(remvit, "LINEAR_FROM_BYTES", 0)
        assert model._start((32, 48), x) is None


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_traced_programs_hold_whole_logits() -> None:
    model, x = micro(attention_memory="linear"), images(1, 64, 96)
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), model(x), atol=1e-5, rtol=0)


def test_another_attention_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match="attention_memory is 'small', expected 'auto', 'quadratic' or 'linear'"):
        micro(attention_memory="small")


def test_converter_reads_networks_from_their_shapes() -> None:
    weights, _, meta = load_golden("remvitv2_small")
    assert convert(weights).kwargs == convert(weights, meta).kwargs
    with torch.device("meta"):
        state = timm.create_model("remvitv2_tiny").state_dict()
    kwargs = convert({k.replace("head.", "head.projection."): v for k, v in state.items()}).kwargs
    expected = {"embed_dim": 96, "depths": (1, 2, 5, 2), "num_heads": 1, "img_size": 224, "num_classes": 1000}
    assert {key: kwargs[key] for key in expected} == expected


def test_converter_lists_problems() -> None:
    weights, _, meta = load_golden("remvitv2_small")
    del weights["norm.bias"]
    weights["odd"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"unknown keys \['odd'\]; missing keys \['norm\.bias'\]"):
        convert(weights, meta)
    with pytest.raises(CheckpointError, match="head_mul"):
        convert(weights, {**meta["cfg"], "head_mul": [[1, 2.0]]})
    with pytest.raises(CheckpointError, match="pool_q_stride"):
        convert(weights, {**meta["cfg"], "pool_q_stride": [[0, 2, 2]]})


def test_parameters_and_macs_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        model = timm.create_model("remvitv2_tiny")
    assert sum(p.numel() for p in model.parameters()) == PAPER["remvitv2_tiny"].params == 24_173_321
    assert count_macs(model, (224, 224)) / 1e9 == pytest.approx(4.68, rel=1e-3)


def test_resizing_follows_the_authors_on_square_grids() -> None:
    logits = torch.randn(2, 2, 64, 16)
    mean = logits.mean(1, keepdim=True)
    found = resize_logits(Carried(logits, (8, 8), (4, 4)), 4, (4, 4), (8, 8))
    assert found.shape == (2, 1, 16, 64)
    pooled = F.avg_pool2d(mean.permute(0, 1, 3, 2).reshape(32, 1, 8, 8), 2).reshape(2, 1, 16, 16)
    pooled = pooled.transpose(2, 3)
    expected = pooled.reshape(2, 1, 16, 4, 4).repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(found, expected.reshape(2, 1, 16, 64))
    fewer_keys = resize_logits(Carried(logits, (8, 8), (4, 4)), 2, (8, 8), (2, 2))
    expected = F.avg_pool2d(logits.reshape(256, 1, 4, 4), 2).reshape(2, 2, 64, 4)
    torch.testing.assert_close(fewer_keys, expected)


def test_resizing_keeps_neighbours_on_odd_grids() -> None:
    logits = torch.arange(15.0).reshape(1, 1, 15, 1)
    pooled = resize_logits(Carried(logits, (5, 3), (1, 1)), 1, (3, 2), (1, 1)).flatten()
    assert pooled.tolist() == [2.0, 3.5, 8.0, 9.5, 12.5, 14.0]
    keys = torch.arange(6.0).reshape(1, 1, 1, 6)
    spread = resize_logits(Carried(keys, (1, 1), (3, 2)), 1, (1, 1), (5, 4)).reshape(5, 4)
    assert spread[:, 0].tolist() == [0.0, 0.0, 2.0, 2.0, 4.0]
    assert spread[0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_relative_index_spreads_the_smaller_grid() -> None:
    assert relative_index(2, 2).tolist() == [[1, 0], [2, 1]]
    assert relative_index(2, 4).tolist() == [[3, 2, 1, 0], [5, 4, 3, 2]]
    assert relative_index(4, 2).tolist() == [[2, 0], [3, 1], [4, 2], [5, 3]]


@torch.no_grad()
def test_without_residual_it_is_timm_s_mvitv2() -> None:
    """alpha = "none" against timm's own MViTv2, weights mapped by name."""
    torch.manual_seed(0)
    plain = timm.create_model("remvitv2_tiny", alpha="none", num_classes=10).eval()
    theirs = timm.create_model("mvitv2_tiny", num_classes=10).eval()
    for parameter in plain.parameters():
        parameter.normal_(std=0.05)
    names = {}
    block = 0
    for stage, depth in enumerate(plain.depths):
        for index in range(depth):
            names[f"blocks.{block}."] = f"stages.{stage}.blocks.{index}."
            block += 1
    state = {}
    for key, value in plain.state_dict().items():
        for ours, their in names.items():
            if key.startswith(ours):
                key = (their + key[len(ours) :]).replace(".proj.", ".shortcut_proj_attn.", 1)
                key = key.replace("attn.shortcut_proj_attn.", "attn.proj.")
                break
        state[key.replace("head.", "head.fc.") if key.startswith("head.") else key] = value
    theirs.load_state_dict(state, strict=True)
    x = images(1, 224, 224)
    torch.testing.assert_close(plain(x), theirs(x), **CLOSE)


@torch.no_grad()
def test_any_size_and_shape_of_image() -> None:
    model = micro()
    for height, width in [(32, 32), (33, 47), (5, 9), (1, 1), (28, 64), (20, 8)]:
        maps = model.forward_intermediates(images(1, height, width), intermediates_only=True)
        rows, columns = -(-height // 2), -(-width // 2)
        for stage, found in enumerate(maps):
            assert found.shape == (1, 32 * 2**stage, -(-rows // 2**stage), -(-columns // 2**stage))
        assert model(images(1, height, width)).isfinite().all()
    with pytest.raises(ShapeError, match="0 x 32"):
        model(torch.empty(1, 3, 0, 32))


@torch.no_grad()
def test_transposed_images_and_tables_give_the_same_logits() -> None:
    """Rows and columns are treated alike: transposing image, kernels and tables changes nothing."""
    model, x = micro(), images(1, 40, 24)
    expected = model(x)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 4:
            parameter.copy_(parameter.transpose(2, 3).clone())
        if name.endswith("rel_pos_h"):
            other = model.get_parameter(name.replace("rel_pos_h", "rel_pos_w"))
            rows = parameter.clone()
            parameter.copy_(other)
            other.copy_(rows)
    torch.testing.assert_close(model(x.transpose(2, 3)), expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_set_input_size_equals_resampling_in_every_forward() -> None:
    model, x = micro(), images(1, 48, 40)
    expected = model(x)
    model.set_input_size((48, 40))
    assert model.blocks[0].attn.rel_pos_h.shape == (47, 32)
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["learned", "per_layer", "fixed", "none"])
def test_alpha_options_train_and_fuse(mode: str) -> None:
    model, x = micro(alpha=mode), images()
    logits = model(x)
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.fuse_()
    with torch.no_grad():
        torch.testing.assert_close(model(x), logits.detach(), atol=1e-5, rtol=0)
    assert "alpha" not in dict(model.named_parameters())


def test_unknown_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="global_pool is 'token'"):
        micro(global_pool="token")


def test_export_has_a_dynamic_batch_and_no_index_arithmetic() -> None:
    model = micro()
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(model, (images(),), dynamic_shapes=dynamic)
    for batch in (1, 3):
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images(batch)), model(images(batch)), atol=1e-6, rtol=0)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not {"aten.arange.default", "aten.add_.Tensor", "aten.to.dtype"} & targets


def test_timm_builds_every_name_of_the_family() -> None:
    assert set(remvit.VARIANTS) == set(timm.list_models("remvit*")) == {"remvitv2_tiny", "remvitv2_micro"}
