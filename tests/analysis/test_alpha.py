"""alpha as it is in the model."""

from __future__ import annotations

import pytest
import timm
import torch

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit.analysis import learned_alpha
from leanvit.errors import ModelError


def test_one_learned_alpha_is_that_of_every_layer() -> None:
    model = timm.create_model("revit_micro")
    with torch.no_grad():
        model.alpha.fill_(0.25)
    found = learned_alpha(model)
    assert found["mode"] == "learned"
    assert found["alpha"] == [0.25] * 5
    assert found["first"] == pytest.approx([0.75, 0.5625, 0.421875, 0.31640625, 0.2373046875])


def test_an_alpha_for_each_layer_is_its_own() -> None:
    model = timm.create_model("revit_micro", alpha="per_layer")
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    with torch.no_grad():
        model.alpha.copy_(torch.tensor(values))
    assert learned_alpha(model)["alpha"] == pytest.approx(values)
    model.fuse_()
    assert learned_alpha(model) == {"mode": "fixed", **{k: pytest.approx(v) for k, v in {
        "alpha": values, "first": [0.9, 0.72, 0.504, 0.3024, 0.1512]}.items()}}  # fmt: skip


def test_first_is_the_weight_of_the_first_logits_in_what_is_carried() -> None:
    from leanvit.models._attention import residual_logits

    # Only the first layer has logits: what is left of them after each layer is their weight.
    carried, zero = torch.ones(1, 1), torch.zeros(1, 4)
    found = learned_alpha(timm.create_model("reswin_micro", alpha_init=0.3))
    for own, first in zip(found["alpha"], found["first"], strict=True):
        carried = residual_logits(zero, zero, carried, own, 1.0)
        assert carried.item() == pytest.approx(first)


def test_a_constant_alpha_is_told_as_fixed() -> None:
    assert learned_alpha(timm.create_model("reswin_micro"))["mode"] == "fixed"


@pytest.mark.parametrize(("name", "options"), [("vit_micro", {}), ("revit_micro", {"alpha": "none"})])
def test_a_model_without_residual_is_an_error(name: str, options: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="has no residual attention, expected a model with alpha"):
        learned_alpha(timm.create_model(name, **options))
