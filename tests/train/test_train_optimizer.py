"""Optimizer groups, frozen layers and class weights, against timm and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.checkpoint import classifier_prefixes
from leanvit.config import TrainConfig
from leanvit.errors import ConfigError
from leanvit.train.optimizer import balanced_weights, freeze, make_optimizer, set_learning_rate

FAMILIES = ["revit_micro", "exmobilevit_micro", "vitae_micro", "vitaev2_micro", "reswin_micro", "deit_micro"]


@pytest.mark.parametrize("name", FAMILIES)
def test_layer_decay_gives_the_rates_of_timms_own_program(name: str) -> None:
    model = timm.create_model(name, num_classes=4)
    optimizer = make_optimizer(model, TrainConfig(lr=0.1, layer_decay=0.5))
    theirs = timm.optim.create_optimizer_v2(model, "adamw", 0.1, 0.05, layer_decay=0.5)
    set_learning_rate(optimizer, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}

    def rates(groups: list[dict[str, object]], key: str) -> dict[str, tuple[float, float]]:
        return {names[id(p)]: (group[key], group["weight_decay"]) for group in groups for p in group["params"]}

    expected = {n: (0.1 * scale, decay) for n, (scale, decay) in rates(theirs.param_groups, "lr_scale").items()}
    found = rates(optimizer.param_groups, "lr")
    assert found.keys() == expected.keys()
    assert all(found[n] == pytest.approx(expected[n]) for n in expected)
    head = next(n for n in expected if n.startswith(("head", "classifier", "fc")))
    assert expected[head][0] == pytest.approx(0.1)
    assert min(rate for rate, _ in expected.values()) < 0.06


@pytest.mark.parametrize("name", FAMILIES)
def test_a_frozen_backbone_keeps_every_value_and_the_classifier_learns(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4, drop_path_rate=0.5)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model, TrainConfig(lr=0.1))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    model.train()

    def of_head(name: str) -> bool:
        return any(name == prefix or name.startswith(f"{prefix}.") for prefix in classifier_prefixes(model))

    freeze(model, learning, of_head, frozen=True)
    x = torch.randn(4, 3, *model.pretrained_cfg["input_size"][1:])
    model(x).square().sum().backward()
    optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    prefixes = model.pretrained_cfg["classifier"]
    prefixes = (prefixes,) if isinstance(prefixes, str) else prefixes
    assert changed
    assert all(n.startswith(tuple(prefixes)) for n in changed)
    model.train()
    freeze(model, learning, of_head, frozen=False)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == learning
    assert model.training


def test_extra_modules_learn_at_the_full_rate() -> None:
    extra = torch.nn.Linear(2, 2)
    model = timm.create_model("revit_micro", num_classes=4)
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5), extra)
    set_learning_rate(optimizer, 0.3)
    assert {id(p) for p in optimizer.param_groups[-1]["params"]} == {id(p) for p in extra.parameters()}
    assert optimizer.param_groups[-1]["lr"] == 0.3


def test_an_unknown_optimizer_is_named_with_the_nearest() -> None:
    model = timm.create_model("revit_micro", num_classes=4)
    with pytest.raises(ConfigError, match=r"opt is 'adamv'. Did you mean 'adam"):
        make_optimizer(model, TrainConfig(opt="adamv"))


@given(st.lists(st.integers(0, 4), min_size=5, max_size=60).map(lambda labels: [*labels, 0, 1, 2, 3, 4]))
def test_balanced_weights_are_those_of_scikit_learn(labels: list[int]) -> None:
    expected = compute_class_weight("balanced", classes=np.arange(5), y=labels)
    found = balanced_weights(np.array(labels), 5)
    assert np.allclose(found.numpy(), expected)
    assert float(found[torch.tensor(labels)].mean()) == pytest.approx(1.0, abs=1e-5)
