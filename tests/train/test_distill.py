"""Distillation: the losses against their formulas in float64, and the training around them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy.special import log_softmax, softmax

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.config import Preprocess, TrainConfig
from leanvit.errors import CheckpointError, ConfigError, DataError
from leanvit.train import Trainer, run
from leanvit.train.distill import Outputs, Student, Teacher, hint_loss, load_teacher, make_student, teacher_loss

GENERATOR = torch.Generator().manual_seed(0)
OURS, THEIRS = torch.randn(6, 5, generator=GENERATOR) * 3, torch.randn(6, 5, generator=GENERATOR) * 3
SIZE = (32, 32)


@pytest.mark.parametrize("tau", [1.0, 2.0, 7.5])
def test_soft_labels_cost_the_divergence_of_softened_answers(tau: float) -> None:
    found = teacher_loss(Outputs(OURS), Outputs(THEIRS), TrainConfig(distillation_tau=tau))
    ours, theirs = OURS.double().numpy() / tau, THEIRS.double().numpy() / tau
    expected = tau**2 * (softmax(theirs, 1) * (log_softmax(theirs, 1) - log_softmax(ours, 1))).sum(1)
    assert np.allclose(found.numpy(), expected, rtol=1e-4)
    assert float(teacher_loss(Outputs(THEIRS), Outputs(THEIRS), TrainConfig()).abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["hard", "token"])
def test_hard_labels_are_the_teachers_top_class_and_go_to_the_token(kind: str) -> None:
    config = TrainConfig(distillation=kind)
    expected = -log_softmax(OURS.double().numpy(), 1)[np.arange(6), THEIRS.numpy().argmax(1)]
    assert np.allclose(teacher_loss(Outputs(OURS), Outputs(THEIRS), config).numpy(), expected, rtol=1e-5)
    with_token = teacher_loss(Outputs(torch.zeros(6, 5), distilled=OURS), Outputs(THEIRS), config)
    assert np.allclose(with_token.numpy(), expected, rtol=1e-5)


def test_hints_compare_what_is_left_after_normalisation_on_the_coarser_grid() -> None:
    coarse = torch.randn(2, 4, 3, 3)
    fine = (5 * coarse + 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert float(hint_loss(Outputs(OURS, features=fine), Outputs(OURS, features=coarse)).max()) < 1e-4
    opposite = hint_loss(Outputs(OURS, features=-coarse), Outputs(OURS, features=coarse))
    assert torch.allclose(opposite, torch.full((2,), 4.0), rtol=1e-2)


def test_a_teacher_sees_images_as_it_was_trained_on_them() -> None:
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.mean((2, 3))

    ours = Preprocess(input_size=SIZE, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    theirs = Preprocess(input_size=SIZE, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = torch.rand(2, 3, *SIZE)
    normalised = {
        p: (image - torch.tensor(p.mean).view(1, 3, 1, 1)) / torch.tensor(p.std).view(1, 3, 1, 1)
        for p in (ours, theirs)
    }  # fmt: skip
    Teacher(Spy(), theirs)(normalised[ours], ours)
    assert torch.allclose(seen[0], normalised[theirs], atol=1e-5)
    larger = replace(theirs, input_size=(48, 40))
    Teacher(Spy(), larger)(torch.ones(2, 3, *SIZE), theirs)
    assert seen[1].shape == (2, 3, 48, 40)
    assert torch.allclose(seen[1], torch.ones(()), atol=1e-4)


@pytest.mark.parametrize("name", ["deit_micro", "vitaev2_micro", "exmobilevit_micro", "swin_micro", "resnet10t"])
def test_a_student_answers_as_its_network_with_and_without_hints(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    size = (28, 28) if name == "deit_micro" else SIZE
    x = torch.randn(2, 3, *size)
    expected = model(x)
    for channels in (None, 12):
        logits, distilled, features = Student(model, size, channels).eval()(x)
        assert torch.allclose(logits, expected, atol=1e-5)
        assert distilled is None
        assert features is None if channels is None else features.shape[:2] == (2, 12)
    assert model.training is False


def test_a_token_answers_beside_the_class_token_in_training_only() -> None:
    torch.manual_seed(0)
    model = timm.create_model("deit_micro", num_classes=5)
    student = Student(model, (28, 28))
    x = torch.randn(2, 3, 28, 28)
    student.train()
    logits, distilled, _ = student(x)
    assert distilled is not None
    student.eval()
    mean, nothing, _ = student(x)
    assert nothing is None
    assert torch.allclose(mean, (logits + distilled) / 2, atol=1e-5)


def test_what_does_not_fit_together_is_said_before_training(tmp_path: Path) -> None:
    config = TrainConfig(teacher="vit_micro.fmnist", distillation="token")
    classes = tuple(load_labels())
    teacher = load_teacher(config, classes, torch.device("cpu"))
    with pytest.raises(ConfigError, match="has no distillation token"):
        make_student(timm.create_model("vit_micro", num_classes=10), SIZE, teacher, config)
    with pytest.raises(DataError, match="has classes"):
        load_teacher(config, ("cat", "dog"), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_teacher(replace(config, teacher=str(tmp_path / "gone")), classes, torch.device("cpu"))


def load_labels() -> list[str]:
    from leanvit.config import FASHION_MNIST_CLASSES

    return list(FASHION_MNIST_CLASSES)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network that has learned a little of digits."""
    folder = tmp_path_factory.mktemp("teacher")
    config = TrainConfig(model="vit_micro", output=str(folder), epochs=3, images_per_class=60, amp="none", degrees=0.0)
    run(config)
    return str(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"distillation": "soft", "hint_weight": 0.5},
        {"distillation": "hard", "mixup": 0.5},
        {"distillation": "token", "model": "deit_micro"},
        {"distillation": "soft", "model": "vitaev2_micro", "grad_accum_steps": 2, "model_ema_decay": 0.9},
    ],
)
def test_a_student_learns_and_a_killed_run_goes_on(teacher: str, options: dict[str, object], tmp_path: Path) -> None:
    config = TrainConfig(
        **{"model": "revit_micro", **options}, teacher=teacher, output=str(tmp_path), epochs=2, images_per_class=12,
        batch_size=24, save_interval=2, degrees=0.0, amp="none",
    )  # fmt: skip
    whole = run(config)
    assert whole.history[1]["train_loss"] < whole.history[0]["train_loss"]
    again = replace(config, output=str(tmp_path / "again"))
    original = Trainer._step_optimizer

    def stop(self: Trainer, step: int) -> None:
        if step == 7:
            raise KeyboardInterrupt
        original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step_optimizer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(again)
    resumed = run(replace(again, resume=True))
    assert [{**r, "seconds": 0, "cpu_seconds": 0} for r in resumed.history] == [
        {**r, "seconds": 0, "cpu_seconds": 0} for r in whole.history
    ]
    # What is left behind is the student alone, loadable without its teacher.
    from leanvit.checkpoint import load_checkpoint

    assert load_checkpoint(tmp_path)[1].architecture == config.model
