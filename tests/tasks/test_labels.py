"""Sigmoid outputs, from a timm file to a bundle: several labels an image, and one logit; against scikit-learn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score

import leanvit as package
from common import save_image
from leanvit.checkpoint import preprocess_for
from leanvit.data.classes import agreed
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.data.sets.multi_label import load_multi_label
from leanvit.errors import ConfigError, DataError
from leanvit.files import read_json
from leanvit.load.api import load
from leanvit.runtime.bundle import read_manifest
from leanvit.runtime.tasks import labels as sigmoids

Run = Callable[..., Any]
NAMES = ("even", "large", "prime")
FLAGS = ("--calibration-images", 32, "--no-range-search", "--no-ratio-search")


def network_of(classes: int) -> Any:
    torch.manual_seed(0)
    network = timm.create_model("vit_micro", num_classes=classes).eval()
    with torch.no_grad():
        network.head.weight.mul_(20.0)
    return network


def weights(folder: Path, classes: int) -> Path:
    """As people have them: timm's own tensors."""
    folder.mkdir(exist_ok=True)
    save_file(network_of(classes).state_dict(), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def truth_of(digit: int) -> list[str]:
    return [name for name, yes in zip(NAMES, (digit % 2 == 0, digit > 4, digit in (2, 3, 5, 7)), strict=True) if yes]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """110 digits; each may be even, large and prime."""
    folder = tmp_path_factory.mktemp("table")
    images = load_split("digits", "val")
    lines = ["file,labels,split"]
    for number in range(110):
        save_image(folder / f"{number}.png", images.sources[number])
        part = "val" if number % 3 == 0 else "train"
        lines.append(f"{number}.png,{';'.join(truth_of(int(images.labels[number])))},{part}")
    (folder / "digits.csv").write_text("\n".join(lines))
    return folder / "digits.csv"


def logits_of(network: Any, images: ImageSet) -> np.ndarray:
    preprocess = preprocess_for(network)
    with torch.inference_mode():
        return torch.cat([network(to_input(x, preprocess)) for x, _ in Loader(images, preprocess, 32)]).numpy()


def test_several_labels_an_image_go_the_whole_way(table: Path, tmp_path: Path, leanvit: Run) -> None:
    file, data = weights(tmp_path, 3), ("--data", table)
    given = (file, "--model", "vit_micro", "--multi-label")
    found = json.loads(leanvit("val", *given, *data, "--json").out)
    val = load_multi_label(str(table), "val")
    logits = logits_of(network_of(3), val)
    assert found["mAP"] == pytest.approx(average_precision_score(val.labels, logits, average="macro"), abs=1e-6)
    assert found["f1"] == pytest.approx(f1_score(val.labels, logits >= 0, average="micro"))
    done = leanvit("quantize", *given, *data, *FLAGS, "--output", tmp_path / "q")
    assert done.code == 0, done.err
    done = leanvit("export", tmp_path / "q", *data, "--max-drop", 20, "--min-speedup", 0, "--output", tmp_path / "b")
    assert done.code == 0, done.err
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.task, manifest.labels, manifest.accuracy["metric"]) == ("multilabel", NAMES, "mAP")
    verdict = read_json(tmp_path / "b" / "verify.json")
    assert {"mAP", "mAP drop", "agreement", "logits"} <= {row["name"] for row in verdict["checks"]}
    measured = json.loads(leanvit("val", tmp_path / "b", *data, "--json").out)
    assert measured["mAP"] == pytest.approx(manifest.accuracy["value"])

    image = table.parent / "0.png"
    line = leanvit("predict", tmp_path / "b", image, "--format", "jsonl", "--score-threshold", 0)
    probabilities = {one["label"]: one["probability"] for one in json.loads(line.out)["predictions"]}
    predictor = package.Predictor(tmp_path / "b")
    expected = expit(predictor.outputs(predictor.prepare(image)[None])["logits"][0].astype(np.float64))
    assert [probabilities[name] for name in NAMES] == pytest.approx(expected, abs=1e-5)
    assert leanvit("predict", tmp_path / "b", image, "--score-threshold", 1).out == f"{image}: nothing\n"


def test_one_logit_stands_between_two_labels(image_folder: Any, tmp_path: Path, leanvit: Run) -> None:
    network, data = network_of(1), image_folder("pairs", cat=60, dog=60)
    file = weights(tmp_path, 1)
    loaded, info = load(file, package.LoadOptions(model_name="vit_micro"))
    assert (info.task, info.labels, loaded.num_classes) == ("binary", ("0", "1"), 1)
    val = load_split(str(data), "val")
    logits = logits_of(network, val)
    given = (file, "--model", "vit_micro", "--data", data)
    found = json.loads(leanvit("val", *given, "--json").out)
    assert found["top1"] == pytest.approx(100 * ((logits[:, 0] > 0) == (val.labels == 1)).mean())
    assert "top-1" in leanvit("val", *given).out
    done = leanvit("quantize", *given, *FLAGS, "--output", tmp_path / "q")
    assert done.code == 0, done.err
    done = leanvit("export", tmp_path / "q", "--data", data, "--max-drop", 50, "--min-speedup", 0, "--output",
                   tmp_path / "b")  # fmt: skip
    assert done.code == 0, done.err
    manifest = read_manifest(tmp_path / "b")
    assert (manifest.task, manifest.labels) == ("binary", ("cat", "dog"))
    predictor = package.Predictor(tmp_path / "b")
    image = data / "dog" / "0.png"
    pairs = dict(predictor.predict(image))
    assert sum(pairs.values()) == pytest.approx(1)
    dog = float(expit(predictor.outputs(predictor.prepare(image)[None])["logits"][0, 0]))
    assert pairs["dog"] == pytest.approx(dog, abs=1e-6)
    assert predictor.predict(image, score_threshold=max(0.0, dog - 1e-6))[0][0] == "dog"
    assert predictor.predict(image, score_threshold=min(1.0, dog + 1e-6))[0][0] == "cat"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=1, max_size=40))
def test_average_precision_is_scikit_learns_also_where_scores_are_equal(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = (np.array(column) for column in zip(*pairs, strict=True))
    found = sigmoids.average_precision(scores, truth)
    if not truth.any():
        assert found is None
    else:
        assert found == pytest.approx(average_precision_score(truth, scores), abs=1e-12)


def test_sigmoid_overflows_nowhere() -> None:
    wide = np.array([-1e4, -800, -3.0, 0, 3, 800, 1e4])
    with np.errstate(all="raise", under="ignore"):
        assert sigmoids.sigmoid(wide) == pytest.approx(expit(wide), abs=1e-15)


def test_forms_of_tables_say_the_same(table: Path) -> None:
    folder, first = table.parent, load_multi_label(str(table), "train")
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    columns = ["file," + ",".join(NAMES) + ",split"]
    columns += [f"{f}," + ",".join(str(int(n in names.split(";"))) for n in NAMES) + f",{s}" for f, names, s in rows]
    (folder / "columns.csv").write_text("\n".join(columns), encoding="utf-8-sig")
    lines = [json.dumps({"file": f, "labels": names.split(";") if names else [], "split": s}) for f, names, s in rows]
    (folder / "lines.jsonl").write_text("\n".join(lines))
    for name in ("columns.csv", "lines.jsonl"):
        other = load_multi_label(str(folder / name), "train")
        assert (other.classes, other.sources) == (first.classes, first.sources)
        assert (other.labels == first.labels).all()
    split = table.read_text().replace(",train", "").replace(",val", "").replace(",split", "")
    (folder / "whole.csv").write_text(split)
    parts = [load_multi_label(str(folder / "whole.csv"), part, seed=3) for part in ("train", "val")]
    assert [len(part) for part in parts] == [88, 22]
    assert not set(parts[0].sources) & set(parts[1].sources)


def test_labels_stand_in_the_order_of_the_network(table: Path) -> None:
    images = load_multi_label(str(table), "val")
    order = ("prime", "odd", "even", "large")
    labels, moved = agreed(order, images, "table")
    assert labels == moved.classes == order
    assert (moved.labels == images.labels[:, [2, 0, 0, 1]] * np.array([1, 0, 1, 1])).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,labels\na.png,x\n", "no column file"),
        ("file,even\na.png,2\n", "line 2: 'even' is '2', expected 0 or 1"),
        ("file,labels\n,x\n", "line 2: no file is named"),
        ("file,labels\na.png\n", "line 2: another number of fields"),
        ("file,labels\ngone.png,x\ngone.png,y\n", "2 of 2 images are missing"),
        ("file,labels\n", "no rows"),
        ("file,labels,split\nt.csv,x,train\nt.csv,y,traln\n", "split is 'traln' in 1 rows"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        load_multi_label(str(tmp_path / "t.csv"), "train")


def test_multi_label_is_refused_where_it_does_not_fit(tmp_path: Path, leanvit: Run) -> None:
    with pytest.raises(ConfigError, match="--multi-label is of classifiers of at least two outputs"):
        load(weights(tmp_path, 1), package.LoadOptions(model_name="vit_micro", multi_label=True))
    refused = leanvit("val", weights(tmp_path, 3), "--model", "vit_micro", "--multi-label", "--data", "digits")
    assert refused.code == 3
    assert "no table of images with several labels, expected FILE.csv" in refused.error
