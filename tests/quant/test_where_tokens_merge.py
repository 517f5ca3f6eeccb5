"""Merging chosen by calibration images: the block with the least loss for the work saved, as counted from outside."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy.special import log_softmax
from torch import Tensor, nn

from leanvit import MPTQConfig, quantize
from leanvit.checkpoint import CheckpointInfo, preprocess_for
from leanvit.config import from_dict, to_dict
from leanvit.errors import CalibrationError, ConfigError
from leanvit.models import layout_of, merge_tokens
from leanvit.quant.store import load_quantized, save_quantized

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7}

KWARGS = {name: value for name, value in SMALL.items() if name != "num_classes"}


def network(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    built = timm.create_model("vit_tiny_patch16_224", **{**SMALL, **kwargs}).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return built


def images(count: int = 12) -> Tensor:
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


def macs_of_blocks(model: Any, x: Tensor) -> int:
    """Multiply-adds of one image by what the linears and the attention of the blocks were given."""
    found, hooks = [0], []

    def linear(module: Any, given: Any, output: Tensor) -> None:
        found[0] += output[0].numel() * module.in_features

    def attention(module: Any, given: Any, output: Any) -> None:
        found[0] += 2 * given[0].shape[1] ** 2 * given[0].shape[2]

    for block in model.blocks:
        hooks += [m.register_forward_hook(linear) for m in block.modules() if isinstance(m, nn.Linear)]
        hooks.append(block.attn.register_forward_hook(attention))
    model(x[:1])
    for hook in hooks:
        hook.remove()
    return found[0]


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (20, 0, 0, 0), (0, 5, 7, 0), (0, 0, 0, 30)])
@pytest.mark.parametrize("kwargs", [{}, {"class_token": False, "global_pool": "avg"}])
def test_the_work_is_what_the_blocks_are_given(counts: tuple[int, ...], kwargs: dict[str, Any]) -> None:
    model, x = network(**kwargs), images(1)
    layout = layout_of(model)
    whole = macs_of_blocks(model, x)
    assert layout.macs([0] * 4) == whole
    left = macs_of_blocks(merge_tokens(copy.deepcopy(model), counts), x)
    assert layout.macs(counts) == left
    assert layout.saved(counts) == pytest.approx(1 - left / whole)


def kl(model: Any, other: Any, x: Tensor) -> float:
    with torch.no_grad():
        truth, found = (log_softmax(m(x).double().numpy(), axis=1) for m in (model, other))
    return float((np.exp(truth) * (truth - found)).sum(1).mean())


def test_the_block_with_the_least_loss_for_the_work_saved_is_taken() -> None:
    model, x = network(), images()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    quantized = quantize(model, x, MPTQConfig(keep_tokens=0.6))
    facts = quantized.report["token_merging"]
    whole = macs_of_blocks(model, x)
    scores = []
    assert len(facts["tried"]) == 2  # blocks of the first third of four, and the one behind
    for block, tried in enumerate(facts["tried"]):
        counts = tuple(26 if index == block else 0 for index in range(4))
        merged = merge_tokens(copy.deepcopy(model), counts)
        saved = 1 - macs_of_blocks(merged, x) / whole
        assert tried == {"counts": counts, "loss": pytest.approx(kl(model, merged, x), rel=1e-4), "saved": saved}
        scores.append(kl(model, merged, x) / saved)
    best = int(np.argmin(scores))
    assert facts["counts"] == tuple(26 if index == best else 0 for index in range(4))
    assert quantized.config.keep_tokens == facts["counts"]
    # The network that was given is as it was.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model(x[:1]).shape == (1, 7)
    merged = merge_tokens(copy.deepcopy(model), facts["counts"])
    with torch.no_grad():
        error = (quantized.module(x) - merged(x)).square().sum() / merged(x).square().sum()
    assert 0 < float(error) < 0.02


def test_numbers_for_each_block_are_taken_as_they_are() -> None:
    quantized = quantize(network(), images(4), MPTQConfig(keep_tokens=(4, 0, 9, 0)))
    assert quantized.report["token_merging"]["counts"] == (4, 0, 9, 0)
    assert quantized.report["token_merging"]["tried"] == []
    assert quantize(network(), images(4), MPTQConfig()).report["token_merging"] is None


def test_a_file_of_a_merged_network_is_read_again(tmp_path: Path) -> None:
    model, x = network(), images(4)
    info = CheckpointInfo("vit_tiny_patch16_224", tuple("abcdefg"), preprocess_for(model), KWARGS)
    quantized = quantize(model, x, MPTQConfig(keep_tokens=0.5))
    save_quantized(tmp_path, quantized, info)
    again, _ = load_quantized(tmp_path)
    assert torch.equal(again.module(x), quantized.module(x))
    assert again.config == quantized.config


def test_configurations_go_to_a_file_and_back() -> None:
    for value in (0.6, (3, 0, 2)):
        config = MPTQConfig(keep_tokens=value)
        assert from_dict(MPTQConfig, to_dict(config)) == config
    for wrong in (0.0, 1.1, (1, -1), ()):
        with pytest.raises(ConfigError, match="keep_tokens is"):
            MPTQConfig(keep_tokens=wrong)


def test_what_cannot_be_merged_is_refused() -> None:
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=2, depths=(1, 1),
                             embed_dim=24, num_heads=(1, 1)).eval()  # fmt: skip
    with pytest.raises(ConfigError, match="SwinTransformer can't merge tokens"):
        quantize(swin, images(2), MPTQConfig(keep_tokens=0.6))
    with pytest.raises(ConfigError, match=r"at least 0\.25"):
        quantize(network(), images(2), MPTQConfig(keep_tokens=0.2))
    with pytest.raises(ConfigError, match="expected 4 numbers"):
        quantize(network(), images(2), MPTQConfig(keep_tokens=(1, 2)))
    bad = images(2)
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError):
        quantize(network(), bad, MPTQConfig(keep_tokens=0.6))
    with pytest.raises(CalibrationError):
        quantize(network(), [], MPTQConfig(keep_tokens=0.6))
