"""Every class of quantizer has its ONNX form by class, also one from outside the package."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from leanvit.export.onnx.quantizers import Branch, FloatQuantizer, QDQPair, WholeNumbers, branches_of
from leanvit.quant.quantizers import ActivationQuantizer, UniformQuantizer, make_quantizer


@pytest.mark.parametrize(
    ("form", "bits", "heads", "found"),
    [
        ("uniform", 8, None, [QDQPair]),
        ("uniform", 4, None, [QDQPair]),
        ("uniform", 6, 3, [WholeNumbers]),
        ("two-region", 4, None, [WholeNumbers]),
        ("log2", 4, None, [FloatQuantizer]),
        ("log-sqrt2", 4, 3, [FloatQuantizer]),
    ],
)
def test_the_form_follows_from_the_class(form: str, bits: int, heads: int | None, found: list[type]) -> None:
    assert [type(branch.module) for branch in branches_of(make_quantizer(form, bits, heads))] == found


@pytest.mark.parametrize(("ratio", "found"), [(4, 1), (5, 2)])
def test_two_regions_become_two_summands_where_one_byte_is_too_short(ratio: int, found: int) -> None:
    quantizer = make_quantizer("two-region", 5)
    # 15 steps of 2^4 are 240 small ones, which fit; 15 of 2^5 are 480.
    quantizer.set_parameters(torch.tensor(0.1), torch.tensor(3.0), torch.tensor(float(ratio)))
    assert len(branches_of(quantizer)) == found


def test_a_class_from_outside_is_float_arithmetic_until_it_registers_a_form() -> None:
    class Sign(ActivationQuantizer):
        form = "sign"

        def forward(self, x: Tensor) -> Tensor:
            return x.sign() * self.scale

    class Narrow(UniformQuantizer):
        form = "narrow"

    (branch,) = branches_of(Sign(2))
    assert isinstance(branch.module, FloatQuantizer)
    assert torch.equal(branch.module(torch.tensor([-3.0, 2.0])), torch.tensor([-1.0, 1.0]) * Sign(2).scale)
    assert isinstance(branches_of(Narrow(8))[0].module, QDQPair)

    @branches_of.register(Sign)
    def _(quantizer: Sign, *, four_bit_types: bool = False, signed: bool = False) -> list[Branch]:
        return [Branch(nn.Identity())]

    assert isinstance(branches_of(Sign(2))[0].module, nn.Identity)
