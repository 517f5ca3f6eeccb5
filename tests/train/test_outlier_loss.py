"""The loss on outliers against its formula in float64, and through a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers its architectures
from leanvit.config import TrainConfig
from leanvit.errors import ConfigError
from leanvit.load.api import load_classifier
from leanvit.train import run
from leanvit.train.outlier_loss import OutlierLoss
from leanvit.train.setup import checkpoint_gradients


def seen_by_norms(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What every LayerNorm reads, in order."""
    found: list[Tensor] = []
    hooks = [
        m.register_forward_pre_hook(lambda _, arguments: found.append(arguments[0].detach().double()))
        for m in model.modules() if isinstance(m, nn.LayerNorm)
    ]  # fmt: skip
    model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("name", ["vit_micro", "swin_micro", "revit_micro", "vitaev2_micro", "deit_micro"])
def test_it_is_the_mean_fourth_power_of_what_norms_read(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).train()
    x = torch.randn(4, *model.pretrained_cfg["input_size"])
    rng = torch.get_rng_state()
    per_norm = torch.stack([(value / 3).pow(4).mean() for value in seen_by_norms(model, x)])
    torch.set_rng_state(rng)
    loss = OutlierLoss(model)
    loss.begin()
    model(x)
    found = loss.losses(4)
    assert found.shape == (4,)
    assert found.mean().item() == pytest.approx(per_norm.mean().item(), rel=1e-4)


def test_images_are_told_apart() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_micro").train()
    x = torch.randn(3, *model.pretrained_cfg["input_size"])

    def losses(images: Tensor) -> Tensor:
        watched.begin()
        model(images)
        return watched.losses(len(images)).detach()

    watched = OutlierLoss(model)
    alone = torch.cat([losses(image[None]) for image in x])
    assert torch.allclose(losses(x), alone, rtol=1e-4)
    assert alone.std() > 1e-3 * alone.mean()


def test_gradients_are_those_without_checkpoints() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 28, 28)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = timm.create_model("vit_micro").train()
        if checkpointed:
            checkpoint_gradients(model)
        watched = OutlierLoss(model)
        watched.begin()
        logits = model(x)
        (logits.square().sum() + watched.losses(2).sum()).backward()
        found.append([p.grad for p in model.parameters()])
        assert watched.found == []
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))


def test_a_network_without_such_a_norm_is_refused() -> None:
    with pytest.raises(ConfigError, match="Leave --outlier-weight out"):
        OutlierLoss(timm.create_model("resnet18"))


def test_training_with_it_leaves_smaller_activations(tmp_path: Path) -> None:
    plain = TrainConfig(
        data="digits", model="vit_micro", epochs=2, lr=3e-3, warmup_epochs=0, train_fraction=0.5, seed=1,
        output=str(tmp_path / "plain"),
    )  # fmt: skip
    peaks = []
    for config in (plain, replace(plain, outlier_weight=10.0, output=str(tmp_path / "even"))):
        run(config)
        model, info = load_classifier(config.output)
        torch.manual_seed(0)
        x = torch.randn(16, 3, *info.preprocess.input_size)
        peaks.append(max(float(value.abs().max()) for value in seen_by_norms(model.eval(), x)))
    assert peaks[1] < 0.8 * peaks[0], peaks
