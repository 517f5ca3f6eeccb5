"""The table of passes: its order, what each leaves unchanged, and passes from outside the package."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import MPTQConfig, quantize
from leanvit.config import NAMED_PASSES, Budget, QuantizeConfig
from leanvit.errors import ConfigError
from leanvit.quant.calibrate import Choices
from leanvit.quant.graph import trace
from leanvit.quant.passes import TABLE, passes_of
from leanvit.quant.work import Pass, Work

STAGES = ["prepare", "bits", "after"]


def images(count: int, seed: int = 0) -> Tensor:
    """Smooth random pictures, normalised."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10).eval()
    for name, parameter in model.named_parameters():
        # Far from even, so that there is something to balance and to smooth.
        if name.endswith("weight") and parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)
    return model


def test_the_names_of_the_configuration_are_those_of_the_table() -> None:
    assert sorted(row.name for row in TABLE if row.beyond_paper) == sorted(NAMED_PASSES)
    assert len({row.name for row in TABLE}) == len(TABLE)
    assert all(row.purpose and row.source for row in TABLE)


def test_the_order_of_the_table_is_the_order_in_which_passes_run(model: nn.Module) -> None:
    stages = [STAGES.index(row.stage) for row in TABLE]
    assert stages == sorted(stages)
    config = MPTQConfig(weight_bits=4, activation_bits=4, mode="learned")
    wanted = [row.name for stage in STAGES for row in passes_of(config, stage)]
    assert wanted == [row.name for row in TABLE if row.name not in ("greedy-mp", "affine")]
    plain = MPTQConfig(smoothing="none", range_search=False, ratio_search=False, budget=Budget(average_bits=7))
    assert [row.name for stage in STAGES for row in passes_of(plain, stage)] == ["greedy-mp"]
    assert quantize(model, images(16), MPTQConfig()).report["passes"] == ["smoothing", "ranges", "ratios"]


@pytest.mark.parametrize("row", [row for row in TABLE if row.stage == "prepare"], ids=lambda row: row.name)
def test_passes_before_quantizers_leave_the_float_function(model: nn.Module, row: Pass) -> None:
    x = images(16)
    traced = trace(model, x)
    work = Work(MPTQConfig(mode="best"), copy.deepcopy(traced), [x], x, 0, Choices())
    row.run(work)
    other = images(4, seed=1)
    with torch.no_grad():
        expected, found = model(other), work.graph.module(other)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    weights = [
        torch.equal(a, b) for a, b in zip(traced.module.parameters(), work.graph.module.parameters(), strict=True)
    ]
    assert all(weights) == (row.name not in ("balance", "rotate", "smoothing"))


CENTRED = '''
"""A pass from outside: the classifier's bias takes the mean error of the logits on the calibration images."""

from leanvit.quant import Pass, Work


def centre(work: Work) -> None:
    error = work.graph.module(work.images).mean(0) - work.quantized.module(work.images).mean(0)
    work.quantized.module.get_parameter("head.bias").add_(error)
    work.notes["centred"] = float(error.abs().max())


CENTRE = Pass("centre", "logits without a mean error", "a test", "after", centre)
NOT_A_PASS = 3
'''


def test_a_pass_from_outside_is_one_file_and_its_row(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "centred.py").write_text(CENTRED)
    monkeypatch.syspath_prepend(tmp_path)
    x = images(32)
    config = QuantizeConfig(model="m", weight_bits=3, activation_bits=4, passes=("centred:CENTRE", "per-head")).scheme()
    quantized = quantize(model, x, config)
    assert quantized.report["passes"] == ["smoothing", "ranges", "ratios", "per-head", "centred:CENTRE"]
    assert quantized.report["centred"] > 1e-3
    assert quantized.report["config"]["passes"] == ["centred:CENTRE", "per-head"]
    with torch.no_grad():
        error = (quantized.module(x) - model(x)).mean(0).abs().max()
    assert float(error) < 1e-4
    for name, found in (("centred:NOT_A_PASS", "is int, expected a leanvit.quant.Pass"), ("centre:X", "No module")):
        with pytest.raises(ConfigError, match=found):
            quantize(model, x, MPTQConfig(passes=(name,)))


def test_passes_that_do_worse_than_the_paper_are_not_kept_in_silence(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "spoiled.py").write_text(CENTRED.replace("add_(error)", "add_(1 + 0 * error).mul_(-9)"))
    monkeypatch.chdir(tmp_path)  # a file in the current folder needs no path
    path = list(sys.path)
    report = quantize(model, images(16), MPTQConfig(passes=("spoiled:CENTRE",))).report
    assert report["calibration"]["kl_divergence"] == report["kl_divergence"]["paper"] < report["kl_divergence"]["best"]
    assert "without spoiled:CENTRE the loss is lower" in capsys.readouterr().err
    assert sys.path == path
