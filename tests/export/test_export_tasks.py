"""Bundles of the tasks: they answer as the torch networks do, pass the gate again, and every seeded fault is named."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image
from sklearn.metrics import jaccard_score

from leanvit import Predictor
from leanvit.annotations import SceneSet
from leanvit.bench import benchmark, describe
from leanvit.config import ExportOptions
from leanvit.errors import BundleError, CheckpointError, ConfigError, LeanvitError, VerificationError
from leanvit.export import data
from leanvit.export.api import export
from leanvit.export.data import evaluation_of
from leanvit.export.gate.evaluation import Evaluation, Measured
from leanvit.export.gate.verify import verify_bundle
from leanvit.export.network import network_outputs
from leanvit.runtime.bundle import Manifest, load_golden, load_golden_records, read_manifest, save_golden, sign
from leanvit.runtime.engines import available
from leanvit.runtime.task import TASKS as SERVED
from leanvit.tasks.build import raw_outputs
from toy_tasks import SIZE, ToyTasks

pytest_plugins = ("toy_tasks",)

KINDS = [(task, precision) for task in ("semantic", "pose", "segment") for precision in ("fp32", "w8a8")]
FLOAT_TASKS = ["semantic", "pose", "segment"]


def pixels_of(scenes: SceneSet, count: int) -> NDArray[np.uint8]:
    """Pictures (N, 64, 64, 3) uint8 that need no resize."""
    return np.stack([np.asarray(Image.open(scene.path).convert("RGB")) for scene in scenes.scenes[:count]])


def evaluation(folder: Path, scenes: SceneSet | None) -> Evaluation | None:
    if scenes is None:
        return None
    manifest = read_manifest(folder)
    return evaluation_of(manifest.task, scenes, manifest.preprocess)


def failed(folder: Path, scenes: SceneSet | None = None) -> list[str]:
    result = verify_bundle(folder, evaluation(folder, scenes))
    names = [check["name"] for check in result["checks"] if check["passed"] is False]
    assert result["passed"] is not bool(names)
    json.dumps(result, allow_nan=False)
    return names


# --- the same answers ---


@pytest.mark.parametrize(("task", "precision"), KINDS)
def test_bundles_pass_the_gate_again_and_nothing_is_left_unjudged(task: str, precision: str, toys: ToyTasks) -> None:
    bundle = toys.bundle(task, precision)
    result = verify_bundle(bundle, evaluation(bundle, toys.split(task, "val")))
    assert {check["name"]: check["passed"] for check in result["checks"] if check["passed"] is not True} == {}
    names = [check["name"] for check in result["checks"]]
    kinds = ["images", "objects"] if task == "segment" else ["images"]
    assert {f"golden {kind} at batch {size}" for kind in kinds for size in (1, 3, 8)} <= set(names)
    assert {"integrity", "preprocessing", "prepared pixels", "label order", "golden outputs"} <= set(names)
    assert f"{SERVED[task].metric} drop" in names
    assert ("calibration images" in names) == (precision == "w8a8")


@pytest.mark.skipif("openvino-bf16" not in available(), reason="needs openvino and a chip with bfloat16")
def test_other_runtimes_are_judged_by_what_they_can_reach(toys: ToyTasks, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toys.bundle("semantic", "fp32"), tmp_path / "bundle"))
    manifest = read_manifest(folder)
    sign(folder, replace(manifest, runtimes={"onnxruntime": 80, "openvino": 80, "openvino-bf16": 25}))
    assert failed(folder) == []
    Predictor(folder, runtime="openvino-bf16")
    sign(folder, replace(manifest, runtimes={"onnxruntime": 80, "openvino-bf16": 80}))
    assert failed(folder) == [f"golden images at batch {size} in openvino-bf16" for size in (1, 3, 8)]
    with pytest.raises(VerificationError, match="in openvino-bf16 on this machine, expected at least 80 dB"):
        Predictor(folder, runtime="openvino-bf16")


@pytest.mark.parametrize("task", FLOAT_TASKS)
def test_a_float_bundle_answers_as_the_torch_network(task: Any, toys: ToyTasks) -> None:
    network, info = toys.load(task, "fp32")
    pixels = pixels_of(toys.split(task, "val"), 5)
    mean, std = (np.array(values, np.float32) for values in (info.preprocess.mean, info.preprocess.std))
    x = torch.from_numpy(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
    expected = raw_outputs(network, task, x)
    found = Predictor(toys.bundle(task, "fp32")).outputs(pixels)
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-3, rtol=1e-3, err_msg=name)
    written = network_outputs(network, info, pixels)
    assert found.keys() == written.keys()


@pytest.mark.parametrize("task", ["semantic", "pose"])
def test_a_quantized_bundle_answers_nearly_as_the_float_network(task: Any, toys: ToyTasks) -> None:
    network, info = toys.load(task, "fp32")
    pixels = pixels_of(toys.split(task, "val"), 5)
    (name, expected), *_ = network_outputs(network, info, pixels).items()
    found = Predictor(toys.bundle(task, "w8a8")).outputs(pixels)[name]
    assert np.corrcoef(expected.ravel(), found.ravel())[0, 1] > 0.99
    assert not np.array_equal(expected, found)
    quantized, _ = toys.load(task, "w8a8")
    assert read_manifest(toys.bundle(task, "w8a8")).plan == quantized.plan


@pytest.mark.parametrize(("task", "precision"), KINDS)
def test_answers_do_not_depend_on_the_batch(task: str, precision: str, toys: ToyTasks) -> None:
    predictor = Predictor(toys.bundle(task, precision), check=False)
    pixels = pixels_of(toys.split(task, "val"), 8)
    whole = predictor.outputs(pixels)
    for size in (1, 3):
        parts = [predictor.outputs(pixels[i : i + size]) for i in range(0, 8, size)]
        for name, values in whole.items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_allclose(joined, values, atol=1e-3, rtol=1e-3, err_msg=f"{name} at batch {size}")


# --- decoding, against values computed here ---


def test_class_maps_give_the_recorded_miou(toys: ToyTasks) -> None:
    bundle, scenes = toys.bundle("semantic", "fp32"), toys.split("semantic", "val")
    predictor = Predictor(bundle)
    truth, found = [], []
    for scene in scenes.scenes:
        assert scene.class_map is not None
        truth.append(np.asarray(Image.open(scene.class_map)).ravel())
        found.append(predictor.predict(np.asarray(Image.open(scene.path).convert("RGB"))).ravel())
    expected = jaccard_score(np.concatenate(truth), np.concatenate(found), average="macro")
    accuracy = read_manifest(bundle).accuracy
    assert accuracy is not None
    assert accuracy["value"] == pytest.approx(expected, abs=1e-6)


def test_keypoints_give_the_recorded_pck(toys: ToyTasks) -> None:
    bundle, scenes = toys.bundle("pose", "fp32"), toys.split("pose", "val")
    predictor = Predictor(bundle)
    right = count = 0
    for scene in scenes.scenes:
        pixels = np.asarray(Image.open(scene.path).convert("RGB"))
        for one in scene.instances:
            assert one.keypoints is not None
            (found,) = predictor.predict(pixels, boxes=[one.box])
            assert found.keypoints is not None
            visible = one.keypoints[:, 2] == 2
            apart = np.hypot(*(found.keypoints - one.keypoints)[visible, :2].T)
            right += int((apart <= 0.1 * max(one.box[2] - one.box[0], one.box[3] - one.box[1])).sum())
            count += int(visible.sum())
    accuracy = read_manifest(bundle).accuracy
    assert accuracy is not None
    assert accuracy["value"] == pytest.approx(right / count, abs=1e-6)


def test_pictures_of_another_shape_are_letterboxed_and_answers_come_back_in_their_pixels(toys: ToyTasks) -> None:
    image = Image.open(toys.split("segment", "val").scenes[0].path).convert("RGB")
    wide = image.resize((256, 128))
    predictor = Predictor(toys.bundle("segment", "fp32"))
    expected = np.concatenate(
        [np.asarray(wide.resize((64, 32), Image.Resampling.BILINEAR)), np.full((32, 64, 3), 114, np.uint8)]
    )
    np.testing.assert_array_equal(predictor.prepare(_png(wide)), expected)
    outputs = predictor.outputs(expected[None])
    objects = predictor.predict(np.asarray(wide), score_threshold=0.01)
    assert objects
    boxes = outputs["boxes"][0] * 4
    for one in objects:
        assert one.mask is not None
        assert one.mask.shape == (128, 256)
        nearest = np.abs(np.clip(boxes, 0, (256, 128) * 2) - np.array(one.box)).max(axis=1)
        assert nearest.min() < 0.01


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


# --- what is refused ---


def test_a_predictor_refuses_what_does_not_fit_its_task(toys: ToyTasks, bundle: Path, tmp_path: Path) -> None:
    semantic, segment = (Predictor(toys.bundle(task, "fp32"), check=False) for task in ("semantic", "segment"))
    picture = np.zeros((*SIZE, 3), np.uint8)
    refused: list[tuple[Predictor, str, Any]] = [
        (semantic, "score_threshold", 0.5), (semantic, "boxes", [(0, 0, 9, 9)]), (segment, "top_k", 3),
        (segment, "boxes", []), (Predictor(bundle), "score_threshold", 0.5),
    ]  # fmt: skip
    for predictor, name, value in refused:
        with pytest.raises(ConfigError, match=f"^{name} does not fit task {predictor.task.name} of .*, expected "):
            predictor.predict(picture, **{name: value})
    for method in (semantic.logits, semantic.probabilities):
        with pytest.raises(ConfigError, match="is for task 'semantic', expected classify"):
            method(picture[None])
    wrong: list[Any] = [picture, picture[None].astype(np.float32), picture[None, :32]]
    for images in wrong:
        with pytest.raises(ConfigError, match="expected uint8"):
            semantic.outputs(images)
    assert Predictor(toys.bundle("pose", "fp32"), check=False).predict(picture, boxes=[]) == []
    unknown = Path(shutil.copytree(toys.bundle("pose", "fp32"), tmp_path / "unknown"))
    sign(unknown, replace(read_manifest(unknown), task="depth"))
    with pytest.raises(BundleError, match="task 'depth' is unknown, expected one of classify, embed, multilabel, bin"):
        Predictor(unknown)
    assert failed(unknown) == ["load"]


def test_a_network_whose_answers_are_always_the_same_is_rejected(toys: ToyTasks, tmp_path: Path) -> None:
    network, info = toys.load("semantic", "fp32")
    with torch.no_grad():
        network.classifier.weight.zero_()
    with pytest.raises(VerificationError, match="'golden outputs' failed: all images have the same logits"):
        export(network, tmp_path / "bundle", ExportOptions(runtimes=("onnxruntime", "openvino-bf16")), info=info)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.rejected"]
    assert read_manifest(tmp_path / "bundle.rejected").runtimes == {"onnxruntime": 80, "openvino-bf16": 25}
    assert failed(tmp_path / "bundle.rejected") == ["golden outputs"]


def test_export_refuses_profiles_and_folders_that_do_not_fit(toys: ToyTasks, tmp_path: Path) -> None:
    network, info = toys.load("semantic", "fp32")
    with pytest.raises(ConfigError, match="profile w8a8 does not fit a float"):
        export(network, tmp_path / "bundle", ExportOptions(profile="w8a8"), info=info)
    quantized, _ = toys.load("semantic", "w8a8")
    with pytest.raises(ConfigError, match="profile fp32 does not fit a quantized"):
        export(quantized, tmp_path / "bundle", ExportOptions(profile="fp32"), info=info)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="is not a bundle; it is not overwritten"):
        export(network, tmp_path / "full", info=info)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


# --- seeded faults ---


def swapped_normalisation(folder: Path, manifest: Manifest) -> Manifest:
    preprocess = manifest.preprocess
    return replace(manifest, preprocess=replace(preprocess, mean=preprocess.std, std=preprocess.mean))


def other_filter(folder: Path, manifest: Manifest) -> Manifest:
    return replace(manifest, preprocess=replace(manifest.preprocess, interpolation="nearest"))


def squashed(folder: Path, manifest: Manifest) -> Manifest:
    return replace(manifest, preprocess=replace(manifest.preprocess, crop_mode="squash"))


def swapped_labels(folder: Path, manifest: Manifest) -> Manifest:
    first, second, *rest = manifest.labels
    return replace(manifest, labels=(second, first, *rest))


def changed_golden_value(folder: Path, manifest: Manifest) -> Manifest:
    images, values = load_golden(folder)
    values[2, values.shape[1] // 2] += 0.1 * np.abs(values).max()
    save_golden(folder, images, values, **load_golden_records(folder))
    return manifest


def one_golden_picture_off(folder: Path, manifest: Manifest) -> Manifest:
    """By 76 dB in one of eight, which is 85 dB over all of them."""
    images, values = load_golden(folder)
    values[2] *= 1.00015
    save_golden(folder, images, values, **load_golden_records(folder))
    return manifest


def scaled_golden_values(folder: Path, manifest: Manifest) -> Manifest:
    """One value among thousands is within what 8 bits may change; 5% of all are not."""
    images, values = load_golden(folder)
    save_golden(folder, images, 1.05 * values, **load_golden_records(folder))
    return manifest


def other_records(**changes: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path, Manifest], Manifest]:
    def change(folder: Path, manifest: Manifest) -> Manifest:
        images, values = load_golden(folder)
        records = load_golden_records(folder)
        records |= {name: function(records[name]) for name, function in changes.items()}
        save_golden(folder, images, values, **records)
        return manifest

    return change


def largest_weight(model: Any, prefix: str) -> Any:
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    weights = [t for t in model.graph.initializer if t.name.startswith(prefix) and t.data_type in kinds]
    return max((t for t in weights if len(t.dims) > 1), key=lambda t: np.prod(t.dims))


def last_weight(model: Any) -> Any:
    """What the last convolution reads, maybe through a Cast and a product with scales."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    maker = {name: node for node in model.graph.node for name in node.output}
    name = [node for node in model.graph.node if node.op_type == "Conv"][-1].input[1]
    while name not in constants:
        name = maker[name].input[0]
    return constants[name]


def changed_weight(weight: Callable[[Any], Any], factor: float) -> Callable[[Path, Manifest], Manifest]:
    """Scale half of a weight, as far as its dtype reaches."""

    def change(folder: Path, manifest: Manifest) -> Manifest:
        model = onnx.load(folder / "model.onnx")
        tensor = weight(model)
        values = numpy_helper.to_array(tensor).copy()
        limits = np.iinfo(np.int8) if values.dtype == np.int8 else np.finfo(np.float32)
        values.reshape(-1)[::2] = np.clip(values.reshape(-1)[::2] * factor, limits.min, limits.max).astype(values.dtype)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        onnx.save(model, folder / "model.onnx")
        return manifest

    return change


def unlisted_file(folder: Path, manifest: Manifest) -> Manifest:
    (folder / "other.onnx").write_bytes(b"x")
    return manifest


def dropped(points: float) -> Callable[[Path, Manifest], Manifest]:
    def change(folder: Path, manifest: Manifest) -> Manifest:
        assert manifest.accuracy is not None
        value = manifest.accuracy["value"]
        return replace(manifest, accuracy=manifest.accuracy | {"float": value + points / 100, "max_drop": 1.0})

    return change


def other_value(folder: Path, manifest: Manifest) -> Manifest:
    assert manifest.accuracy is not None
    return replace(manifest, accuracy=manifest.accuracy | {"value": manifest.accuracy["value"] + 0.02})


Fault = Callable[[Path, Manifest], Manifest]
OBJECTS, PICTURES = "golden objects at batch 1", "golden images at batch 1"
FAULTS: list[tuple[str, str, Fault, str]] = [
    ("semantic", "fp32", swapped_normalisation, "preprocessing"),
    ("pose", "w8a8", swapped_normalisation, "preprocessing"),
    ("semantic", "fp32", other_filter, "prepared pixels"),
    ("segment", "fp32", squashed, "prepared pixels"),
    ("segment", "w8a8", swapped_labels, "label order"),
    ("semantic", "fp32", changed_golden_value, PICTURES),
    ("semantic", "fp32", one_golden_picture_off, PICTURES),
    ("pose", "w8a8", scaled_golden_values, PICTURES),
    ("segment", "fp32", changed_golden_value, PICTURES),
    ("segment", "fp32", other_records(found_labels=lambda labels: labels + 1), OBJECTS),
    ("segment", "w8a8", other_records(found_boxes=lambda boxes: boxes[..., [1, 0, 3, 2]]), OBJECTS),
    ("segment", "fp32", other_records(found_scores=lambda scores: scores * 2.5), OBJECTS),
    ("segment", "fp32", other_records(found_masks=lambda masks: np.uint8(255) * (masks < 128)), OBJECTS),
    ("segment", "fp32", changed_weight(partial(largest_weight, prefix="pyramid."), 0.5), PICTURES),
    ("segment", "fp32", changed_weight(partial(largest_weight, prefix="box."), 0.0), OBJECTS),
    ("segment", "fp32", changed_weight(partial(largest_weight, prefix="mask."), -20.0), OBJECTS),
    ("segment", "w8a8", changed_weight(partial(largest_weight, prefix="mask."), -20.0), OBJECTS),
    ("semantic", "w8a8", changed_weight(last_weight, 0.5), PICTURES),
    ("pose", "fp32", changed_weight(partial(largest_weight, prefix=""), 0.9), PICTURES),
    ("semantic", "fp32", unlisted_file, "integrity"),
    ("semantic", "w8a8", dropped(1.1), "miou drop"),
    ("pose", "w8a8", dropped(1.1), "pck@0.1 drop"),
    ("semantic", "fp32", other_value, "miou"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "precision", "fault", "check"), FAULTS)
def test_the_gate_names_a_fault(
    task: str, precision: str, fault: Fault, check: str, toys: ToyTasks, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(toys.bundle(task, precision), tmp_path / "bundle"))
    sign(folder, fault(folder, read_manifest(folder)))
    read_manifest(folder)
    scenes = toys.split(task, "val") if check.split()[0] in {row.metric for row in SERVED.values()} else None
    assert check in failed(folder, scenes)


def test_a_drop_that_is_allowed_passes(toys: ToyTasks, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toys.bundle("pose", "fp32"), tmp_path / "bundle"))
    sign(folder, dropped(0.9)(folder, read_manifest(folder)))
    assert failed(folder, toys.split("pose", "val")) == []


def test_pictures_with_other_classes_are_noticed(toys: ToyTasks) -> None:
    scenes = toys.split("pose", "val")
    other = replace(scenes, classes=scenes.classes[::-1])
    assert "label order" in failed(toys.bundle("pose", "fp32"), other)


def test_export_measures_once_and_the_gate_believes_that_of_no_other_file(
    toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    measure_task = data.measure_task

    def measure(task: Any, scenes: SceneSet, batches: Any) -> dict[str, Any]:
        measured.append(scenes)
        return measure_task(task, scenes, batches)

    monkeypatch.setattr(data, "measure_task", measure)
    network, info = toys.load("pose", "fp32")
    scenes = toys.split("pose", "val")
    folder = export(network, tmp_path / "bundle", info=info, images=scenes, float_metric=0.0)
    assert measured == [scenes]
    given = evaluation(folder, scenes)
    assert given is not None
    worse = Measured({"pck@0.1": -0.5}, read_manifest(folder).files["model.onnx"])
    rows = verify_bundle(folder, replace(given, measured=worse))["checks"]
    assert [row["name"] for row in rows if row["passed"] is False] == ["pck@0.1 drop"]
    assert len(measured) == 1
    assert verify_bundle(folder, replace(given, measured=replace(worse, sha256="of another file")))["passed"]
    assert len(measured) == 2


@pytest.mark.parametrize("name", ["bundle.json", "model.onnx", "golden.npz", "verify.json"])
def test_a_missing_file_is_named(name: str, toys: ToyTasks, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toys.bundle("semantic", "fp32"), tmp_path / "bundle"))
    (folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        Predictor(folder)
    assert failed(folder) == ["integrity"]


def test_a_flipped_bit_anywhere_is_noticed(toys: ToyTasks, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toys.bundle("pose", "w8a8"), tmp_path / "bundle"))
    files = sorted(path for path in folder.iterdir() if path.is_file())
    generator = np.random.default_rng(0)
    for number in range(20):
        file = files[number % len(files)]
        data = file.read_bytes()
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] ^= 1 << generator.integers(8)
        file.write_bytes(damaged)
        with pytest.raises(LeanvitError, match=file.name):
            read_manifest(folder)
        file.write_bytes(data)
    assert failed(folder) == []


# --- benchmark ---


def test_benchmark_times_task_bundles_and_refuses_their_checkpoints(toys: ToyTasks) -> None:
    targets = [describe(toys.bundle("segment", precision)) for precision in ("fp32", "w8a8")]
    assert [target.precision for target in targets] == ["fp32", "w8a8"]
    results = benchmark(targets, batch_sizes=(1, 9), threads=1, rounds=3)["results"]
    assert [row["batch_size"] for row in results] == [1, 1, 9, 9]
    assert all(row["median_ms"] > 0 and row["runs"] >= 3 for row in results)
    with pytest.raises(CheckpointError, match="expected a classifier"):
        benchmark([describe(toys.run("segment"))], batch_sizes=(1,), threads=1, rounds=3)
