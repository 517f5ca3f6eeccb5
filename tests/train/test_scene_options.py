"""What training takes for a task as well as for a classifier: one test an option, by the weights or by the log.

Pictures are 64 px, the backbone is vit_micro, which has no BatchNorm, and an epoch has two steps.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from leanvit.config import TrainConfig, from_dict, load_yaml, save_yaml
from leanvit.errors import ConfigError, NumericalError
from leanvit.progress import Bar
from leanvit.tasks import TASKS
from leanvit.train import Trainer, run
from leanvit.train.learning import Scored
from leanvit.train.processes import Processes
from leanvit.train.scenes import SceneLearning
from toy_tasks import ToyTasks

pytest_plugins = ("toy_tasks",)

BACKBONE = "network.backbone.features.backbone."
LAST = "last.safetensors"


@pytest.fixture(autouse=True)
def measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests are about learning: each validation finds the same, at no cost."""

    def validate(learning: SceneLearning, model: torch.nn.Module) -> Scored:
        metrics = {learning.metric.metric: 0.5, "pictures": 8}
        return Scored(metrics, {"metric": 0.5, "metrics": metrics})

    monkeypatch.setattr(SceneLearning, "validate", validate)


def settings(toys: ToyTasks, output: Path, task: str = "detect", **changes: Any) -> TrainConfig:
    """Two steps of four pictures an epoch, of the quarter of the set."""
    config = toys.config(task, output, model="vit_micro", epochs=1, batch_size=4, train_fraction=0.25, clip_grad=0.0)
    return replace(config, opt="sgd", lr=1e-2, warmup_epochs=0.0, **changes)


def weights(folder: Path) -> dict[str, Tensor]:
    found = load_file(folder / LAST)
    return {name.removeprefix("model."): value for name, value in found.items() if name.startswith("model.")}


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.allclose(first[name], second[name], rtol=1e-5, atol=1e-5) for name in first
    )


def test_parts_of_a_step_are_one_large_step(toys: ToyTasks, tmp_path: Path) -> None:
    whole = run(settings(toys, tmp_path / "whole"))
    parts = run(settings(toys, tmp_path / "parts", grad_accum_steps=2))
    assert parts.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-5)
    start = Trainer(settings(toys, tmp_path / "start")).model.state_dict()
    assert close(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert not close(weights(tmp_path / "whole"), start)


PROGRAM = """
import sys
from leanvit.config import TrainConfig, from_dict, load_yaml
from leanvit.train import run
from leanvit.train.learning import Scored
from leanvit.train.scenes import SceneLearning
SceneLearning.validate = lambda self, model: Scored({"box_AP50": 0.5}, {"metric": 0.5, "metrics": {"box_AP50": 0.5}})
run(from_dict(TrainConfig, load_yaml(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def one(toys: ToyTasks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    run(settings(toys, folder))
    return folder


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_learn_as_one(fsdp: bool, one: Path, toys: ToyTasks, tmp_path: Path) -> None:
    save_yaml(settings(toys, tmp_path / "two", fsdp=fsdp), tmp_path / "two.yaml")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, tmp_path / "program.py", tmp_path / "two.yaml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert close(weights(one), weights(tmp_path / "two"))
    summaries = [json.loads((folder / "train.json").read_text()) for folder in (one, tmp_path / "two")]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    losses = [summary["history"][0]["train_loss"] for summary in summaries]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_run_killed_inside_an_epoch_goes_on_to_the_same_bits(
    toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (settings(toys, tmp_path / name, save_interval=1, epochs=2) for name in ("whole", "broken"))
    expected = run(whole)
    with monkeypatch.context() as patched:
        step = Trainer._step_optimizer

        def stop(trainer: Trainer, number: int) -> None:
            if number == 3:
                raise KeyboardInterrupt
            step(trainer, number)

        patched.setattr(Trainer, "_step_optimizer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    begun = Trainer(broken)
    begun.restore()
    assert (begun.progress.epoch, begun.progress.step, begun.progress.seen) == (1, 1, 4)
    found = run(replace(broken, resume=True))
    first, second = (load_file(tmp_path / name / LAST) for name in ("whole", "broken"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    names = ("train_loss", "loss_classifier", "loss_objectness", "lr")
    assert [[row[n] for n in names] for row in found.history] == [[row[n] for n in names] for row in expected.history]


def test_the_sums_of_a_broken_epoch_are_counted_by_one_process(
    toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(settings(toys, tmp_path))
    trainer.progress = replace(trainer.progress, step=1, loss=100.0, seen=4.0, losses={"loss_objectness": 50.0})
    summed: list[dict[str, Tensor]] = []

    def sums(totals: dict[str, Tensor]) -> dict[str, float]:
        summed.append(totals)
        return dict.fromkeys(totals, 1.0)

    monkeypatch.setattr(trainer, "_over_processes", sums)
    for rank in (0, 1):
        trainer.processes = Processes(rank=rank, world=1)
        trainer._train_epoch(0, Bar("training", None))
    assert [float(totals["seen"]) for totals in summed] == [8.0, 4.0]
    assert all(
        float(summed[0][name]) > at > float(summed[1][name]) for name, at in (("loss", 100), ("loss_objectness", 50))
    )


def test_a_save_of_0_1_keeps_its_best_weights(toys: ToyTasks, tmp_path: Path) -> None:
    """It has the best metrics in its history alone."""
    config = settings(toys, tmp_path, epochs=2)
    trainer = Trainer(config)
    worse, better = ({"box_AP50": value, "pictures": 8} for value in (0.25, 0.75))
    rows = [{"epoch": n, "metric": one["box_AP50"], "metrics": one} for n, one in ((1, better), (2, worse))]
    trainer._save(replace(trainer.progress, epoch=2, history=rows))
    again = Trainer(config)
    again.restore()
    assert again.progress.best == better
    assert again.fit().value == 0.75


def test_a_gradient_that_is_not_finite_is_told_by_a_process_without_images(toys: ToyTasks, tmp_path: Path) -> None:
    trainer = Trainer(settings(toys, tmp_path))
    for parameter in trainer.model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with pytest.raises(NumericalError, match=r"the gradient's norm is nan at step 3 \(epoch 2\)\. Checkpoints up to"):
        trainer._step_optimizer(3)


def test_a_frozen_backbone_keeps_its_bits_and_the_heads_learn(toys: ToyTasks, tmp_path: Path) -> None:
    before = Trainer(settings(toys, tmp_path)).model.state_dict()
    run(settings(toys, tmp_path, freeze_epochs=1, weight_decay=0.1))
    after = weights(tmp_path)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert not {name for name in changed if name.startswith(BACKBONE)}
    run(settings(toys, tmp_path / "both", freeze_epochs=1, epochs=2))
    later = weights(tmp_path / "both")
    assert any(not torch.equal(later[name], before[name]) for name in later if name.startswith(BACKBONE))


def test_layers_of_the_backbone_learn_at_falling_rates(toys: ToyTasks, tmp_path: Path) -> None:
    trainer = Trainer(settings(toys, tmp_path, layer_decay=0.5, backbone_lr_scale=0.5))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    scales = {names[id(p)]: group["lr_scale"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert scales.keys() == set(names.values())
    blocks = [next(s for n, s in scales.items() if f"blocks.{i}.attn.qkv.weight" in n) for i in range(4)]
    assert [second / first for first, second in itertools.pairwise(blocks)] == [2.0] * 3
    stem = next(s for n, s in scales.items() if "patch_embed" in n and n.startswith(BACKBONE))
    assert blocks[0] / stem == 2.0
    assert max(s for n, s in scales.items() if n.startswith(BACKBONE)) <= 0.5
    assert {s for n, s in scales.items() if not n.startswith(BACKBONE)} == {1.0}


def test_patience_stops_a_task_that_gets_no_better(toys: ToyTasks, tmp_path: Path) -> None:
    result = run(settings(toys, tmp_path, "semantic", epochs=9, patience=2, train_fraction=0.1))
    assert [row["epoch"] for row in result.history] == [1, 2, 3]


def test_the_pictures_of_a_loss_that_is_not_finite_are_kept_and_named(
    toys: ToyTasks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = SceneLearning.prepare

    def poisoned(learning: SceneLearning, part: Any, step: int) -> Any:
        x, targets = prepare(learning, part, step)
        return x * (torch.nan if step == 1 else 1.0), targets

    monkeypatch.setattr(SceneLearning, "prepare", poisoned)
    with pytest.raises(NumericalError, match=r"at step 1 \(epoch 1\).*loss_.*The batch is in .*nan_batch"):
        run(settings(toys, tmp_path, "segment"))
    from safetensors import safe_open

    with safe_open(str(tmp_path / "nan_batch.safetensors"), "pt") as file:
        sources = file.metadata()["sources"].split("\n")
        assert file.get_tensor("images").shape == (4, 3, 64, 64)
        assert file.get_tensor("0.boxes").shape[1] == 4
    assert len(sources) == 4
    assert all(Path(source).is_file() for source in sources)


def test_a_share_of_the_pictures_is_used_and_the_log_has_every_loss(toys: ToyTasks, tmp_path: Path) -> None:
    run(settings(toys, tmp_path))
    summary = json.loads((tmp_path / "train.json").read_text())
    assert (summary["train_pictures"], summary["val_pictures"]) == (8, 8)
    header, row = (tmp_path / "log.csv").read_text().splitlines()
    values = dict(zip(header.split(","), map(float, row.split(",")), strict=True))
    parts = [values[name] for name in values if name.startswith("loss_")]
    assert len(parts) == 4
    assert sum(parts) == pytest.approx(values["train_loss"], rel=1e-6)
    assert values["metric"] == 0.5


def test_a_tracker_gets_the_numbers_of_a_task(toys: ToyTasks, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(settings(toys, tmp_path, trackers=("tensorboard",)))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train_loss", "loss_classifier", "metric", "box_AP50"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("options", [{"grad_checkpointing": True}, {"channels_last": True}])
def test_ways_to_save_memory_learn_the_same_boxes(options: dict[str, Any], toys: ToyTasks, tmp_path: Path) -> None:
    plain, saving = (run(settings(toys, tmp_path / str(i), **o)) for i, o in enumerate(({}, options)))
    assert saving.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("option", "value"),
    [("teacher", "x"), ("mixup", 0.5), ("aa", "rand-m9"), ("reprob", 0.1), ("decoder", "fpn"), ("degrees", 5.0),
     ("images_per_class", 3), ("head", {"a": 1})],
)  # fmt: skip
def test_an_option_of_another_task_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"^{option} is for .*, not for task detect. Leave"):
        TrainConfig(task="detect", data="x", **{option: value})


@pytest.mark.parametrize("option", ["channels", "decoder_width", "scale", "color_jitter", "annotations"])
def test_an_option_of_pictures_is_refused_for_a_classifier(option: str) -> None:
    value = {"scale": (1.0, 1.0), "color_jitter": 0.1, "annotations": "fail"}.get(option, 8)
    with pytest.raises(ConfigError, match=rf"^{option} is for .*, not for task classify"):
        TrainConfig(**{option: value})


@pytest.mark.parametrize("task", list(TASKS))
def test_defaults_of_a_task_are_resolved_and_come_back(task: str, tmp_path: Path) -> None:
    config = TrainConfig(task=task, data="x")
    expected = {name: value for name, value in TASKS[task].defaults.items() if name != "data"}
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.degrees is None) == (task not in ("classify", "multilabel", "pose"))
    save_yaml(config, tmp_path / "config.yaml")
    assert from_dict(TrainConfig, load_yaml(tmp_path / "config.yaml")) == config


def test_the_input_has_one_side_or_two() -> None:
    assert TrainConfig(img_size=48).input_size == (48, 48)
    assert TrainConfig(task="detect", data="x", img_size=(64, 96)).input_size == (64, 96)
    assert TrainConfig(img_size=(48,)).img_size == 48
    for size in (0, (1, 2, 3), (64, 0)):
        with pytest.raises(ConfigError, match="img_size"):
            TrainConfig(img_size=size)
    with pytest.raises(ConfigError, match="multiples of 32"):
        TrainConfig(task="detect", data="x", img_size=(64, 50))
