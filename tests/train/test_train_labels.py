"""Training on several labels an image: timm's loss, mixed and softened labels, mAP and thresholds, to a bundle."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy

from common import Outcome, save_image
from leanvit.checkpoint import preprocess_for, save_checkpoint
from leanvit.config import TrainConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.data.sets.multi_label import load_multi_label
from leanvit.errors import ConfigError, DataError
from leanvit.files import read_json
from leanvit.load.api import load
from leanvit.runtime.bundle import read_manifest
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.tasks.labels import best_threshold
from leanvit.train import Trainer
from leanvit.train.augment import mix
from leanvit.train.distill import Outputs

Run = Callable[..., Outcome]
NAMES = ("even", "large")
SMALL = {"epochs": 1, "batch_size": 32, "img_size": 28, "warmup_epochs": 0.0, "model": "vit_micro"}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """220 digits; each may be even and large, or neither."""
    folder = tmp_path_factory.mktemp("table")
    images = load_split("digits", "train")
    lines = ["file,labels,split"]
    for number in range(220):
        digit = int(images.labels[number])
        save_image(folder / f"{number}.png", images.sources[number])
        labels = [name for name, yes in zip(NAMES, (digit % 2 == 0, digit > 4), strict=True) if yes]
        lines.append(f"{number}.png,{';'.join(labels)},{'val' if number % 4 == 0 else 'train'}")
    (folder / "digits.csv").write_text("\n".join(lines))
    return folder / "digits.csv"


def trainer(table: Path, folder: Path, **changes: Any) -> Trainer:
    options = {**SMALL, "data": str(table), "output": str(folder), "multi_label": True, **changes}
    return Trainer(TrainConfig(**options))


@pytest.fixture(scope="module")
def trained(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a short training."""
    folder = tmp_path_factory.mktemp("runs") / "labels"
    trainer(table, folder, epochs=4, batch_size=16, lr=1e-3).fit()
    return folder


def test_the_best_weights_are_kept_with_their_map_and_thresholds(trained: Path, table: Path) -> None:
    network, info = load(str(trained))
    assert (info.task, info.labels) == ("multilabel", NAMES)
    val = load_multi_label(str(table), "val")
    with torch.inference_mode():
        logits = torch.cat(
            [network(to_input(x, info.preprocess)) for x, _ in Loader(val, preprocess_for(network), 64)]
        ).numpy()
    assert info.metrics["mAP"] == pytest.approx(average_precision_score(val.labels, logits, average="macro"), abs=1e-6)
    assert info.metrics["mAP"] > 0.55  # half of the digits have each label, so chance is 0.5
    assert info.metrics["f1"] == pytest.approx(f1_score(val.labels, logits >= 0, average="micro"))
    called = expit(logits) >= np.array(info.metrics["best_thresholds"])
    assert info.metrics["best_f1"] == pytest.approx(f1_score(val.labels, called, average="micro"))
    summary = read_json(trained / "train.json")
    assert (summary["task"], summary["metric"]) == ("multilabel", "mAP")


def test_a_bundle_calls_labels_by_the_thresholds_of_its_own_outputs(
    trained: Path, table: Path, tmp_path: Path, leanvit: Run
) -> None:
    network, info = load(str(trained))
    network.blocks = network.blocks[:1]  # quicker; its thresholds are others than those of the training
    save_checkpoint(
        tmp_path / "one.safetensors", network, replace(info, kwargs={**info.kwargs, "depth": 1}, metrics={})
    )
    done = leanvit("export", tmp_path / "one.safetensors", "--data", table, "--output", tmp_path / "b")
    assert done.code == 0, done.err
    manifest, val = read_manifest(tmp_path / "b"), load_multi_label(str(table), "val")
    thresholds = np.array(manifest.answers["thresholds"])
    predictor = Predictor(tmp_path / "b")
    pixels = np.stack([predictor.prepare(path) for path in val.sources])
    scores = expit(predictor.outputs(pixels)["logits"].astype(np.float64))
    for i in range(len(NAMES)):
        own = f1_score(val.labels[:, i], scores[:, i] >= thresholds[i])
        tried = [f1_score(val.labels[:, i], scores[:, i] >= score) for score in scores[:, i]]
        assert own == pytest.approx(max(tried))
    called = scores >= thresholds
    found = [{name for name, _ in predictor.predict(path)} for path in val.sources]
    assert found == [{name for name, yes in zip(NAMES, row, strict=True) if yes} for row in called]
    everything = predictor.predict(val.sources[0], score_threshold=0.0)
    assert {name for name, _ in everything} == set(NAMES)

    measured = json.loads(leanvit("val", tmp_path / "b", "--data", table, "--json").out)
    assert measured["f1"] == pytest.approx(f1_score(val.labels, called, average="micro"))
    asked = ("val", tmp_path / "b", "--data", table, "--json", "--score-threshold", 0.5)
    assert json.loads(leanvit(*asked).out)["f1"] == pytest.approx(f1_score(val.labels, scores >= 0.5, average="micro"))
    text = leanvit("predict", tmp_path / "b", val.sources[0], "--format", "jsonl")
    assert {one["label"] for one in json.loads(text.out)["predictions"]} == found[0]


@pytest.mark.slow
def test_training_leads_to_the_fastest_file_in_two_commands(table: Path, tmp_path: Path, leanvit: Run) -> None:
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = leanvit("train", "--multi-label", "--data", table, "--output", tmp_path / "run", *small)
    assert done.code == 0, done.err
    assert "best mAP" in done.out
    flags = ("--max-drop", 20, "--by", "throughput", "--calibration-images", 32)
    done = leanvit("optimize", tmp_path / "run", "--data", table, "--output", tmp_path / "fast", *flags)
    assert done.code == 0, done.err
    result = read_json(tmp_path / "fast" / "optimize.json")
    assert (result["metric"], result["task"], result["labelled"]) == ("mAP", "multilabel", True)
    assert len(read_manifest(tmp_path / "fast" / "bundle").answers["thresholds"]) == len(NAMES)
    assert leanvit("report", tmp_path / "run").code == 0


def test_the_loss_is_timms_also_where_labels_are_softened_and_mixed(table: Path, tmp_path: Path) -> None:
    learning = trainer(table, tmp_path, smoothing=0.2).learning
    generator = torch.Generator().manual_seed(0)
    logits, x = torch.randn(6, 3, generator=generator), torch.randn(6, 3, 4, 4, generator=generator)
    numbers = torch.tensor([0, 2, 1, 1, 0, 2])
    hot = torch.nn.functional.one_hot(numbers, 3)
    # Of one label an image, which is all that timm's own smoothing knows.
    losses = learning.losses(Outputs(logits), hot, x)  # type: ignore[attr-defined]
    assert losses.mean() == pytest.approx(float(BinaryCrossEntropy(smoothing=0.2)(logits, numbers)), abs=1e-6)
    config = TrainConfig(**SMALL, data=str(table), multi_label=True, mixup=0.8)
    mixed, target = mix(x, hot, config, 3, 3)
    share = float((mixed[0, 0, 0, 0] - x[1, 0, 0, 0]) / (x[0, 0, 0, 0] - x[1, 0, 0, 0]))
    swapped = numbers[[1, 0, 3, 2, 5, 4]]
    theirs = share * mixup_target(numbers, 3, 1.0, 0.2) + (1 - share) * mixup_target(swapped, 3, 1.0, 0.2)
    own = learning.losses(Outputs(logits), target, x)  # type: ignore[attr-defined]
    assert own.mean() == pytest.approx(float(BinaryCrossEntropy(smoothing=0.0)(logits, theirs)), abs=1e-5)
    several = torch.tensor([[1, 1, 0]] * 6)
    assert (mix(x, several, config, 3, 3)[1] == several).all()  # the same labels, mixed, are the same labels


@given(st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=30))
def test_a_threshold_has_the_largest_f1_of_all(pairs: list[tuple[int, bool]]) -> None:
    scores, truth = np.array([score / 10 for score, _ in pairs]), np.array([yes for _, yes in pairs])
    found = best_threshold(scores, truth)
    if not truth.any():
        assert found == 0.5
        return
    precision, recall, _ = precision_recall_curve(truth, scores)
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-12)).max()
    assert f1_score(truth, scores >= found) == pytest.approx(best)
    assert 0 < found < 1


def test_a_killed_training_goes_on_to_the_same_weights(table: Path, tmp_path: Path) -> None:
    options = {"epochs": 2, "train_fraction": 0.3, "mixup": 0.2}
    whole = trainer(table, tmp_path / "whole", **options)
    whole.fit()
    half = trainer(table, tmp_path / "half", **options)
    half._save_best = lambda metrics: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        half.fit()
    again = trainer(table, tmp_path / "half", **options, resume=True)
    again.restore()
    again.fit()
    assert all(torch.equal(a, b) for a, b in zip(whole.model.state_dict().values(),
                                                 again.model.state_dict().values(), strict=True))  # fmt: skip


def test_what_can_not_be_learned_is_refused(table: Path, tmp_path: Path, leanvit: Run) -> None:
    bare = leanvit("train", "--multi-label", "--output", tmp_path / "a")
    assert (bare.code, "no --data given" in bare.error) == (2, True)
    folder = leanvit("train", "--task", "multilabel", "--data", "digits", "--output", tmp_path / "a")
    assert (folder.code, "no table of images with several labels" in folder.error) == (3, True)
    with pytest.raises(ConfigError, match="multi_label is of images with labels, not of task detect"):
        TrainConfig(task="detect", multi_label=True, data="x")
    with pytest.raises(ConfigError, match="teacher is for classify, not for task multilabel"):
        TrainConfig(multi_label=True, data="x", teacher="y")
    text = table.read_text().replace("0.png,even,val", "0.png,even;odd,val")
    (table.parent / "more.csv").write_text(text)
    with pytest.raises(DataError, match="no training image has odd"):
        trainer(table.parent / "more.csv", tmp_path / "b")
    (table.parent / "none.csv").write_text("file,a,b,split\n0.png,1,0,train\n1.png,0,1,train\n2.png,0,0,val\n")
    with pytest.raises(DataError, match="no validation image has a label"):
        trainer(table.parent / "none.csv", tmp_path / "b")
    assert not (tmp_path / "b").exists()
