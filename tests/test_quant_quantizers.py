"""Quantizers against integer arithmetic and the properties of rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from leanvit.quant.observe import _measure
from leanvit.quant.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
    asymmetric_parameters,
    code_range,
    fake_quantize,
    quantize_codes,
    symmetric_scale,
)
from leanvit.quant.search import search_range, search_weight_scale

BITS = st.integers(2, 8)
VALUES = arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e3, 1e3, width=32))


def fitted(values: torch.Tensor, bits: int) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits)
    quantizer.set_range(values.min(), values.max())
    return quantizer


@settings(deadline=None)
@given(VALUES, BITS)
def test_activation_quantizer_is_idempotent(values: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(values)
    quantizer = fitted(x, bits)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)


@settings(deadline=None)
@given(VALUES, BITS)
def test_activation_quantizer_is_monotone(values: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(np.sort(values))
    assert bool((fitted(x, bits)(x).diff() >= 0).all())


@settings(deadline=None)
@given(VALUES, BITS)
def test_activation_error_is_at_most_half_a_step_inside_the_range(values: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(values)
    quantizer = fitted(x, bits)
    # The zero point is rounded, so one end of the range may lie up to half a step beyond the grid.
    assert float((quantizer(x) - x).abs().max()) <= float(quantizer.scale) * 1.001 + 1e-6


@settings(deadline=None)
@given(VALUES, BITS)
def test_zero_is_represented_exactly(values: np.ndarray, bits: int) -> None:
    quantizer = fitted(torch.from_numpy(values), bits)
    assert float(quantizer(torch.zeros(1))) == 0.0


@settings(deadline=None)
@given(VALUES, BITS)
def test_fake_quantization_equals_integer_arithmetic(values: np.ndarray, bits: int) -> None:
    x = torch.from_numpy(values)
    scale, zero_point = asymmetric_parameters(x.min(), x.max(), bits)
    low, high = code_range(bits, symmetric=False)
    # NumPy's rint is half to even as ONNX's QuantizeLinear is; integers from there on.
    codes = np.clip(np.rint(values / scale.numpy()).astype(np.int64) + int(zero_point), low, high)
    expected = (codes - int(zero_point)).astype(np.float32) * scale.numpy()
    assert np.array_equal(fake_quantize(x, scale, zero_point, low, high).numpy(), expected)


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantized_product_equals_the_integer_product(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(5, 16, generator=generator)
    weight = torch.randn(7, 16, generator=generator)
    activation, held = fitted(x, bits), WeightQuantizer((7, 16), bits)
    held.set_weight(weight, symmetric_scale(weight.abs().amax(1), bits))
    codes = quantize_codes(x, activation.scale, activation.zero_point.float(), activation.low, activation.high)
    integers = (codes.long() - int(activation.zero_point)) @ held.codes.long().t()
    expected = integers.double() * activation.scale.double() * held.scale.double()
    simulated = activation(x).double() @ held().double().t()
    assert torch.allclose(simulated, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_codes_stay_in_range_and_are_idempotent(bits: int) -> None:
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    held = WeightQuantizer(tuple(weight.shape), bits)
    held.set_weight(weight, search_weight_scale(weight, bits))
    assert int(held.codes.abs().max()) <= 2 ** (bits - 1) - 1
    again = WeightQuantizer(tuple(weight.shape), bits)
    again.set_weight(held(), held.scale)
    assert torch.equal(again.codes, held.codes)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**31), BITS)
def test_searched_range_is_never_worse_than_min_max(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, 8, generator=generator) ** 3
    statistics = _measure(x, 4096)
    values = torch.cat([statistics.sample, x.min().view(1), x.max().view(1)])

    def error(minimum: torch.Tensor, maximum: torch.Tensor) -> float:
        quantizer = ActivationQuantizer(bits)
        quantizer.set_range(minimum, maximum)
        return float((quantizer(values) - values).square().sum())

    assert error(*search_range(statistics, bits)) <= error(x.min(), x.max()) * (1 + 1e-5)


def test_searched_weight_scale_heeds_important_inputs() -> None:
    # One huge weight on an input that is always zero: covering it would waste all three bits.
    weight = torch.tensor([[10.0, 0.3, -0.2, 0.1]])
    blind = search_weight_scale(weight, 3)
    heeding = search_weight_scale(weight, 3, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert float(heeding) < 0.5 * float(blind)
