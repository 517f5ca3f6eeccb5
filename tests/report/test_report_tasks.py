"""The report of the tasks: curves, metrics, parts and pictures are those of the files, whatever is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from common import Outcome, save_image, smooth
from leanvit import imaging
from leanvit.annotations import Found, Scene, SceneSet
from leanvit.checkpoint import CheckpointInfo
from leanvit.commands import report as pictures
from leanvit.commands.report import golden_findings, photographs
from leanvit.config import Preprocess
from leanvit.errors import BundleError, DataError
from leanvit.export.gate.golden import GOLDEN_PICTURES, charts, golden_images
from leanvit.report import Pictures, write_report
from leanvit.report.pictures import Shot
from leanvit.runtime.bundle import save_golden
from leanvit.runtime.task_of import description_of, task_of
from pages import SCRIPT, Page, draw, make_run, picture, replaced, rows_of

Run = Callable[..., Outcome]
CLASSES = ("cat", "dog", "<eel> & co")
KEYPOINTS = ("nose", "tail")


def metrics_of(task: str, shift: float = 0.0) -> dict[str, Any]:
    """Metrics as leanvit.runtime.task.measure_task returns them."""
    if task == "semantic":
        return {"miou": 0.61 - shift, "pixel_accuracy": 0.9, "mean_accuracy": 0.7, "per_class": [0.8, 0.4123, None],
                "pictures": 7}  # fmt: skip
    if task == "pose":
        return {"pck@0.1": 0.77 - shift, "pck_per_keypoint": [0.9, 0.6432], "oks_AP": 0.31, "oks_AP50": 0.5,
                "oks_APl": None, "oks_per_class": {"cat": 0.55, "dog": None}, "objects": 21}  # fmt: skip
    found = {"box_AP": 0.31 - shift, "box_AP50": 0.52 - shift, "box_APl": None,
             "box_per_class": {"cat": 0.7, "dog": 0.3456, "<eel> & co": None}, "pictures": 7}  # fmt: skip
    if task == "segment":
        found |= {"mask_AP": 0.28 - shift, "mask_AP50": 0.4711 - shift, "mask_per_class": dict.fromkeys(CLASSES, 0.2)}
    return found


METRIC = {"detect": "box_AP50", "segment": "mask_AP50", "semantic": "miou", "pose": "pck@0.1"}


def train_values(task: str, epochs: int = 4, best: int = 3) -> dict[str, Any]:
    history = []
    for epoch in range(1, epochs + 1):
        metrics = metrics_of(task, 0.01 * abs(epoch - best))
        row = {"epoch": epoch, "lr": 1e-3 / epoch, "train_loss": 2.0 / epoch, "loss_classifier": 1.5 / epoch,
               "loss_mask": 0.5 / epoch, "metric": metrics[METRIC[task]], "metrics": metrics, "seconds": 40.0,
               "cpu_seconds": 45.0}  # fmt: skip
        history.append(row)
    return {"task": task, "architecture": "vitaev2_micro", "parameters": 1630249, "data": "scenes",
            "train_pictures": 30, "val_pictures": 7, "metric": METRIC[task], "autocast": "bfloat16", "device": "cpu",
            "seed": 0, "cpu_seconds": 45.0 * epochs, "problems": [], "history": history}  # fmt: skip


def network_values(task: str = "segment") -> dict[str, dict[str, Any]]:
    """quantize.json of a network and of its parts."""
    sites = {"pyramid": [25.0, 12.5, 40.0], "box": [41.25, 200.0], "mask": [-10.25]}
    files = {
        f"{part}/quantize.json": {
            "sites": [{"name": f"{part}_site{i}", "sqnr_db": db, "macs": 1_500_000} for i, db in enumerate(levels)],
            "quantized_bytes": 100_000, "float_bytes": 400_000, "calibration": {"images": 64},
            "unquantized": ["aten.bmm in x"] if part == "mask" else [],
        }
        for part, levels in sites.items()
    }  # fmt: skip
    files["quantize.json"] = {
        "task": task, "data": "scenes", "metric": METRIC[task], "float_metrics": metrics_of(task),
        "metrics": metrics_of(task, 0.005), "quantized_bytes": 1_853_724, "float_bytes": 6_520_996,
        "config": {"weight_bits": 8, "activation_bits": 8, "smoothing": "sq-b"},
        "parts": {part: len(levels) for part, levels in sites.items()},
    }  # fmt: skip
    return files


def bundle_values(task: str = "segment") -> dict[str, Any]:
    metrics = metrics_of(task)
    return {"architecture": "vitaev2_micro", "profile": "w8a8", "labels": list(CLASSES), "task": task,
            "preprocess": {"input_size": [32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "interpolation": "bilinear",
                           "crop_mode": "letterbox", "crop_pct": 1.0},
            "accuracy": {"data": "scenes/val.json", "metric": METRIC[task], "value": metrics[METRIC[task]],
                         "metrics": metrics, "runtime": "onnxruntime", "float": 0.4755, "max_drop": 1.0},
            "answers": {"keypoints": {"names": list(KEYPOINTS)}}, "files": {}, "input": {"name": "images"}}  # fmt: skip


def checkpoint(path: Path, **changes: Any) -> Path:
    """A safetensors file that says of itself what a checkpoint of a task does."""
    says = {"labels": list(CLASSES), "task": "semantic", "keypoints": {"names": list(KEYPOINTS)}, **changes}
    save_file({"x": np.zeros(1, np.float32)}, path, {"leanvit": json.dumps(says)})
    return path


# --- training, evaluation, quantization ---


@pytest.mark.parametrize("task", METRIC)
def test_training_shows_the_best_epoch_and_all_its_metrics(tmp_path: Path, task: str) -> None:
    values = train_values(task)
    make_run(tmp_path, {"train.json": values})
    checkpoint(tmp_path / "model.safetensors", task=task)
    text = write_report(tmp_path).read_text()
    page = Page(text)
    assert page.headings() == ["Training", "How this was made"]
    best = values["history"][2]["metrics"]
    rows = {row[0]: row[-1] for row in rows_of(text) if len(row) == 3}
    for name, value in best.items():
        if isinstance(value, float) or (value is None and not name.endswith("objects")):
            assert rows[name] == ("–" if value is None else f"{value:.4f}"), name
    (picked,) = [row for row in text.split("<tr") if row.startswith(' class="pick"')]
    assert METRIC[task] in picked
    assert f"{best[METRIC[task]]:.4f} at epoch 3" in text
    assert "3.0 minutes of all threads" in text  # 4 epochs of 45 seconds
    assert "2 min 40 s for 4 epochs" in text
    assert '<a href="#training">Training</a>' in text


def test_every_epoch_and_every_part_of_the_loss_is_in_the_table(tmp_path: Path) -> None:
    values = train_values("segment")
    del values["history"][0]["metric"], values["history"][0]["metrics"]  # not validated
    text = draw(tmp_path, {"train.json": values})
    rows = [row for row in rows_of(text) if len(row) == 8]
    assert rows[0] == ["Epoch", "Training loss", "classifier", "mask", "mask_AP50", "Learning rate", "Seconds",
                       "CPU seconds"]  # fmt: skip
    assert rows[1] == ["1", "2.0000", "1.5000", "0.5000", "–", "0.001000", "40.0", "45.0"]
    assert rows[4][:5] == ["4", "0.5000", "0.3750", "0.1250", "0.4611"]


def test_curves_end_where_the_numbers_do(tmp_path: Path) -> None:
    page = Page(draw(tmp_path, {"train.json": train_values("detect")}))
    lines = [element["points"].split() for element in page.all("polyline")]
    assert [len(line) for line in lines] == [4, 4]
    heights = [[float(point.split(",")[1]) for point in line] for line in lines]
    assert heights[0] == sorted(heights[0])  # the loss falls, and y grows downwards
    assert min(range(4), key=heights[1].__getitem__) == 2


def test_classes_and_keypoints_have_the_names_of_the_checkpoint_beside(tmp_path: Path) -> None:
    make_run(tmp_path, {"train.json": train_values("semantic")})
    without = rows_of(write_report(tmp_path).read_text())
    assert ["Intersection over union", "1", "0.4123"] in without
    checkpoint(tmp_path / "model.safetensors")
    named = rows_of(write_report(tmp_path).read_text())
    assert ["Intersection over union", "dog", "0.4123"] in named
    assert ["Intersection over union", "&lt;eel&gt; &amp; co", "–"] in named
    make_run(tmp_path, {"train.json": train_values("pose")})
    assert ["Share of correct keypoints (PCK@0.1)", "tail", "0.6432"] in rows_of(write_report(tmp_path).read_text())
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert ["Share of correct keypoints (PCK@0.1)", "1", "0.6432"] in rows_of(write_report(tmp_path).read_text())


def test_many_classes_are_all_in_the_table_and_the_ends_in_the_chart(tmp_path: Path) -> None:
    values = train_values("semantic", 1, 1)
    values["history"][0]["metrics"]["per_class"] = [i / 100 for i in range(80)]
    text = draw(tmp_path, {"train.json": values})
    assert len([row for row in rows_of(text) if row[0] == "Intersection over union"]) == 80
    assert "the 15 best and 15 worst" in text
    assert "79: 0.790" in text
    assert "40: 0.400" not in text


def test_an_evaluation_is_drawn(tmp_path: Path) -> None:
    values = {"task": "segment", "model": "runs/a", "data": "scenes", "metric": "mask_AP50",
              "metrics": metrics_of("segment")}  # fmt: skip
    text = draw(tmp_path, {"val.json": values})
    assert Page(text).headings() == ["Evaluation", "How this was made"]
    assert ["mask_AP50", "masks: average precision at overlap 0.50", "0.4711"] in rows_of(text)
    assert "<h1>instance segmentation on scenes</h1>" in text


def test_quantization_shows_both_metrics_sizes_and_the_worst_site_of_each_part(tmp_path: Path) -> None:
    text = draw(tmp_path, network_values())
    assert Page(text).headings() == ["Quantization", "How this was made"]
    rows = rows_of(text)
    assert ["W8A8", "mask_AP50", "0.4711", "0.4661", "−0.50", "1.85", "0.28", "sq-b"] in rows
    assert ["box_AP50", "boxes: average precision at overlap 0.50", "0.5200", "0.5150", "−0.50"] in rows
    assert ["box_APl", "boxes: AP of objects above 96² pixels", "–", "–", "–"] in rows
    assert ["W8A8, pyramid", "3", "4.5", "0.100", "0.25", "64", "12.5 at pyramid_site1"] in rows
    assert ["W8A8, mask", "1", "1.5", "0.100", "0.25", "64", "−10.2 at mask_site0"] in rows
    assert ["pyramid.pyramid_site2", "40.0"] in rows
    assert "Worst sites of pyramid: 3 of 3" in text
    assert "lowest: W8A8 −10.2 dB" in text
    assert "not quantized, because no quantizer supports it: aten.bmm in x" in text
    assert "float 0.4711, −0.50 points" in text
    assert "<code>mask/quantize.json</code>" in text


def test_two_plans_stand_beside_each_other(tmp_path: Path) -> None:
    files = network_values()
    both = {f"quantize-{name}/{path}": json.loads(json.dumps(values)) for name in ("a", "b")
            for path, values in files.items()}  # fmt: skip
    both["quantize-b/quantize.json"]["config"]["weight_bits"] = 4
    both["quantize-b/pyramid/quantize.json"]["sites"][0]["sqnr_db"] = 3.0
    rows = rows_of(draw(tmp_path, both))
    assert ["pyramid.pyramid_site0", "25.0", "3.0"] in rows
    assert [row[0] for row in rows if row[1:2] == ["mask_AP50"]] == ["W8A8", "W4A8"]
    assert ["W4A8, pyramid", "3", "4.5", "0.100", "0.25", "64", "3.0 at pyramid_site0"] in rows


def test_only_the_worst_of_many_sites_are_drawn(tmp_path: Path) -> None:
    files = network_values()
    sites = [{"name": f"s{i}", "sqnr_db": float(60 - i), "macs": 1} for i in range(60)]
    files["pyramid/quantize.json"]["sites"] = sites
    text = draw(tmp_path, files)
    assert "Worst sites of pyramid: 8 of 60" in text
    assert all(f"s{i}, W8A8: {60 - i}.0 dB" in text for i in range(52, 60))
    assert "s51, W8A8" not in text
    assert ["pyramid.s51", "9.0"] in rows_of(text)


def test_a_whole_run_of_a_task_is_one_page(tmp_path: Path) -> None:
    verify = {"passed": True, "checks": [{"name": "golden objects", "passed": True, "found": "99%", "expected": "95%"}]}
    files = {"train/train.json": train_values("segment"), "bundle/bundle.json": bundle_values()}
    files |= {f"quantize/{name}": values for name, values in network_values().items()}
    page = Page(draw(tmp_path, files | {"bundle/verify.json": verify}))
    assert page.headings() == ["Training", "Quantization", "Bundle", "Verification gate", "How this was made"]


@pytest.mark.parametrize("task", METRIC)
def test_a_bundle_shows_its_metric_in_the_runtime(tmp_path: Path, task: str) -> None:
    values = bundle_values(task)
    text = draw(tmp_path, {"bundle.json": values})
    value = values["accuracy"]["value"]
    assert f"{METRIC[task]} {value:.4f} on scenes/val.json, float 0.4755, measured in onnxruntime" in text
    assert "whole picture at the top left, the rest grey" in text
    assert f"{METRIC[task]} in the runtime" in text
    assert any(row[0] == METRIC[task] and row[-1] == f"{value:.4f}" for row in rows_of(text))


@pytest.mark.parametrize("junk", [None, float("nan"), "text"])
def test_missing_numbers_are_a_dash_and_never_a_crash(tmp_path: Path, junk: Any) -> None:
    def change(value: Any) -> Any:
        return junk if isinstance(value, float) else value

    files = {"train.json": train_values("segment"), "bundle.json": bundle_values(), **network_values()}
    page = draw(tmp_path, replaced(files, change))
    assert not any(word in page.lower() for word in (">nan", "inf<", ">none"))


def test_text_from_files_is_escaped(tmp_path: Path) -> None:
    files = {"train.json": train_values("pose"), "bundle.json": bundle_values("pose"), **network_values("pose")}

    def change(value: Any) -> Any:
        return value if not isinstance(value, str) or value in METRIC else SCRIPT

    page = Page(draw(tmp_path, replaced(files, change)))
    assert page.all("script") == []


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("train.json", "{", BundleError),
        ("train.json", "[]", DataError),
        ("train.json", '{"task": "pose", "history": [{"epoch": 1, "metric": 0.5, "metrics": 3}]}', DataError),
        ("quantize.json", '{"task": "pose", "parts": {"network": 1}, "metrics": [1]}', DataError),
        ("network/quantize.json", "[]", DataError),
        ("bundle.json", '{"task": "pose", "accuracy": {"metrics": 5}}', DataError),
    ],
)
def test_a_broken_file_is_a_typed_error(tmp_path: Path, name: str, text: str, error: type[Exception]) -> None:
    make_run(tmp_path, {"quantize.json": {"task": "pose", "parts": {"network": 1}}, "network/quantize.json": {}})
    (tmp_path / name).write_text(text)
    with pytest.raises(error) as raised:
        write_report(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


# --- what files say of themselves ---


def test_descriptions_are_those_of_the_files(tmp_path: Path) -> None:
    checkpoint(tmp_path / "model.safetensors", task="pose")
    assert description_of(tmp_path)["labels"] == list(CLASSES)
    assert (task_of(tmp_path), task_of(tmp_path / "model.safetensors")) == ("pose", "pose")
    (tmp_path / "bundle.json").write_text(json.dumps(bundle_values("detect")))
    assert description_of(tmp_path)["answers"] == {"keypoints": {"names": list(KEYPOINTS)}}
    assert task_of(tmp_path) == "detect"
    for text in ("[1]", "5", "null", "{"):
        (tmp_path / "bundle.json").write_text(text)
        assert (description_of(tmp_path), task_of(tmp_path)) == ({}, "classify")
    assert description_of(tmp_path / "gone") == {}


# --- pictures ---


class FakePredictor:
    """Finds one object in the left half of every picture, whatever is in it."""

    def __init__(self, folder: Path, *, check: bool) -> None:
        self.manifest = type("Manifest", (), json.loads((folder / "bundle.json").read_text()))
        self.manifest.answers = {}
        self.runtime = "onnxruntime"
        assert not check  # the page of a bundle that fails its gate is drawn as well

    def predict(self, pixels: np.ndarray, *, score_threshold: float | None) -> Any:
        height, width = pixels.shape[:2]
        if self.manifest.task == "semantic":
            labels = np.zeros((height, width), np.uint8)
            labels[:, : width // 4] = 2
            return labels
        points = np.array([[width / 2, height / 2, 1.0]], np.float32) if self.manifest.task == "pose" else None
        return [Found(1, 0.875, (0.0, 0.0, width / 2, float(height)), keypoints=points)]


def scenes(folder: Path, count: int) -> SceneSet:
    made = [save_image(folder / f"{i}.png", smooth(500, 500, seed=i)) for i in range(count)]
    return SceneSet("set", tuple(Scene(path, i, (500, 500)) for i, path in enumerate(made)), CLASSES)


def task_bundle(folder: Path, task: str, count: int = 4) -> list[bytes]:
    """bundle.json and golden.npz as export writes them; returns the encoded pictures without the charts."""
    folder.mkdir()
    info = CheckpointInfo("vitaev2_micro", CLASSES, Preprocess((32, 32)))
    images = golden_images(scenes(folder, count), info.preprocess, GOLDEN_PICTURES)
    save_golden(folder, images, np.zeros((len(images), 3), np.float32))
    (folder / "bundle.json").write_text(json.dumps(bundle_values(task)))
    coloured = {imaging.encode_png(chart) for chart in charts(4, (32, 32))}
    return [image for image in images if image not in coloured]


@given(st.integers(1, 12))
def test_charts_are_told_from_pictures_as_export_orders_them(count: int) -> None:
    plain: list[str] = ["picture"] * count
    for i in range(pictures.CHARTS):
        plain.insert(2 * i + 1, "chart")
    assert photographs(len(plain)) == [i for i, kind in enumerate(plain) if kind == "picture"]


@pytest.mark.parametrize("count", [1, 3, 4, 6])
def test_every_golden_picture_but_no_chart_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(pictures, "Predictor", FakePredictor)
    wanted = task_bundle(tmp_path / "bundle", "detect", count)
    found = golden_findings(tmp_path)  # the bundle lies in bundle/
    assert found is not None
    assert len(found.shots) == len(wanted) == min(count, 4)
    for shot, image in zip(found.shots, wanted, strict=True):
        drawn, truth = imaging.decode(shot.image).pixels, imaging.decode(image).pixels
        assert drawn.shape == (500, 500, 3)
        assert (drawn[:, 260:] == truth[:, 260:]).all()  # nothing was found there
        assert (drawn[499, :200] != truth[499, :200]).any()  # the edge of the box
        assert shot.said == "1 dog"


@pytest.mark.parametrize(
    ("task", "said"), [("detect", "1 dog"), ("semantic", "cat 75%, &lt;eel&gt; &amp; co 25%"), ("pose", "1 object")]
)
def test_the_page_of_a_bundle_shows_its_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvit: Run, task: str, said: str
) -> None:
    monkeypatch.setattr(pictures, "Predictor", FakePredictor)
    task_bundle(tmp_path / "b", task)
    done = leanvit("report", tmp_path / "b")
    assert done.code == 0, done.err
    text = (tmp_path / "b" / "report.html").read_text()
    page = Page(text)
    assert page.headings()[:2] == ["What the bundle finds", "Bundle"]
    assert [image["alt"] for image in page.all("img")] == [
        f"Picture {i}: {said}".replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&") for i in range(1, 5)
    ]
    assert said in text
    assert all(picture(image["src"]).shape[1] == 500 for image in page.all("img"))


def test_a_large_picture_is_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "Predictor", FakePredictor)
    task_bundle(tmp_path / "b", "detect", 1)
    large = imaging.encode_png(smooth(900, 1800, seed=1))
    save_golden(tmp_path / "b", [large, *[imaging.encode_png(c) for c in charts(4, (32, 32))]], np.zeros((5, 3)))
    found = golden_findings(tmp_path / "b")
    assert found is not None
    assert imaging.decode(found.shots[0].image).pixels.shape == (320, 640, 3)


def test_why_there_are_no_pictures_stands_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvit: Run
) -> None:
    task_bundle(tmp_path / "b", "detect")
    done = leanvit("report", tmp_path / "b")  # bundle.json is not signed, so it can't be trusted to run
    assert done.code == 0, done.err
    assert "No pictures: " in (tmp_path / "b" / "report.html").read_text()
    assert "the file was changed or damaged" in (tmp_path / "b" / "report.html").read_text()
    monkeypatch.setattr(pictures, "is_installed", lambda module: False)
    assert leanvit("report", tmp_path / "b").code == 0
    assert "pip install &#34;leanvit[onnx]&#34;" in (tmp_path / "b" / "report.html").read_text()


def test_runs_without_a_bundle_of_a_task_have_no_pictures(tmp_path: Path, bundle: Path) -> None:
    assert golden_findings(bundle) is None
    assert golden_findings(tmp_path / "gone") is None


def test_words_at_pictures_are_escaped(tmp_path: Path) -> None:
    make_run(tmp_path, {"bundle.json": bundle_values()})
    image = imaging.encode_png(np.zeros((4, 4, 3), np.uint8))
    shown = Pictures((Shot(image, SCRIPT, SCRIPT),), SCRIPT)
    assert Page(write_report(tmp_path, pictures=shown).read_text()).all("script") == []
