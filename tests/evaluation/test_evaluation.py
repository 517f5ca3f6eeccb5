"""Evaluation: scores against scikit-learn and loops in plain Python, shifts against classifiers that are understood."""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics

import leanvit.evaluation.run as run_module
from common import LABELS, ROOT, Outcome
from leanvit.checkpoint import CheckpointInfo, preprocess_for, save_checkpoint
from leanvit.cli import parse
from leanvit.config import IMAGENET_MEAN, IMAGENET_STD, MPTQConfig, Preprocess, ValConfig, from_dict, load_yaml
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.errors import ConfigError, DataError, NumericalError, ShapeError
from leanvit.evaluation import (
    CORRUPTIONS,
    calibration,
    class_scores,
    confusion_matrix,
    corrupt,
    corrupted_accuracy,
    evaluate_detailed,
    network_predict,
    predictions,
    shift_robustness,
    translate,
)
from leanvit.evaluation.corruptions import parameters
from leanvit.evaluation.measure import shifts_at
from leanvit.evaluation.plan import conditions
from leanvit.quant import quantize
from leanvit.quant.store import save_quantized

Run = Callable[..., Outcome]


def random_logits(images: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, images)
    logits = rng.normal(0, 2, (images, classes)).astype(np.float32)
    logits[np.arange(images), labels] += 1.5
    return logits, labels


def batches_of(pixels: np.ndarray, labels: np.ndarray, size: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(pixels[i : i + size], labels[i : i + size]) for i in range(0, len(pixels), size)]


def fixed_logits(logits: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Images that carry their own number, and a model that gives the logits of that number."""
    pixels = np.zeros((len(logits), 4, 4, 3), np.uint8)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = np.arange(len(logits)) % 256, np.arange(len(logits)) // 256
    return pixels, lambda images: logits[images[:, 0, 0].astype(int) @ (1, 256, 0)]


VALUES = st.floats(-90, 90, width=32)


# --- scores ------------------------------------------------------------------------------------------------------


@given(
    logits=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=VALUES),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_answers_are_those_of_a_loop_in_float64(logits: np.ndarray, seed: int) -> None:
    labels = np.random.default_rng(seed).integers(0, logits.shape[1], len(logits))
    found = predictions(logits, labels)
    for index, (row, label) in enumerate(zip(logits.astype(float).tolist(), labels.tolist(), strict=True)):
        order = sorted(range(len(row)), key=lambda c, row=row: (-row[c], c))
        exponents = [math.exp(value - max(row)) for value in row]
        assert found.predicted[index] == order[0]
        assert found.rank[index] == order.index(label)
        assert found.correct[index] == (order[0] == label)
        assert found.confidence[index] == pytest.approx(exponents[order[0]] / sum(exponents), rel=1e-12)
        assert found.loss[index] == pytest.approx(math.log(sum(exponents)) + max(row) - row[label], abs=1e-11)


@pytest.mark.parametrize("classes", [2, 3, 7, 40])
def test_accuracy_is_scikit_learn_s(classes: int) -> None:
    logits, labels = random_logits(300, classes)
    pixels, predict = fixed_logits(logits)
    found = evaluate_detailed(predict, batches_of(pixels, labels, 64), [str(i) for i in range(classes)])
    z = logits.astype(float)
    predicted = logits.argmax(1)
    every = np.arange(classes)
    probability = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert found.top1 == pytest.approx(100 * metrics.accuracy_score(labels, predicted))
    expected5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=every) if classes > 5 else 1.0
    assert found.top5 == pytest.approx(100 * expected5)
    assert found.loss == pytest.approx(metrics.log_loss(labels, probability, labels=every), rel=1e-9)
    assert np.array_equal(found.confusion, metrics.confusion_matrix(labels, predicted, labels=every))
    assert found.images == 300
    assert found.correct == (predicted == labels).sum()
    precision, recall, _, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=every, zero_division=np.nan
    )
    for index, entry in enumerate(found.classes):
        assert entry.images == support[index]
        assert entry.recall is None if math.isnan(recall[index]) else entry.recall == pytest.approx(100 * recall[index])
        assert (
            entry.precision is None
            if math.isnan(precision[index])
            else entry.precision == pytest.approx(100 * precision[index])
        )
    assert found.balanced == pytest.approx(100 * np.nanmean(recall))


def expected_error(confidence: Sequence[float], correct: Sequence[bool], bins: int) -> float:
    total = 0.0
    for m in range(bins):
        inside = [
            i for i, c in enumerate(confidence) if m / bins < c <= (m + 1) / bins or (m == 0 and c == 0.0)
        ]  # fmt: skip
        if inside:
            mean = math.fsum(confidence[i] for i in inside) / len(inside)
            right = sum(correct[i] for i in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(right - mean)
    return total


@given(
    values=st.lists(
        st.tuples(st.one_of(st.floats(0, 1), st.integers(0, 15).map(lambda i: i / 15)), st.booleans()), min_size=1
    ),
    bins=st.sampled_from([1, 10, 15]),
)
def test_the_calibration_error_is_that_of_its_definition(values: list[tuple[float, bool]], bins: int) -> None:
    confidence, correct = [c for c, _ in values], [r for _, r in values]
    found = calibration(np.array(confidence), np.array(correct), bins)
    assert found.ece == pytest.approx(expected_error(confidence, correct, bins), abs=1e-12)
    assert len(found.bins) == bins
    assert sum(entry.images for entry in found.bins) == len(values)
    for entry in found.bins:
        assert (entry.images == 0) == (entry.accuracy is None) == (entry.confidence is None)
        if entry.confidence is not None:
            assert entry.low - 1e-12 <= entry.confidence <= entry.high + 1e-12


def test_a_model_that_is_right_as_often_as_it_says_has_no_calibration_error() -> None:
    confidence = np.repeat([0.25, 0.75], 400)
    correct = np.tile([True, False, False, False], 100), np.tile([True, True, True, False], 100)
    assert calibration(confidence, np.concatenate(correct)).ece == pytest.approx(0.0, abs=1e-12)
    assert calibration(confidence, np.ones(800, bool)).ece == pytest.approx(0.5)


def test_equal_logits_go_to_the_first_class_and_the_first_five() -> None:
    labels = np.arange(8)
    found = predictions(np.zeros((8, 8), np.float32), labels)
    assert found.predicted.tolist() == [0] * 8
    assert found.rank.tolist() == labels.tolist()
    assert np.allclose(found.confidence, 1 / 8)


def test_one_class_is_always_right() -> None:
    pixels, predict = fixed_logits(np.array([[3.0], [-2.0]], np.float32))
    found = evaluate_detailed(predict, [(pixels, np.zeros(2, np.int64))], ["only"])
    assert (found.top1, found.top5, found.loss, found.calibration.ece) == (100.0, 100.0, 0.0, 0.0)


def test_a_class_without_images_has_no_recall_and_one_never_called_no_precision() -> None:
    labels, predicted = np.array([0, 0, 2]), np.array([0, 1, 1])
    scores = class_scores(confusion_matrix(labels, predicted, 3), ["a", "b", "c"])
    assert [(s.images, s.predicted, s.correct) for s in scores] == [(2, 1, 1), (0, 2, 0), (1, 0, 0)]
    assert [(s.recall, s.precision) for s in scores] == [(50.0, 100.0), (None, 0.0), (0.0, None)]
    logits = np.eye(3, dtype=np.float32)[predicted]
    pixels, predict = fixed_logits(logits)
    assert evaluate_detailed(predict, [(pixels, labels)], ["a", "b", "c"]).balanced == 25.0


def test_batches_do_not_matter_and_tensors_are_taken_as_well() -> None:
    logits, labels = random_logits(30, 6)
    pixels, predict = fixed_logits(logits)
    names = list("abcdef")
    one, many = (evaluate_detailed(predict, batches_of(pixels, labels, n), names) for n in (30, 7))
    tensors = [(torch.from_numpy(p), torch.from_numpy(y)) for p, y in batches_of(pixels, labels, 7)]
    for other in (many, evaluate_detailed(predict, tensors, names)):
        assert (one.top1, one.top5, one.calibration) == (other.top1, other.top5, other.calibration)
        assert np.array_equal(one.predictions.predicted, other.predictions.predicted)


def test_the_first_call_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random_logits(6, 3)
    pixels, predict = fixed_logits(logits)
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    costs = iter([100.0, 1.0, 2.0, 3.0])

    def slow(images: np.ndarray) -> np.ndarray:
        clock[0] += next(costs)
        return predict(images)

    assert evaluate_detailed(slow, batches_of(pixels, labels, 2), list("abc")).images_per_second == 6 / 6.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_an_error_that_says_where(bad: float) -> None:
    logits, labels = random_logits(8, 3)
    logits[5, 1] = bad
    pixels, predict = fixed_logits(logits)
    batches = batches_of(pixels, labels)
    with pytest.raises(NumericalError, match="logits on the images are NaN or infinite, expected finite"):
        evaluate_detailed(predict, batches, list("abc"))
    with pytest.raises(NumericalError, match="images with contrast 2"):
        corrupted_accuracy(lambda images: np.full((len(images), 3), bad), batches, "contrast", 2)
    with pytest.raises(NumericalError, match=r"images shifted by \(0, 0\)"):
        shift_robustness(predict, batches, 1)


def test_no_images_wrong_labels_and_wrong_shapes_are_named() -> None:
    pixels, predict = fixed_logits(random_logits(4, 3)[0])
    for nothing in ([], [(pixels[:0], np.zeros(0, np.int64))]):
        with pytest.raises(DataError, match="no image could be read"):
            evaluate_detailed(predict, nothing, list("abc"))
        with pytest.raises(DataError, match="no image could be read"):
            shift_robustness(predict, nothing, 1)
    for label in (-1, 3):
        with pytest.raises(DataError, match=r"labels are .*, expected 0 to 2"):
            evaluate_detailed(predict, [(pixels, np.array([0, 1, 2, label]))], list("abc"))
    with pytest.raises(ShapeError, match=r"\(4, 3\), expected \(images, 2\)"):
        evaluate_detailed(predict, [(pixels, np.zeros(4, np.int64))], list("ab"))
    with pytest.raises(ShapeError, match=r"expected \(4, classes\)"):
        predictions(np.zeros((3, 2)), np.zeros(4, np.int64))
    with pytest.raises(DataError, match="no images"):
        calibration(np.zeros(0), np.zeros(0, bool))


# --- corrupted and shifted images ----------------------------------------------------------------------------------


def test_corrupted_images_are_those_of_their_place_in_the_data() -> None:
    rng = np.random.default_rng(1)
    pixels, labels = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8), np.zeros(9, np.int64)
    for size in (2, 9):
        seen = []

        def predict(images: np.ndarray, seen: list[np.ndarray] = seen) -> np.ndarray:
            seen.append(images)
            return np.tile(np.float32([1, 0]), (len(images), 1))

        row = corrupted_accuracy(predict, batches_of(pixels, labels, size), "gaussian_noise", 4, seed=3)
        assert np.array_equal(np.concatenate(seen), corrupt(pixels, "gaussian_noise", 4, seed=3))
    assert (row.top1, row.correct, row.images) == (100.0, 9, 9)
    assert row.ece == pytest.approx(1 - 1 / (1 + math.exp(-1)))
    assert row.loss == pytest.approx(math.log(1 + math.exp(-1)))


@given(
    down=st.integers(-4, 4), right=st.integers(-4, 4), height=st.integers(5, 9), width=st.integers(5, 9),
    padding=st.sampled_from([("edge", "edge"), ("reflect", "reflect"), ("zero", "constant")]),
)  # fmt: skip
def test_a_translation_is_a_roll_of_the_padded_image(
    down: int, right: int, height: int, width: int, padding: tuple[Any, Any]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)), padding[1])
    expected = np.roll(padded, (down, right), axis=(1, 2))[:, 4 : 4 + height, 4 : 4 + width]
    assert np.array_equal(translate(images, down, right, padding[0]), expected)


def test_a_constant_classifier_is_consistent() -> None:
    rng = np.random.default_rng(2)
    pixels, labels = rng.integers(0, 256, (6, 9, 9, 3), dtype=np.uint8), np.array([1, 1, 0, 2, 1, 0])
    rows = shift_robustness(lambda x: np.tile(np.float32([0, 5, 1]), (len(x), 1)), batches_of(pixels, labels), 3)
    assert [row.distance for row in rows] == [0, 1, 2, 3]
    assert [row.shifts for row in rows] == [1, 8, 8, 8]
    assert {(row.top1, row.agreement, row.consistency) for row in rows} == {(50.0, 100.0, 100.0)}


def test_a_classifier_of_the_column_s_parity_has_the_consistency_that_can_be_counted() -> None:
    pixels = np.zeros((3, 9, 9, 3), np.uint8)
    pixels[:, 4, 4] = 255

    def parity(images: np.ndarray) -> np.ndarray:
        return np.eye(2, dtype=np.float32)[images[..., 0].max(1).argmax(1) % 2]

    rows = shift_robustness(parity, [(pixels, np.zeros(3, np.int64))], 2, "zero")
    # By 1 pixel: 2 of 8 shifts leave the column; with the image itself 3 and 6 of 9 agree: (3 + 15) of 36 pairs.
    assert (rows[1].top1, rows[1].agreement, rows[1].consistency) == (25.0, 25.0, 50.0)
    # By 2 pixels all 8 have the parity of the image: 11 and 6 of 17 agree, (55 + 15) of 136 pairs.
    assert (rows[2].top1, rows[2].agreement) == (100.0, 100.0)
    assert rows[2].consistency == pytest.approx(100 * 70 / 136)


def test_consistency_is_that_of_all_pairs_counted_one_by_one() -> None:
    rng = np.random.default_rng(4)
    pixels, labels = rng.integers(0, 256, (7, 8, 8, 3), dtype=np.uint8), rng.integers(0, 4, 7)

    def predict(images: np.ndarray) -> np.ndarray:
        sums = images[:, :3, :3].astype(int).sum((1, 2, 3))
        return np.eye(4, dtype=np.float32)[sums // 7 % 4]

    distance = 2
    rows = shift_robustness(predict, batches_of(pixels, labels, 3), distance, "reflect")
    called = {
        shift: predict(translate(pixels, *shift, "reflect")).argmax(1) for d in range(3) for shift in shifts_at(d)
    }
    assert len(called) == 17
    assert all(max(map(abs, shift)) <= distance for shift in called)
    for row in rows:
        near = [shift for shift in called if max(map(abs, shift)) <= row.distance]
        pairs = [float((called[a] == called[b]).mean()) for a, b in itertools.combinations(near, 2)]
        own = [called[shift] for shift in near if max(map(abs, shift)) == row.distance]
        assert row.consistency == pytest.approx(100 * np.mean(pairs) if pairs else 100.0)
        assert row.top1 == pytest.approx(100 * np.mean([(c == labels).mean() for c in own]))
        assert row.agreement == pytest.approx(100 * np.mean([(c == called[0, 0]).mean() for c in own]))
    assert 0 < rows[2].consistency < 100


def test_a_shift_that_leaves_nothing_of_an_image_is_refused() -> None:
    pixels, predict = fixed_logits(random_logits(2, 2)[0])
    with pytest.raises(ConfigError, match="shifts is 4, expected less than the images' side of 4 pixels"):
        shift_robustness(predict, [(pixels, np.zeros(2, np.int64))], 4)


# --- models --------------------------------------------------------------------------------------------------------


def test_a_network_answers_in_eval_mode_to_normalised_pixels() -> None:
    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x.mean((2, 3)), torch.full((len(x), 1), float(self.training))], 1)

    size = Preprocess(input_size=(4, 5), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 5, 3), dtype=np.uint8)[:, 2:6]
    expected = (pixels.mean((1, 2)) / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    found = network_predict(Mean().train(), size)(pixels)
    assert found.dtype == np.float32
    assert np.allclose(found, np.concatenate([expected, np.zeros((3, 1))], 1), atol=1e-5)


def test_the_measures_import_no_torch() -> None:
    code = "import sys, leanvit.evaluation; print({'torch', 'timm', 'torchvision'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- docs/evaluate.md ------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")


def test_the_page_runs_and_its_commands_are_commands() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    lines = "".join(re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    assert len(lines) >= 6
    for line in lines:
        program, verb, *arguments = shlex.split(line.removeprefix("$ "))
        assert program == "leanvit"
        parse(verb, arguments)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_page_has_the_parameters_that_count(name: str) -> None:
    (cells,) = re.findall(rf"^\| `{name}` \| [^|]*\| ([^|]*) \| ([^|]*) \|$", PAGE, re.MULTILINE)
    for text, side in zip(cells, (28, 224), strict=True):
        told = [ast.literal_eval(value) for value in re.findall(r"\([^)]*\)|[\d.]+", text)]
        assert told == list(parameters((side, side))[name])


# --- leanvit val -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    """What --threads sets holds for the process, which other tests share."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(image_folder: Callable[..., Path]) -> Path:
    return image_folder("labelled", **dict.fromkeys(LABELS, 10))


@pytest.fixture
def checkpoint(micro_model: torch.nn.Module, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_checkpoint(path, micro_model, CheckpointInfo("revit_micro", LABELS, preprocess_for(micro_model)))
    return path


FULL = ["--corruptions", "shot_noise", "jpeg_compression", "--severities", "5", "2", "--shifts", "1", "--threads", "1"]


def test_a_checkpoint_and_its_bundle_give_the_same_numbers(
    folder: Path, checkpoint: Path, shared_bundle: Path, tmp_path: Path, leanvit: Run
) -> None:
    found = []
    for name, model in (("a", checkpoint), ("b", shared_bundle)):
        done = leanvit("val", model, "--data", folder, *FULL, "--output", tmp_path / name, "--json")
        assert done.code == 0, done.err
        printed, saved = json.loads(done.out), json.loads((tmp_path / name / "val.json").read_text())
        assert printed == saved
        found.append(saved)
    a, b = found
    assert (a["images"], a["complete"], a["kind"], b["kind"]) == (20, True, "checkpoint", "bundle")
    assert "onnxruntime" in b["runtime"]
    assert "PyTorch" in a["runtime"]
    for key in ("top1", "top5", "correct", "classes", "confusion", "balanced_accuracy", "shifts"):
        assert a[key] == b[key], key
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert a["calibration"]["ece"] == pytest.approx(b["calibration"]["ece"], abs=1e-4)
    assert [r["correct"] for r in a["corruptions"]["rows"]] == [r["correct"] for r in b["corruptions"]["rows"]]
    assert [(r["name"], r["severity"]) for r in a["corruptions"]["rows"]] == [
        ("shot_noise", 2), ("shot_noise", 5), ("jpeg_compression", 2), ("jpeg_compression", 5),
    ]  # fmt: skip
    assert a["corruptions"]["mean_top1"] == pytest.approx(np.mean([r["top1"] for r in a["corruptions"]["rows"]]))
    assert (a["corruptions"]["parameters"], a["shifts"]["pixels"], a["shifts"]["padding"]) == ("CIFAR-10-C", 1, "edge")
    assert len(a["shifts"]["rows"]) == 2
    assert a["throughput"]["threads"] == b["throughput"]["threads"] == 1
    for name in ("a", "b"):
        assert sorted(p.name for p in (tmp_path / name).iterdir() if p.name != ".lock") == [
            "config.yaml", "predictions.csv", "val.json",
        ]  # fmt: skip


def test_a_quantized_model_is_measured_as_simulated(folder: Path, tmp_path: Path, leanvit: Run) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_micro", num_classes=10, depth=1).eval()
    info = CheckpointInfo("vit_micro", LABELS, preprocess_for(model), kwargs={"depth": 1})
    pixels, labels = next(iter(Loader(load_split(str(folder), "val"), info.preprocess, 20)))
    config = MPTQConfig(weight_bits=3, activation_bits=3, smoothing="none", range_search=False, ratio_search=False)
    quantized = quantize(model, to_input(pixels, info.preprocess), config)
    save_quantized(tmp_path / "w3a3", quantized, info)
    done = leanvit("val", tmp_path / "w3a3", "--data", folder, "--detailed", "--json")
    assert done.code == 0, done.err
    values = json.loads(done.out)
    with torch.no_grad():
        called = quantized.module(to_input(pixels, info.preprocess)).argmax(1)
        as_float = model(to_input(pixels, info.preprocess)).argmax(1)
    assert not torch.equal(called, as_float), "3 bits change some answer, or the test says nothing"
    pairs = Counter(zip(labels.tolist(), called.tolist(), strict=True))
    assert values["confusion"] == [[*pair, images] for pair, images in sorted(pairs.items())]
    assert (values["kind"], values["throughput"]["simulated"]) == ("quantized model", True)
    assert "simulated low bits" in leanvit("val", tmp_path / "w3a3", "--data", folder, "--detailed").out


def test_the_saved_files_say_the_same(folder: Path, checkpoint: Path, tmp_path: Path, leanvit: Run) -> None:
    arguments = ["val", str(checkpoint), "--data", str(folder), "--output", str(tmp_path / "out"), "--limit", "15"]
    done = leanvit(*arguments)
    assert done.code == 0, done.err
    values = json.loads((tmp_path / "out" / "val.json").read_text())
    config = from_dict(ValConfig, load_yaml(tmp_path / "out" / "config.yaml"))
    assert (config.limit, config.output, config.model) == (15, str(tmp_path / "out"), str(checkpoint))
    split = load_split(str(folder), "val")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "predictions.csv").read_text())))
    assert len(rows) == values["images"] == 15
    for row in rows:
        index = int(row["index"])
        assert row["image"] == split.name_of(index)
        assert row["label"] == split.classes[split.labels[index]]
        assert 0.1 <= float(row["confidence"]) <= 1
    assert sum(row["label"] == row["predicted"] for row in rows) == values["correct"]
    assert sum(images for _, _, images in values["confusion"]) == 15
    assert len({row["label"] for row in rows}) > 5, "a limit takes images of many classes"
    assert values["command"] == " ".join(
        ["leanvit", *arguments[:4], "--limit", "15", "--output", str(tmp_path / "out")]
    )
    assert values["throughput"]["batch_size"] == 128
    assert values["throughput"]["threads"] == torch.get_num_threads()
    assert f"top-1 {values['top1']:.2f}%" in done.out
    assert "each class" in done.out
    assert "leanvit report" in done.err


def test_plain_val_prints_what_it_always_did(
    folder: Path, checkpoint: Path, shared_bundle: Path, micro_model: torch.nn.Module, leanvit: Run
) -> None:
    split = load_split(str(folder), "val")
    pixels, labels = next(iter(Loader(split, preprocess_for(micro_model), 99)))
    x = pixels.permute(0, 3, 1, 2).double() / 255
    normal = preprocess_for(micro_model)
    x = (x - torch.tensor(normal.mean).view(3, 1, 1)) / torch.tensor(normal.std).view(3, 1, 1)
    with torch.no_grad():
        order = micro_model(x.float()).argsort(1, descending=True)
    right, right5 = int((order[:, 0] == labels).sum()), int((order[:, :5] == labels[:, None]).sum())
    line = f"top-1 {5 * right:.2f}%  top-5 {5 * right5:.2f}%  ({right} of 20 images)\n"
    for model in (checkpoint, shared_bundle):
        assert leanvit("val", model, "--data", folder).out == line
        found = json.loads(leanvit("val", model, "--data", folder, "--json").out)
        assert list(found) == ["top1", "top5", "loss", "images", "correct"]
    assert leanvit("val", checkpoint, "--data", folder, "--limit", "7").out.endswith("of 7 images)\n")


def test_a_bad_image_stops_or_is_left_out_and_counted(
    folder: Path, checkpoint: Path, tmp_path: Path, leanvit: Run
) -> None:
    victim = Path(load_split(str(folder), "val").name_of(3))
    victim.write_bytes(b"no image")
    arguments = ["val", checkpoint, "--data", folder, "--shifts", "1", "--output", tmp_path / "out"]
    done = leanvit(*arguments)
    assert done.code == 3
    assert str(victim) in done.error
    done = leanvit(*arguments, "--bad-images", "skip")
    assert done.code == 6, done.err
    values = json.loads((tmp_path / "out" / "val.json").read_text())
    assert (values["images"], values["left_out"]) == (19, [str(victim)])
    assert "1 images could not be read" in done.out
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "predictions.csv").read_text())))
    assert [int(row["index"]) for row in rows] == [i for i in range(20) if i != 3]
    assert str(victim) not in {row["image"] for row in rows}


def test_a_bad_image_is_left_out_where_a_limit_has_left_out_classes(
    folder: Path, checkpoint: Path, leanvit: Run
) -> None:
    config = ValConfig(model=str(checkpoint), data=str(folder), limit=8)
    images, _ = run_module.read_images(config, {})
    twice = np.flatnonzero(np.bincount(images.labels) == 2)
    assert len(twice)
    assert len(set(images.labels.tolist())) < len(LABELS)
    victim = images.name_of(int(np.flatnonzero(images.labels == twice[0])[0]))
    Path(victim).write_bytes(b"no image")
    done = leanvit("val", checkpoint, "--data", folder, "--limit", "8", "--bad-images", "skip", "--detailed", "--json")
    assert done.code == 6, done.err
    values = json.loads(done.out)
    assert (values["images"], values["left_out"]) == (7, [victim])
    assert sum(entry["recall"] is None for entry in values["classes"]) >= 2


def test_an_interruption_keeps_what_was_measured(
    folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvit: Run
) -> None:
    real = run_module.corrupted_accuracy

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if "contrast" in arguments:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(run_module, "corrupted_accuracy", interrupted)
    out = tmp_path / "out"
    arguments = ["val", checkpoint, "--data", folder, "--corruptions", "contrast", "brightness", "--severities", "1"]
    done = leanvit(*arguments, "--output", out)
    assert done.code == 130
    values = json.loads((out / "val.json").read_text())
    assert values["complete"] is False
    assert values["images"] == 20
    assert [row["name"] for row in values["corruptions"]["rows"]] == ["brightness"]
    assert (out / "predictions.csv").is_file()
    assert leanvit("report", out).code == 0
    assert "interrupted: not all that was asked for is measured" in (out / "report.html").read_text()


def test_all_means_every_corruption_once() -> None:
    config = ValConfig(model="m", corruptions=["contrast", "all"], severities=[3, 3])
    assert conditions(config) == [(name, 3) for name in CORRUPTIONS]


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--runtime", "openvino"], 2, "runtime is openvino, but"),
        (["--runtime", "openvino", "--detailed"], 2, "Make one: leanvit export"),
        (["--shifts", "32"], 2, "shifts is 32, expected less than the images' side of 32 pixels"),
        (["--corruptions", "fog"], 2, "gaussian_noise"),
        (["--severities", "0", "--corruptions", "all"], 2, "severities is [0], expected some of 1 2 3 4 5"),
        (["--detailed", "--data", "digits"], 3, "digits has classes 0, 1, 2, 3... (10), the model was trained on"),
        (["--detailed", "--split", "test"], 3, "no part 'test'"),
    ],
)
def test_what_can_not_be_measured_is_said_in_one_line(
    flags: list[str], code: int, words: str, folder: Path, checkpoint: Path, leanvit: Run
) -> None:
    done = leanvit("val", checkpoint, *([] if "--data" in flags else ["--data", folder]), *flags)
    assert done.code == code
    assert words in done.error
