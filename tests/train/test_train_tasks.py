"""Training of the tasks: what a run leaves, exact resume, and every refusal; quantized parts as files."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from leanvit.annotations import SceneSet
from leanvit.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint
from leanvit.config import Preprocess, TrainConfig, from_dict, load_yaml
from leanvit.errors import CalibrationError, CheckpointError, ConfigError, DataError, NumericalError, RunLockedError
from leanvit.export.data import calibration_inputs
from leanvit.files import only_writer
from leanvit.load.api import load_classifier
from leanvit.quant.parts import is_quantized_network, load_quantized_network, quantize_network, save_network
from leanvit.quant.store import load_quantized, save_quantized
from leanvit.runtime.task import TASKS as SERVED
from leanvit.runtime.task import measure_task
from leanvit.tasks.build import load_network, raw_outputs
from leanvit.tasks.detect import Detector
from leanvit.tasks.measure import measure_network
from leanvit.tasks.parts import parts_of
from leanvit.tasks.semantic import Segmenter
from leanvit.train import Trainer, learning_rate, run
from leanvit.train.optimizer import optimizer_of
from leanvit.train.scenes import scene_groups, task_info
from toy_tasks import HEADS, TASKS, TRAIN, VAL, ToyTasks, stop_after

pytest_plugins = ("toy_tasks",)

BEST, LAST = "model.safetensors", "last.safetensors"


def pictures(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def same_answers(first: nn.Module, second: nn.Module, task: Any) -> bool:
    """Bit-identical outputs of two networks in eval mode."""
    one, two = (raw_outputs(network.eval(), task, pictures()) for network in (first, second))
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# --- what a run leaves ---


@pytest.mark.parametrize("task", TASKS)
def test_a_run_leaves_config_summary_best_weights_and_state(task: str, toys: ToyTasks) -> None:
    folder = toys.run(task)
    summary = json.loads((folder / "train.json").read_text())
    history = summary["history"]
    epochs = len(history)
    assert {path.name for path in folder.iterdir()} >= {"config.yaml", "train.json", BEST, LAST}
    assert not list(folder.glob("*.tmp"))
    assert (summary["task"], summary["metric"]) == (task, SERVED[task].metric)
    assert (summary["train_pictures"], summary["val_pictures"]) == (TRAIN, VAL)
    assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
    assert all(math.isfinite(row["train_loss"]) and 0 <= row["metric"] <= 1 for row in history)
    again = from_dict(TrainConfig, load_yaml(folder / "config.yaml"), "config.yaml")
    assert again == toys.config(task, folder, epochs=epochs)


@pytest.mark.parametrize("task", TASKS)
def test_the_best_weights_are_those_of_the_best_epoch(task: str, toys: ToyTasks) -> None:
    network, info = load_network(toys.run(task))
    history = json.loads((toys.run(task) / "train.json").read_text())["history"]
    best = max(row["metric"] for row in history)
    assert info.metrics[SERVED[task].metric] == best
    assert info.metrics["epoch"] == next(row["epoch"] for row in history if row["metric"] == best)
    measured = measure_network(network, info, toys.split(task, "val"), 8)
    assert measured[SERVED[task].metric] == pytest.approx(best, abs=1e-6)


def test_the_loss_falls_on_a_backbone_of_ours(toys: ToyTasks, tmp_path: Path) -> None:
    history = run(
        toys.config("semantic", tmp_path, model="exmobilevit_micro", epochs=3, batch_size=4, lr=1e-3, seed=1)
    ).history
    losses = [row["train_loss"] for row in history]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.9 * losses[0]


def test_learning_rate_rises_in_a_line_and_falls_in_a_cosine(toys: ToyTasks, tmp_path: Path) -> None:
    config = toys.config("pose", tmp_path, epochs=10, warmup_epochs=1.0, lr=0.1, min_lr=0.02)
    rates = [learning_rate(config, step, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([0.01 * (step + 1) for step in range(10)])
    expected = [0.02 + 0.08 * (1 + math.cos(math.pi * step / 90)) / 2 for step in range(90)]
    assert rates[10:] == pytest.approx(expected)


def test_every_parameter_learns_once_and_at_its_own_rate(toys: ToyTasks, tmp_path: Path) -> None:
    config = toys.config("semantic", tmp_path, backbone_lr_scale=0.25, weight_decay=0.1)
    trainer = Trainer(config)
    optimizer = trainer.optimizer
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(seen) == sorted(names.values())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            of_backbone = names[id(parameter)].startswith("features.backbone.")
            assert group["lr_scale"] == (0.25 if of_backbone else 1.0)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    with pytest.raises(ConfigError, match="opt is 'adamv'"):
        optimizer_of(scene_groups(trainer.model, None, config), replace(config, opt="adamv"))


# --- exact resume ---


@pytest.mark.parametrize(
    ("task", "changes"),
    [("semantic", {"model_ema_decay": 0.9}), ("segment", {}), ("pose", {"drop_path": 0.2, "clip_grad": 0.0}),
     ("detect", {"val_interval": 2}), ("semantic", {"workers": 2})],
)  # fmt: skip
def test_a_stopped_run_goes_on_to_the_same_bits(
    task: str, changes: dict[str, Any], toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (toys.config(task, tmp_path / name, **changes) for name in ("whole", "broken"))
    run(whole)
    with monkeypatch.context() as patched:
        stop_after(patched, 1)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    assert len(json.loads((tmp_path / "broken" / "train.json").read_text())["history"]) == 1
    run(replace(broken, resume=True))
    for name in (BEST, LAST):
        first, second = (load_file(tmp_path / folder / name) for folder in ("whole", "broken"))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    histories = [json.loads((tmp_path / f / "train.json").read_text())["history"] for f in ("whole", "broken")]
    kept = [[(row["train_loss"], row["lr"], row.get("metric")) for row in history] for history in histories]
    assert kept[0] == kept[1]


def test_resume_of_a_finished_run_changes_nothing(toys: ToyTasks, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toys.run("semantic"), tmp_path / "run"))
    before = {name: (folder / name).read_bytes() for name in (BEST, LAST, "train.json")}
    result = run(toys.config("semantic", folder, epochs=3, resume=True))
    assert result.value == max(row["metric"] for row in result.history)
    assert {name: (folder / name).read_bytes() for name in before} == before


def test_resume_without_a_state_begins(toys: ToyTasks, tmp_path: Path) -> None:
    result = run(toys.config("semantic", tmp_path, epochs=1, resume=True))
    assert [row["epoch"] for row in result.history] == [1]


# --- refusals ---


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_and_leaves_the_checkpoints(
    where: str, toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = toys.config("semantic", tmp_path, epochs=1)
    run(config)
    before = {name: (tmp_path / name).read_bytes() for name in (BEST, LAST)}
    losses = Segmenter.losses

    def broken(network: Any, x: torch.Tensor, targets: Any) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = losses(network, x, targets)
        # The square root of 0 is finite, its slope is not.
        extra = found["loss_semantic"] * (math.nan if where == "loss" else 0.0)
        return found | {"loss_extra": extra.sqrt() if where == "gradient" else extra}

    monkeypatch.setattr(Segmenter, "losses", broken)
    with pytest.raises(NumericalError, match=rf"{where}.* at step 4 .*loss_extra"):
        run(replace(config, epochs=2, resume=True))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    load_network(tmp_path)


def test_another_tasks_state_is_refused_and_its_settings_stay(toys: ToyTasks) -> None:
    pose = toys.run("pose")
    before = (pose / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="is of pose:mobilenetv3_small_050, not of semantic"):
        run(toys.config("semantic", pose, resume=True))
    with pytest.raises(CheckpointError, match="does not fit PoseNetwork"):
        run(toys.config("pose", pose, resume=True, decoder_width=48))
    assert (pose / "config.yaml").read_bytes() == before


def test_a_damaged_state_is_refused(toys: ToyTasks, tmp_path: Path) -> None:
    config = toys.config("semantic", tmp_path, resume=True)
    data = bytearray((toys.run("semantic") / LAST).read_bytes())
    data[len(data) // 2] ^= 4
    (tmp_path / LAST).write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        run(config)


def test_two_runs_do_not_share_a_folder(toys: ToyTasks, tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(RunLockedError, match="is writing here"):
        run(toys.config("semantic", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_split_that_measures_nothing_stops_a_run_before_it_learns(toys: ToyTasks, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("images", "train.json"):
        (data / name).symlink_to(toys.scenes / name)
    document = json.loads((toys.scenes / "val.json").read_text())
    (data / "val.json").write_text(json.dumps(document | {"annotations": []}))
    with pytest.raises(DataError, match="no object is annotated"):
        run(toys.config("detect", tmp_path / "run", data=str(data)))
    renamed = [category | {"name": f"other {category['name']}"} for category in document["categories"]]
    (data / "val.json").write_text(json.dumps(document | {"categories": renamed}))
    with pytest.raises(DataError, match="expected the same in the same order"):
        run(toys.config("pose", tmp_path / "run", data=str(data)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["detect", "segment"])
def test_a_metric_of_nothing_is_an_error(task: Any, toys: ToyTasks) -> None:
    scenes = toys.split(task, "val")
    empty = replace(scenes, scenes=tuple(replace(scene, instances=()) for scene in scenes.scenes))
    with pytest.raises(DataError, match="nothing is annotated that task"):
        measure_task(SERVED[task], empty, [])


# --- checkpoints ---


@pytest.mark.parametrize("task", TASKS)
def test_checkpoints_come_back_to_the_bit(task: Any, toys: ToyTasks, tmp_path: Path) -> None:
    network, info = load_network(toys.run(task))
    save_checkpoint(tmp_path / "copy.safetensors", network, info)
    loaded, found = load_network(tmp_path / "copy.safetensors")
    assert found == info
    assert not loaded.training
    assert same_answers(network, loaded, task)


def test_readers_of_classifiers_and_of_tasks_refuse_each_others_files(toys: ToyTasks, tmp_path: Path) -> None:
    for reader in (load_checkpoint, load_classifier):
        with pytest.raises(CheckpointError, match="task 'detect', expected a classifier"):
            reader(str(toys.run("detect")))
    with pytest.raises(CheckpointError, match="expected a classifier"):
        load_quantized(toys.quantized("pose") / "network")
    model = nn.Linear(2, 2)
    save_checkpoint(tmp_path / "c.safetensors", model, CheckpointInfo("resnet18", ("a", "b"), Preprocess((64, 64))))
    with pytest.raises(CheckpointError, match="does not fit ResNet"):
        load_network(tmp_path / "c.safetensors")
    save_checkpoint(
        tmp_path / "o.safetensors", model, CheckpointInfo("resnet18", ("a",), Preprocess((64, 64)), task="o")
    )
    with pytest.raises(
        CheckpointError,
        match="task 'o', expected one of classify, detect, segment, embed, multil",
    ):
        load_network(tmp_path / "o.safetensors")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_network(tmp_path / "gone")


# --- quantization ---


@pytest.mark.parametrize(("task", "parts"), [("segment", ["pyramid", "box", "mask"]), ("semantic", ["network"])])
def test_quantized_parts_come_back_to_the_bit(task: Any, parts: list[str], toys: ToyTasks) -> None:
    quantized, folder = toys.quantize(task), toys.quantized(task)
    assert is_quantized_network(folder)
    assert not is_quantized_network(toys.run(task))
    assert list(quantized.parts) == parts
    network, info = load_network(toys.run(task))
    assert not same_answers(network, quantized.module, task)
    loaded, found = load_quantized_network(folder)
    assert found == info
    assert same_answers(quantized.module, loaded.module, task)
    assert json.loads((folder / "plan.json").read_text()) == {s: list(b) for s, b in quantized.plan.items()}


def test_a_plan_can_be_applied_again(toys: ToyTasks) -> None:
    network, info = load_network(toys.run("semantic"))
    quantized = toys.quantize("semantic")
    again = quantize_network(network, info, toys.calibration("semantic"), plan=quantized.plan)
    assert again.plan == quantized.plan
    assert same_answers(quantized.module, again.module, "semantic")


def test_an_edited_plan_reaches_the_part_that_it_names(toys: ToyTasks) -> None:
    network, info = load_network(toys.run("segment"))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    quantized = toys.quantize("segment")
    edited = {site: (4, 8) if site.startswith("mask.") else bits for site, bits in quantized.plan.items()}
    assert edited != quantized.plan
    found = quantize_network(network, info, toys.calibration("segment"), plan=edited)
    assert found.plan == edited
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    first, second = (raw_outputs(one.module, "segment", pictures()) for one in (quantized, found))
    np.testing.assert_array_equal(first["boxes"], second["boxes"])
    assert not np.array_equal(first["masks"], second["masks"])


def test_a_missing_part_is_named(toys: ToyTasks, tmp_path: Path) -> None:
    for name in ("pyramid", "box", "quantize.json"):
        (tmp_path / name).symlink_to(toys.quantized("segment") / name)
    with pytest.raises(CheckpointError, match="the parts mask are missing"):
        load_quantized_network(tmp_path)
    with pytest.raises(CheckpointError, match="no quantized parts"):
        load_quantized_network(toys.run("segment"))


def test_parts_of_two_networks_are_not_mixed(toys: ToyTasks, tmp_path: Path) -> None:
    _, info = load_network(toys.run("segment"))
    folder = save_network(tmp_path, toys.quantize("segment"), info)
    other = replace(info, labels=info.labels[::-1])
    save_quantized(folder / "box", toys.quantize("segment").parts["box"], other)
    with pytest.raises(CheckpointError, match="part box is of another network than pyramid"):
        load_quantized_network(folder)


def test_a_network_that_finds_nothing_cannot_be_calibrated(toys: ToyTasks) -> None:
    network, info = load_network(toys.run("segment"))
    assert isinstance(network, Detector)
    with torch.no_grad():  # everything is background
        network.network.roi_heads.box_predictor.cls_score.bias[0] += 50
    with pytest.raises(CalibrationError, match="found nothing in 4 calibration pictures, so its mask head"):
        quantize_network(network, info, pictures(4))


def test_calibration_takes_as_many_inputs_as_asked_from_the_training_split(toys: ToyTasks) -> None:
    _, info = load_network(toys.run("pose"))
    train = toys.split("pose", "train")
    first, second = (calibration_inputs(info, train, 12, seed) for seed in (0, 1))
    assert first.shape == second.shape == (12, 3, 64, 64)
    assert torch.equal(first, calibration_inputs(info, train, 12, 0))
    assert not torch.equal(first, second)
    with pytest.raises(ConfigError, match="calibration_images is 0"):
        calibration_inputs(info, train, 0, 0)


def test_parts_share_the_weights_of_their_network(toys: ToyTasks) -> None:
    network, _ = load_network(toys.run("segment"))
    own = {id(parameter) for parameter in network.parameters()}
    parts = parts_of(network)
    assert {id(p) for part in parts.values() for p in part.parameters()} == own


def test_a_checkpoint_says_what_its_network_was_trained_for(toys: ToyTasks, tmp_path: Path) -> None:
    scenes: SceneSet = toys.split("pose", "train")
    info = task_info(toys.config("pose", tmp_path), scenes)
    assert info.labels == scenes.classes
    assert info.keypoints is not None
    assert scenes.keypoints is not None
    assert tuple(info.keypoints["names"]) == scenes.keypoints.names
    assert info.head["width"] == HEADS["pose"]["decoder_width"]
    assert info.preprocess.crop_mode == "squash"
    semantic = task_info(toys.config("semantic", tmp_path), toys.split("semantic", "train"))
    assert semantic.preprocess.crop_mode == "letterbox"
    assert semantic.labels[0] == "background"
