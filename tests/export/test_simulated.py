"""What val measures on a quantized folder is what its bundle computes, image by image, in whatever profile."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import leanvit.models  # noqa: F401 - registers the micro models
from leanvit import MPTQConfig, Predictor, QuantizedModel, export, quantize
from leanvit.checkpoint import CheckpointInfo, preprocess_for, save_checkpoint
from leanvit.config import ExportOptions, Preprocess
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.errors import ConfigError
from leanvit.export import simulated as simulation_room
from leanvit.export.network import network_outputs
from leanvit.export.onnx.profiles import scheme_for
from leanvit.export.simulated import (
    COMPARED_IMAGES,
    measured_form,
    profile_for,
    profile_losses,
    say_what_it_loses,
    simulated,
)
from leanvit.files import read_json
from leanvit.quant.quantizers import ActivationQuantizer
from leanvit.quant.store import load_quantized
from leanvit.runtime.bundle import read_manifest, sqnr_db
from outliers import add_outliers

NO_SATURATION = {"weight_bits": 7}
"""255 * 63 * 2 fits int16: chips without VNNI, whose kernels add two products in 16 bits, compute these exactly. The
ends of a network keep 8 bits; there pixels and features of the largest weights are not both at their largest."""

DIGITS = tuple("0123456789")


def digits_checkpoint(name: str, folder: Path) -> Path:
    """A packed micro model that says of digits which garment they look like most: real weights, real images."""
    model = timm.create_model(name, pretrained=True).eval()
    info = CheckpointInfo(name, DIGITS, preprocess_for(model), data="digits")
    save_checkpoint(folder / "model.safetensors", model, info)
    return folder


def predicted(folder: Path) -> np.ndarray:
    with (folder / "predictions.csv").open() as file:
        return np.array([int(row["predicted"]) for row in csv.DictReader(file)])


def logits_of(network: torch.nn.Module, pixels: np.ndarray, preprocess: Preprocess | None) -> np.ndarray:
    assert preprocess is not None
    return network_outputs(network, CheckpointInfo("micro", DIGITS, preprocess), pixels)["logits"]


def near_ties(own: np.ndarray, executed: np.ndarray) -> np.ndarray:
    """(N,) whether an image's two largest logits are no further apart than rounding moved its logits."""
    ordered = np.sort(own, axis=1)
    return ordered[:, -1] - ordered[:, -2] <= 2 * np.abs(own - executed).max(axis=1)


@pytest.mark.slow
def test_val_says_the_same_of_a_quantized_folder_and_of_its_bundle(tmp_path: Path, leanvit: Callable[..., Any]) -> None:
    run = digits_checkpoint("swin_micro", tmp_path / "run")
    quantized, bundle = tmp_path / "quantized", tmp_path / "bundle"
    bits = [word for key, value in NO_SATURATION.items() for word in (f"--{key.replace('_', '-')}", value)]
    done = leanvit("quantize", run, "--data", "digits", "--calibration-images", 64, "--output", quantized, *bits)
    assert done.code == 0, done.err
    report = read_json(quantized / "quantize.json")
    assert report["profile"] == "w8a8"
    assert "profile w8a8" in done.out
    assert leanvit("export", quantized, "--output", bundle, "--min-speedup", 0).code == 0
    for path, output in ((quantized, tmp_path / "simulated"), (bundle, tmp_path / "executed")):
        assert leanvit("val", path, "--data", "digits", "--output", output).code == 0
    by_val, by_bundle = predicted(tmp_path / "simulated"), predicted(tmp_path / "executed")
    model, info = load_quantized(quantized)
    pixels = np.concatenate([x.numpy() for x, _ in Loader(load_split("digits", "val"), info.preprocess, 64)])
    own, executed = logits_of(simulated(model), pixels, info.preprocess), Predictor(bundle).logits(pixels)
    assert (own.argmax(1) == by_val).all()
    assert (executed.argmax(1) == by_bundle).all()
    assert sqnr_db(own, executed) > 45
    different = by_val != by_bundle
    assert len(by_val) == 359
    assert different.mean() <= 0.01
    assert near_ties(own, executed)[different].all()
    found = json.loads(leanvit("val", quantized, "--data", "digits", "--json").out)
    assert found["correct"] == report["accuracy"]["correct"]


@pytest.fixture(scope="module")
def vit() -> tuple[QuantizedModel, np.ndarray]:
    """vit_micro with 7 and 8 bits, and prepared digits."""
    model = timm.create_model("vit_micro", pretrained=True).eval()
    preprocess = preprocess_for(model)
    pixels = [x.numpy() for x, _ in Loader(load_split("digits", "val"), preprocess, 64)]
    x = to_input(torch.from_numpy(pixels[0]), preprocess)
    return quantize(model, x, MPTQConfig(**NO_SATURATION)), np.concatenate(pixels[1:3])


@pytest.mark.parametrize("profile", ["w8a8", "exact", "w4a16", "openvino"])
def test_the_simulation_of_a_profile_has_the_logits_of_its_bundle(
    profile: str, vit: tuple[QuantizedModel, np.ndarray], tmp_path: Path
) -> None:
    model, pixels = vit
    options = ExportOptions(profile=profile, min_speedup=0, runtimes=("onnxruntime",))
    executed = Predictor(export(model, tmp_path / "bundle", options)).logits(pixels)
    own = logits_of(simulated(model, profile), pixels, model.preprocess)
    assert sqnr_db(own, executed) > 40
    different = own.argmax(1) != executed.argmax(1)
    assert near_ties(own, executed)[different].all()
    assert different.mean() < 0.02


def test_profiles_are_different_networks_and_the_fast_ones_leave_attention_in_float(
    vit: tuple[QuantizedModel, np.ndarray],
) -> None:
    model, pixels = vit

    def quantizers(network: torch.nn.Module) -> int:
        return sum(isinstance(module, ActivationQuantizer) for module in network.modules())

    whole = quantizers(model.module)
    assert quantizers(simulated(model, "w4a16")) == 0
    assert 0 < quantizers(simulated(model, "w8a8")) < quantizers(simulated(model, "exact")) == whole
    fast, exact = (logits_of(simulated(model, name), pixels, model.preprocess) for name in ("w8a8", "exact"))
    assert np.abs(fast - exact).max() > 1e-3


def test_the_profile_that_was_measured_is_the_one_that_export_takes(
    vit: tuple[QuantizedModel, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = vit
    recorded = QuantizedModel(
        model.graph, model.plan, model.report | {"profile": "exact"}, model.config, model.example, model.preprocess
    )
    assert (profile_for(model).name, profile_for(recorded).name) == ("w8a8", "exact")
    assert read_manifest(export(recorded, tmp_path / "same")).profile == "exact"
    assert "was measured" not in capsys.readouterr().err
    assert read_manifest(export(recorded, tmp_path / "other", ExportOptions(profile="w4a16"))).profile == "w4a16"
    assert "was measured in profile exact, this file has w4a16" in capsys.readouterr().err


def test_profiles_are_compared_by_the_outputs_of_what_they_run(vit: tuple[QuantizedModel, np.ndarray]) -> None:
    model, pixels = vit
    network = timm.create_model("vit_micro", pretrained=True).eval()
    x = to_input(torch.from_numpy(pixels), model.preprocess)
    found = profile_losses(model, network, x)
    with torch.no_grad():
        truth = torch.log_softmax(network(x[:COMPARED_IMAGES]).double(), 1)
        for name in ("w8a8", "openvino"):
            own = torch.log_softmax(simulated(model, name)(x[:COMPARED_IMAGES]).double(), 1)
            assert found[name] == pytest.approx(float((truth.exp() * (truth - own)).sum(1).mean()), rel=1e-6)
    assert set(found) == {"w8a8", "w4a8", "openvino", "mixed"}
    assert found["w8a8"] < found["openvino"]  # which also rounds what attention reads


@pytest.mark.parametrize(
    ("losses", "is_told"),
    [({"w8a8": 1e-4, "openvino": 1e-2}, True), ({"w8a8": 1e-4, "openvino": 1.9e-4}, False), ({}, False)],
)
def test_a_profile_that_loses_far_more_than_another_is_named(
    vit: tuple[QuantizedModel, np.ndarray], capsys: pytest.CaptureFixture[str], losses: dict[str, float], is_told: bool
) -> None:
    model = replace(vit[0], report=vit[0].report | {"profile_losses": losses})
    say_what_it_loses(model, profile_for(model, "openvino"))
    assert ("profile openvino moves" in capsys.readouterr().err) is is_told
    say_what_it_loses(model, profile_for(model, "w8a8"))
    assert not capsys.readouterr().err


def test_attention_without_zero_points_is_quantized_with_balanced_heads() -> None:
    scheme = MPTQConfig()
    assert scheme_for(scheme, "openvino").passes == ("balance",)
    assert scheme_for(scheme, "w8a8") == scheme_for(scheme, "auto") == scheme
    for named in (MPTQConfig(mode="best"), MPTQConfig(passes=("correct",))):
        assert scheme_for(named, "openvino") == named


def test_balanced_heads_bring_integer_attention_near_the_float_network() -> None:
    model = timm.create_model("vit_micro", pretrained=True).eval()
    add_outliers(model, head_scale=10.0)  # as large networks have, in the channels of q and k, too
    pixels = [x.numpy() for x, _ in Loader(load_split("digits", "val"), preprocess_for(model), 64)]
    x = to_input(torch.from_numpy(pixels[0]), preprocess_for(model))
    plain, balanced = (quantize(model, x, scheme_for(MPTQConfig(), name)) for name in ("w8a8", "openvino"))
    losses = [profile_losses(quantized, model, x)["openvino"] for quantized in (plain, balanced)]
    assert losses[1] < 0.5 * losses[0]


def test_what_no_profile_runs_is_measured_with_every_quantizer_and_that_is_said(
    vit: tuple[QuantizedModel, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: object) -> None:
        raise ConfigError("1 quantizer has no kernel")

    monkeypatch.setattr(simulation_room, "executed_form", refuse)
    form, profile = measured_form(vit[0])
    assert (form, profile) == (vit[0].module, None)
    assert "which no bundle runs: 1 quantizer has no kernel" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="has no kernel"):
        measured_form(vit[0], "w8a8")


def test_a_quantized_folder_of_0_1_is_measured_in_what_export_would_choose(
    vit: tuple[QuantizedModel, np.ndarray], tmp_path: Path
) -> None:
    from leanvit.quant.store import save_quantized

    model, _ = vit
    assert "profile" not in model.report
    info = CheckpointInfo("vit_micro", DIGITS, model.preprocess or preprocess_for(model))
    save_quantized(tmp_path, model, info)
    loaded, _ = load_quantized(tmp_path)
    assert measured_form(loaded)[1] == "w8a8"


def test_keywords_of_0_1_still_work_and_say_what_to_write(
    vit: tuple[QuantizedModel, np.ndarray], tmp_path: Path
) -> None:
    model, _ = vit
    with pytest.warns(FutureWarning, match=r"give ExportOptions\(profile=\.\.\., min_speedup=\.\.\.\)"):
        bundle = export(model, tmp_path / "old", profile="w4a16", min_speedup=0)
    assert read_manifest(bundle).profile == "w4a16"
    with pytest.raises(TypeError, match="unexpected keyword argument 'profiles'"):
        export(model, tmp_path / "none", profiles="w4a16")
