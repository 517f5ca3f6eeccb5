"""Networks as people have them: wrappers, half precision and outputs in containers are looked through."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from leanvit import quantize
from leanvit.checkpoint import build
from leanvit.config import MPTQConfig
from leanvit.errors import ModelError, ShapeError
from leanvit.load.modules import as_network, unwrapped


@dataclasses.dataclass
class Outputs:
    loss: Tensor | None
    logits: Tensor


class Answering(nn.Module):
    """A classifier whose forward returns its logits in a container."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 5))
        self.form = form

    def forward(self, x: Tensor) -> Any:
        logits = self.layer(x)
        forms: dict[str, Any] = {
            "dict": {"features": x.mean(), "logits": logits},
            "only": {"scores": logits},
            "tuple": (logits, logits.softmax(-1)),
            "loss first": (logits.mean(), logits),
            "dataclass": Outputs(None, logits),
            "tensor": logits,
            "text": "nothing",
            "two": {"a": logits, "b": logits},
        }
        return forms[self.form]


X = torch.linspace(-1, 1, 3 * 64).reshape(1, 3, 8, 8)


@pytest.mark.parametrize("form", ["dict", "only", "tuple", "loss first", "dataclass", "tensor"])
@torch.no_grad()
def test_the_logits_are_taken_out_of_what_a_forward_returns(form: str) -> None:
    model = Answering(form)
    assert torch.equal(as_network(model, X)(X), model.layer(X))


def test_a_network_that_is_one_already_is_returned_itself_with_its_modes() -> None:
    model = Answering("tensor").train()
    model.layer[0].eval()
    assert as_network(model, X) is model
    assert [module.training for module in (model, model.layer, model.layer[0])] == [True, True, False]


@pytest.mark.parametrize(("form", "words"), [("text", "returned str"), ("two", "returned a, b")])
def test_what_has_no_logits_is_refused_with_what_it_returned(form: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        as_network(Answering(form), X)


def test_images_that_the_network_cannot_take_are_named_with_what_it_is_built_for() -> None:
    network = build("vit_micro", 2, in_chans=1, depth=1)
    with pytest.raises(ShapeError, match=r"images of 3x28x28 .* It is built for 1x28x28"):
        as_network(network, torch.zeros(1, 3, 28, 28))


@torch.no_grad()
def test_wrappers_and_precisions_are_looked_through() -> None:
    model = Answering("tensor").eval()
    wrapped = nn.DataParallel(torch.compile(model))
    assert unwrapped(wrapped) is model
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        other = Answering("tensor").eval().to(dtype)
        found = as_network(nn.DataParallel(other), X)
        assert next(found.parameters()).dtype == torch.float32
        assert next(other.parameters()).dtype == dtype
        rounded = [p.to(dtype).float() for p in model.parameters()]
        assert all(torch.equal(p, wanted) for p, wanted in zip(found.parameters(), rounded, strict=True))


def test_quantize_takes_such_networks_and_records_the_size_it_saw() -> None:
    torch.manual_seed(0)
    model = build("vit_micro", 3, depth=1, img_size=(16, 32), in_chans=1).eval()
    images = torch.rand(4, 1, 16, 32).cumsum(3) / 16 - 1
    plain = quantize(model, images, MPTQConfig(range_search=False, ratio_search=False, smoothing="none"))
    half = quantize(nn.DataParallel(model), images.half(), MPTQConfig(range_search=False, ratio_search=False))
    assert plain.preprocess is not None
    assert (plain.preprocess.input_size, plain.preprocess.channels) == ((16, 32), 1)
    assert half.preprocess == plain.preprocess
