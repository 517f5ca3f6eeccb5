"""optimize on what people bring: folders of transformers, damaged images, other runtimes, one and four channels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import save_for_hf

import leanvit as package
from common import Outcome, save_image, smooth
from hf_vit import depth_one, save_transformers
from leanvit.bench import Target
from leanvit.config import OptimizeOptions
from leanvit.data.loader import to_input
from leanvit.errors import ImageError
from leanvit.files import read_json
from leanvit.optimize import api
from leanvit.optimize.images import read_images
from leanvit.optimize.settings import settings_for
from leanvit.passed_over import gathering
from leanvit.runtime.bundle import read_manifest
from leanvit.runtime.predictor import Predictor
from sessions import SATURATES
from small_vit import classes, clock, pictures, small_info, small_vit

LABELS = ("cat", "dog")
FAST = clock(fp32=10.0, w8a8=5.0, openvino=4.0)


def in_turns(**milliseconds: float) -> Any:
    """A clock by runtime."""

    def timer(targets: list[Target], batch_size: int, threads: int) -> dict[str, Any]:
        return {"results": [{"median_ms": milliseconds[target.runtime]} for target in targets]}

    return timer


# --- images ---


def test_a_damaged_image_ends_the_run_or_is_left_out_and_named(tmp_path: Path) -> None:
    folder = classes(tmp_path / "data", 10)
    bad = [folder / "cat" / f"{number}.png" for number in range(0, 10, 3)]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    network, info = small_vit(), small_info()
    with pytest.raises(ImageError, match=r"cat.*png.*--bad-images skip"):
        read_images(network, info, str(folder), OptimizeOptions())
    with gathering() as gathered:
        found = read_images(network, info, str(folder), OptimizeOptions(bad_images="skip"))
    assert sorted(gathered.names) == sorted(str(path) for path in bad)
    assert found.count + len(found.x) == 30 - len(bad)
    assert found.count == len(found.evaluation.pixels)


def test_damaged_photographs_and_pictures_are_left_out_too(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "photos", 20)
    (folder / "3.png").write_bytes(b"no picture")
    (folder / "4.png").write_bytes(b"no picture")
    with gathering() as gathered:
        found = read_images(small_vit(), small_info(), str(folder), OptimizeOptions(bad_images="skip"))
    assert sorted(gathered.names) == [str(folder / "3.png"), str(folder / "4.png")]
    assert found.count + len(found.x) == 18


# --- runtimes and aims ---


@pytest.mark.parametrize(
    ("aim", "runtimes", "names"),
    [
        ("throughput", ("onnxruntime",), {"float", "w8a8", "w8a8-merged", "w8a8-best"}),
        ("throughput", ("openvino",), {"float", "w8a8", "openvino", "w8a8-merged", "w8a8-best"}),
        (
            "latency",
            ("onnxruntime", "openvino"),
            {"float", "w8a8", "openvino", "w8a8-where-faster", "w8a8-merged", "w8a8-best"},
        ),
        ("size", ("openvino",), {"float", "w8a8", "w4a8", "w4a16", "w8a8-best", "w4a8-best", "mixed"}),
    ],
)
def test_what_could_win_depends_on_aim_and_runtime(aim: Any, runtimes: Any, names: set[str]) -> None:
    assert {setting.name for setting in settings_for(aim, runtimes)} == names


@pytest.mark.parametrize(
    ("float_row", "w8a8", "why"),
    [
        ({"keeps_tokens": ""}, {"state": "made"}, ""),
        ({"keeps_tokens": "SwinTransformer can't"}, {"state": "made"}, "SwinTransformer can't"),
        ({"keeps_tokens": ""}, {"state": "failed"}, "w8a8 does not hold the accuracy with all tokens"),
    ],
)
def test_tokens_are_merged_where_that_can_gain(float_row: dict[str, Any], w8a8: dict[str, Any], why: str) -> None:
    setting = next(row for row in settings_for("latency", ("onnxruntime",)) if row.name == "w8a8-merged")
    assert setting.unless({"float": float_row, "w8a8": w8a8}, {}) == why


@pytest.mark.slow
@pytest.mark.parametrize("wanted", ["openvino", "any"])
def test_the_file_is_the_fastest_of_the_runtimes_that_are_asked_for(
    wanted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    from leanvit.export import api as exporting
    from leanvit.runtime.engines import available

    monkeypatch.setattr(exporting, "available", available)  # the tests' own exports prove one runtime
    data = pictures(tmp_path / "data", 60)
    options = OptimizeOptions(max_drop=30.0, runtime=wanted, by="throughput")
    times = in_turns(**{"onnxruntime": 10.0, "openvino": 5.0, "openvino-bf16": 7.0})
    result = api.run(small_vit(), str(data), tmp_path / "out", options, info=small_info(), timer=times)
    assert result["runtime"] == "openvino"
    rows = {row["name"]: row for row in result["files"]}
    timed = set(rows["float"]["milliseconds"])
    assert {"openvino"} <= timed
    assert ("onnxruntime" in timed) is (wanted == "any")
    if not SATURATES:
        assert rows["openvino"]["state"] == "made"
    assert read_manifest(tmp_path / "out" / "bundle").runtimes["openvino"] > 20
    Predictor(tmp_path / "out" / "bundle", runtime="openvino").predict(data / "0.png")


# --- sources ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classifier", "tower"])
def test_a_folder_of_transformers(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "hf"
    if kind == "classifier":
        save_transformers(folder, depth_one(), LABELS)
    else:
        torch.manual_seed(0)
        config = transformers.Dinov2Config(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28,
                                           patch_size=4)  # fmt: skip
        transformers.Dinov2Model(config).save_pretrained(folder)
        transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(folder)
    network, info = package.load(f"transformers:{folder}")
    data = pictures(tmp_path / "data", 60)
    options = OptimizeOptions(max_drop=50.0, by="throughput", calibration_images=40)
    result = api.run(network, str(data), tmp_path / "out", options, info=info, timer=FAST)
    manifest = read_manifest(tmp_path / "out" / "bundle")
    assert (result["best"], manifest.profile) == ("w8a8", "w8a8")
    assert manifest.task == ("classify" if kind == "classifier" else "embed")
    predictor = Predictor(tmp_path / "out" / "bundle")
    x = np.stack([predictor.prepare(path) for path in sorted(data.glob("*.png"))[:8]])
    with torch.no_grad():
        wanted = network(to_input(torch.from_numpy(x), info.preprocess)).numpy()
    found = predictor.outputs(x)[predictor.task.continuous]
    assert np.square(found - wanted).sum() < 0.02 * np.square(wanted).sum()  # 17 dB of 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 4])
def test_one_and_four_channels_go_from_a_file_to_a_bundle(
    channels: int, tmp_path: Path, leanvit: Callable[..., Outcome]
) -> None:
    network = depth_one(in_chans=channels)
    described = {"mean": [0.5] * channels, "std": [0.5] * channels}
    network.pretrained_cfg = {**network.pretrained_cfg, **described}
    arguments = {"depth": 1, "num_classes": 2, "in_chans": channels}
    save_for_hf(network, tmp_path / "it", {"label_names": list(LABELS)}, arguments)
    for index, name in enumerate(LABELS):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(25):
            bands = np.concatenate([smooth(28, 28, 100 * index + number), smooth(28, 28, 7 + number)], 2)[
                ..., :channels
            ]
            save_image(tmp_path / "data" / name / f"{number}.png", bands[..., 0] if channels == 1 else bands)
    data, fast = ("--data", tmp_path / "data"), ("--no-range-search", "--no-ratio-search")
    done = leanvit("quantize", f"local-dir:{tmp_path / 'it'}", *data, *fast, "--output", tmp_path / "q")
    assert done.code == 0, done.err
    done = leanvit("export", tmp_path / "q", *data, "--max-drop", 100, "--min-speedup", 0, "--output", tmp_path / "b")
    assert done.code == 0, done.err
    assert read_manifest(tmp_path / "b").preprocess.channels == channels
    assert read_json(tmp_path / "b" / "verify.json")["passed"]
    path = tmp_path / "data" / "dog" / "3.png"
    printed = json.loads(leanvit("predict", tmp_path / "b", path, "--format", "jsonl", "--top-k", 2).out)
    predictor = Predictor(tmp_path / "b")
    pixels = predictor.prepare(path)
    assert pixels.shape == (28, 28, channels)
    with torch.no_grad():
        wanted = network((torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255 - 0.5) / 0.5).softmax(1)[0]
    found = {one["label"]: one["probability"] for one in printed["predictions"]}
    assert [found[name] for name in LABELS] == pytest.approx(wanted.tolist(), abs=0.05)
    assert leanvit("verify", tmp_path / "b").code == 0
    assert leanvit("val", tmp_path / "b", *data).code == 0
    assert leanvit("benchmark", tmp_path / "b", "--batch-sizes", 1, "--rounds", 3, "--threads", 1).code == 0
