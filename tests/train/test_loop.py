"""Training: schedules against their formulas, exact resume, and nothing lost when something fails."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from leanvit.checkpoint import load_checkpoint
from leanvit.config import TrainConfig
from leanvit.data.loader import Loader
from leanvit.data.sets import load_split
from leanvit.errors import CheckpointError, ConfigError, NumericalError, RunLockedError
from leanvit.files import only_writer, read_json
from leanvit.train import Accuracy, Trainer, autocast_dtype, evaluate, learning_rate, make_optimizer, pick_device, run
from leanvit.train.batches import Part
from leanvit.train.classify import Classification
from leanvit.train.learning import Scored
from leanvit.train.setup import checkpoint_gradients, some_of_each_class


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pictures in two classes: dark and bright."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name, level in (("bright", 190), ("dark", 60)):
        (root / name).mkdir()
        for index in range(20):
            pixels = generator.integers(level - 50, level + 50, (20, 30, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> TrainConfig:
    return TrainConfig(data=str(folder), output=str(tmp_path / "run"), epochs=3, batch_size=8, warmup_epochs=1.0)


def test_training_learns_and_leaves_everything(config: TrainConfig) -> None:
    result = run(config)
    output = Path(config.output)
    assert result.best.top1 == 100.0
    assert result.best.images == 8
    assert {p.name for p in output.iterdir()} >= {
        "model.safetensors",
        "last.safetensors",
        "log.csv",
        "train.json",
        "config.yaml",
    }
    assert len((output / "log.csv").read_text().splitlines()) == 1 + config.epochs
    summary = read_json(output / "train.json")
    assert (summary["train_images"], summary["val_images"], len(summary["history"])) == (32, 8, 3)
    model, info = load_checkpoint(output)
    assert info.labels == ("bright", "dark")
    images = load_split(config.data, "val", val_fraction=info.val_fraction, seed=info.seed)
    measured = evaluate(model, Loader(images, info.preprocess, 8))
    assert measured.correct == result.best.correct


def test_validation_every_other_epoch_and_after_the_last(config: TrainConfig) -> None:
    result = run(replace(config, val_interval=2))
    assert [row["epoch"] for row in result.history if "val_top1" in row] == [2, 3]
    rows = (Path(config.output) / "log.csv").read_text().splitlines()
    assert [row.split(",")[5] == "" for row in rows[1:]] == [True, False, False]
    assert load_checkpoint(config.output)[1].metrics["epoch"] in (2, 3)


def test_run_stopped_before_its_first_validation_can_be_resumed(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_validates", lambda self, epoch: False)
        with pytest.raises(ConfigError, match="epochs"):
            run(replace(config, epochs=1, val_interval=3))
    result = run(replace(config, val_interval=3, resume=True))
    assert [row["epoch"] for row in result.history] == [1, 2, 3]


def test_channels_last_trains_the_same_network(config: TrainConfig, tmp_path: Path) -> None:
    config = replace(config, model="exmobilevit_micro", amp="none", epochs=1)
    results = [run(replace(config, output=str(tmp_path / str(on)), channels_last=on)) for on in (False, True)]
    first, second = (result.history[0]["train_loss"] for result in results)
    assert abs(first - second) < 0.02 * first


def test_same_seed_gives_the_same_weights_and_another_seed_others(config: TrainConfig, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(replace(config, output=str(tmp_path / name), epochs=1, seed=seed))
        weights.append(load_file(tmp_path / name / "last.safetensors")["model.blocks.0.attn.qkv.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_resume_ends_with_the_weights_of_an_uninterrupted_run(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(config, output=str(tmp_path / "whole"))
    run(whole)
    original = Trainer._train_epoch

    def stop_before_the_last(self: Trainer, epoch: int, bar: object) -> dict[str, float]:
        if epoch == 2:
            raise KeyboardInterrupt
        return original(self, epoch, bar)

    monkeypatch.setattr(Trainer, "_train_epoch", stop_before_the_last)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert load_checkpoint(config.output)[1].architecture == "revit_micro"
    monkeypatch.setattr(Trainer, "_train_epoch", original)
    run(replace(config, resume=True))
    first, second = (load_file(Path(c.output) / "last.safetensors") for c in (whole, config))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_logs_that_a_kill_left_behind_catch_up(config: TrainConfig) -> None:
    run(config)
    output = Path(config.output)
    expected = {name: (output / name).read_bytes() for name in ("log.csv", "log.jsonl", "train.json")}
    for name in expected:
        (output / name).unlink()
    run(replace(config, resume=True))
    assert {name: (output / name).read_bytes() for name in expected} == expected


def test_nan_loss_stops_and_keeps_the_epochs_before(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classification.prepare

    def poisoned(self: Classification, part: Part, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, target = original(self, part, step)
        return x * (torch.nan if step == 9 else 1.0), target

    monkeypatch.setattr(Classification, "prepare", poisoned)
    with pytest.raises(NumericalError, match=r"the loss is nan at step 9 \(epoch 3\)"):
        run(config)
    model, _ = load_checkpoint(config.output)
    assert all(p.isfinite().all() for p in model.parameters())
    assert len(read_json(Path(config.output) / "train.json")["history"]) == 2


def test_the_batch_of_a_nan_loss_is_kept(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Classification.prepare

    def poisoned(self: Classification, part: Part, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, target = original(self, part, step)
        x[0] = torch.inf if step == 5 else x[0]
        return x, target

    monkeypatch.setattr(Classification, "prepare", poisoned)
    with pytest.raises(NumericalError, match=r"The batch is in .*nan_batch\.safetensors"):
        run(config)
    batch = load_file(Path(config.output) / "nan_batch.safetensors")
    assert not batch["augmented"].isfinite().all()
    images = load_split(config.data, "train", val_fraction=config.val_fraction, seed=config.seed)
    loader = Loader(images, Trainer(config).info.preprocess, 8)
    pixels, labels = loader.fetch(batch["indices"].numpy())
    assert torch.equal(batch["images"], pixels)
    assert torch.equal(batch["labels"], labels)


def test_patience_ends_a_run_that_gets_no_better(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([50.0, 75.0, 62.5, 75.0, 25.0, 87.5])

    def validate(self: Trainer) -> Scored:
        value = next(values)
        metrics = asdict(Accuracy(value, 100.0, 2.0 - value / 100, 8, 4))
        return Scored(metrics, {"val_top1": metrics["top1"], "val_loss": metrics["loss"]})

    monkeypatch.setattr(Trainer, "_validate", validate)
    result = run(replace(config, epochs=9, patience=3))
    assert [row["val_top1"] for row in result.history] == [50.0, 75.0, 62.5, 75.0, 25.0]
    assert result.best.top1 == 75.0
    again = run(replace(config, epochs=9, patience=3, resume=True))
    assert len(again.history) == 5


def test_the_average_is_what_is_validated_and_kept(config: TrainConfig) -> None:
    trainer = Trainer(replace(config, model_ema_decay=0.9, epochs=2))
    with only_writer(config.output):
        trainer.fit()
    average = {k: v for k, v in trainer.average.module.state_dict().items() if v.is_floating_point()}
    assert any(not torch.equal(v, trainer.model.state_dict()[k]) for k, v in average.items())
    measured = evaluate(trainer.average.module, trainer.learning.val_loader)
    assert trainer.progress.history[-1]["val_loss"] == pytest.approx(measured.loss)


def test_class_weights_make_a_rare_class_count_as_much(config: TrainConfig) -> None:
    trainer = Trainer(replace(config, class_weights="balanced", smoothing=0.0))
    learning = trainer.learning
    learning.weights = torch.tensor([3.0, 0.5])
    part = next(iter(trainer.batches.epoch(0)))
    x, target = learning.prepare(part, 0)
    answer = learning.output(trainer.running, x)
    plain = torch.nn.functional.cross_entropy(answer.logits.float(), target, reduction="none")
    assert torch.allclose(learning.losses(answer, target, x), plain * learning.weights[target])


@pytest.mark.parametrize("options", [{"train_fraction": 0.25}, {"images_per_class": 4}])
def test_a_part_of_the_training_images_has_every_class_and_grows_by_addition(
    config: TrainConfig, options: dict[str, float]
) -> None:
    images = load_split(config.data, "train", val_fraction=config.val_fraction, seed=config.seed)
    part = some_of_each_class(images, replace(config, **options))
    assert np.bincount(part.labels).tolist() == [4, 4]
    more = some_of_each_class(images, replace(config, **{name: value * 2 for name, value in options.items()}))
    assert set(map(str, part.sources)) < set(map(str, more.sources))
    other = some_of_each_class(images, replace(config, seed=1, **options))
    assert set(map(str, part.sources)) != set(map(str, other.sources))


@pytest.mark.parametrize(
    "options", [{"grad_checkpointing": True}, {"grad_accum_steps": 2}, {"cache": "none", "degrees": 0.0}]
)
def test_ways_to_save_memory_learn_the_same(config: TrainConfig, tmp_path: Path, options: dict[str, object]) -> None:
    config = replace(config, epochs=1, amp="none", crop_scale=(1.0, 1.0), degrees=0.0)
    first, second = (run(replace(config, output=str(tmp_path / str(i)), **o)) for i, o in enumerate(({}, options)))
    assert second.history[0]["train_loss"] == pytest.approx(first.history[0]["train_loss"], rel=1e-3)


def test_a_network_without_checkpoints_for_gradients_says_so() -> None:
    with pytest.raises(ConfigError, match=r"Linear can't checkpoint gradients. Leave --grad-checkpointing out"):
        checkpoint_gradients(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_half_precision_learns_and_goes_on(config: TrainConfig, amp: str) -> None:
    run(replace(config, amp=amp, epochs=1))
    result = run(replace(config, amp=amp, epochs=2, resume=True))
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"]


def test_two_runs_never_share_a_folder(config: TrainConfig) -> None:
    with only_writer(config.output), pytest.raises(RunLockedError, match="is writing here"):
        run(config)


def test_finished_run_says_that_there_is_nothing_left(config: TrainConfig) -> None:
    run(replace(config, epochs=1))
    result = run(replace(config, epochs=1, resume=True))
    assert len(result.history) == 1


def test_resume_refuses_another_architecture(config: TrainConfig) -> None:
    run(replace(config, epochs=1))
    other = replace(config, model="vit_tiny_patch16_224", img_size=32, resume=True)
    with pytest.raises(CheckpointError, match="is of revit_micro"):
        run(other)


def test_fine_tuning_starts_from_the_checkpoint(config: TrainConfig, tmp_path: Path) -> None:
    run(replace(config, epochs=1))
    checkpoint = Path(config.output) / "model.safetensors"
    tuned = Trainer(replace(config, output=str(tmp_path / "tuned"), initial_checkpoint=str(checkpoint)))
    assert torch.equal(tuned.model.state_dict()["pos_embed"], load_file(checkpoint)["pos_embed"])


def test_learning_rate_follows_warm_up_and_cosine() -> None:
    config = TrainConfig(lr=1.0, min_lr=0.1, epochs=10, warmup_epochs=2.0)
    steps = 5
    assert learning_rate(config, 0, steps) == pytest.approx(0.1)
    assert learning_rate(config, 9, steps) == pytest.approx(1.0)
    assert learning_rate(config, 10, steps) == pytest.approx(1.0)
    middle = 0.1 + 0.5 * 0.9 * (1 + math.cos(math.pi * 0.5))
    assert learning_rate(config, 30, steps) == pytest.approx(middle)
    rates = [learning_rate(config, step, steps) for step in range(10, 50)]
    assert rates == sorted(rates, reverse=True)


def test_norms_biases_and_exempt_parameters_are_not_decayed(config: TrainConfig) -> None:
    model = Trainer(config).model
    optimizer = make_optimizer(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    plain, decayed = (
        {names[id(p)] for group in optimizer.param_groups for p in group["params"] if bool(group["weight_decay"]) is on}
        for on in (False, True)
    )
    assert {"pos_embed", "alpha", "norm.weight", "head.bias", "patch_embed.proj.bias"} <= plain
    assert {"head.weight", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= decayed
    assert not plain & decayed
    assert plain | decayed == set(names.values())


def test_an_absent_device_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown"):
        pick_device("quantum")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not on this machine"):
            pick_device("cuda")


def test_evaluation_counts_every_image_once(config: TrainConfig) -> None:
    trainer = Trainer(config)
    for batch_size in (1, 3, 8, 100):
        loader = Loader(trainer.learning.val_loader.images, trainer.info.preprocess, batch_size)
        assert evaluate(trainer.model, loader).images == 8


def test_autocast_is_bfloat16_only_where_the_chip_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has_it, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has_it=has_it: has_it)
        assert autocast_dtype("auto", cpu) is expected
    assert autocast_dtype("none", cpu) is None


def test_image_size_is_kept_for_networks_that_take_it_and_those_that_take_any(config: TrainConfig) -> None:
    for name in ("vit_tiny_patch16_224", "resnet10t"):
        trainer = Trainer(replace(config, model=name, img_size=48))
        assert trainer.info.preprocess.input_size == (48, 48)
        assert trainer.model(torch.zeros(2, 3, 48, 48)).shape == (2, 2)
    assert trainer.info.kwargs == {}
