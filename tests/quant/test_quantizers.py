"""Quantizers against integer arithmetic and the properties of rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from leanvit.errors import ConfigError
from leanvit.quant.opt_m import search_weight_scale
from leanvit.quant.quantizers import (
    FORMS,
    Form,
    TwoRegionQuantizer,
    UniformQuantizer,
    WeightQuantizer,
    asymmetric_parameters,
    fake_quantize,
    integer_range,
    make_quantizer,
    quantized_integers,
    register,
    round_to_step,
    symmetric_scale,
)

BITS = st.integers(2, 8)
VALUES = arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e3, 1e3, width=32))


def fitted(values: torch.Tensor, bits: int) -> UniformQuantizer:
    quantizer = UniformQuantizer(bits)
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
    low, high = integer_range(bits, symmetric=False)
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
    codes = quantized_integers(x, activation.scale, activation.zero_point.float(), activation.low, activation.high)
    integers = (codes.long() - int(activation.zero_point)) @ held.codes.long().t()
    expected = integers.double() * activation.scale.double() * held.scale.double()
    simulated = activation(x).double() @ held().double().t()
    assert torch.allclose(simulated, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_codes_stay_in_range_and_are_idempotent(bits: int) -> None:
    weight = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3
    held = WeightQuantizer(tuple(weight.shape), bits)
    held.set_weight(weight, search_weight_scale(weight, bits))
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    assert lowest <= int(held.codes.min())
    assert int(held.codes.max()) <= 2 ** (bits - 1) - 1
    again = WeightQuantizer(tuple(weight.shape), bits)
    again.set_weight(held(), held.scale)
    assert torch.equal(again.codes, held.codes)


@pytest.mark.parametrize("bits", range(2, 8))
def test_below_8_bits_a_weight_takes_every_integer_of_twos_complement(bits: int) -> None:
    # A channel that is exactly the integers: with the lowest of them left out it could not be held without error.
    weight = torch.arange(-(2.0 ** (bits - 1)), 2.0 ** (bits - 1))[None]
    held = WeightQuantizer(tuple(weight.shape), bits)
    held.set_weight(weight, torch.ones(1))
    assert torch.equal(held(), weight)


def test_searched_weight_scale_heeds_important_inputs() -> None:
    # One huge weight on an input that is always zero: covering it would waste all three bits.
    weight = torch.tensor([[10.0, 0.3, -0.2, 0.1]])
    blind = search_weight_scale(weight, 3)
    heeding = search_weight_scale(weight, 3, torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert float(heeding) < 0.5 * float(blind)


def two_region(bits: int, scale: float, ratio: int, zero_point: int) -> TwoRegionQuantizer:
    quantizer = TwoRegionQuantizer(bits)
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(float(zero_point)), torch.tensor(float(ratio)))
    return quantizer


def two_region_codes(bits: int, ratio: int, zero_point: int) -> np.ndarray:
    """All values of a two-region quantizer in units of its small step, as whole numbers."""
    codes = np.arange(2 ** (bits - 1))
    return np.unique(np.concatenate([codes - zero_point, codes * 2**ratio]))


@st.composite
def two_regions(draw: st.DrawFn) -> tuple[int, float, int, int]:
    """bits, scale, ratio and zero point."""
    bits = draw(BITS)
    scale = draw(st.floats(2.0**-10, 10.0, width=32))
    return bits, scale, draw(st.integers(0, 7)), draw(st.integers(0, 2 ** (bits - 1) - 1))


SHARES = arrays(np.float32, st.integers(1, 100), elements=st.floats(-1.0, 1.25, width=32))


def spread_over(shares: np.ndarray, parameters: tuple[int, float, int, int]) -> torch.Tensor:
    """Values below, in and above both regions."""
    bits, scale, ratio, zero_point = parameters
    codes = two_region_codes(bits, ratio, zero_point)
    reach = max(abs(codes.min()), codes.max())
    return torch.from_numpy(shares * np.float32(reach * scale))


@settings(deadline=None)
@given(SHARES, two_regions())
def test_two_region_values_are_the_nearest_of_all_codes(
    shares: np.ndarray, parameters: tuple[int, float, int, int]
) -> None:
    bits, scale, ratio, zero_point = parameters
    x = spread_over(shares, parameters)
    found = two_region(*parameters)(x).numpy()
    whole = np.rint(found.astype(np.float64) / scale).astype(np.int64)
    codes = two_region_codes(bits, ratio, zero_point)
    assert np.isin(whole, codes).all()
    assert np.array_equal(found, whole.astype(np.float32) * np.float32(scale))
    exact = x.numpy().astype(np.float64)
    least = np.abs(codes * float(np.float32(scale)) - exact[:, None]).min(1)
    # Up to ties, which float32 may break either way.
    slack = 1e-5 * (np.abs(exact) + scale)
    assert (np.abs(whole * float(np.float32(scale)) - exact) <= least + slack).all()


@settings(deadline=None)
@given(SHARES, two_regions())
def test_two_region_quantizer_is_idempotent_monotone_and_keeps_zero(
    shares: np.ndarray, parameters: tuple[int, float, int, int]
) -> None:
    quantizer = two_region(*parameters)
    x = spread_over(np.sort(shares), parameters)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    assert bool((once.diff() >= 0).all())
    assert float(quantizer(torch.zeros(1))) == 0.0


@pytest.mark.parametrize("ratio", range(6))
@pytest.mark.parametrize("zero_point", range(8))
def test_two_regions_of_four_bits_fit_unsigned_bytes(ratio: int, zero_point: int) -> None:
    # What lets an integer runtime store them as uint8 with one scale: the offset from the smallest code.
    x = torch.linspace(-10, 300, 3000)
    offsets = two_region(4, 1.0, ratio, zero_point)(x) + zero_point
    assert float(offsets.min()) == 0.0
    assert float(offsets.max()) <= 255.0
    assert torch.equal(offsets, offsets.to(torch.uint8).float())


@settings(deadline=None)
@given(
    arrays(np.float32, st.integers(1, 100), elements=st.floats(2.0**-20, 2.0, width=32)),
    st.integers(2, 8),
    st.floats(2.0**-7, 1.0, width=32),
    st.sampled_from([("log2", 1), ("log-sqrt2", 2)]),
)
def test_log_values_are_the_nearest_powers(values: np.ndarray, bits: int, scale: float, form: tuple[Form, int]) -> None:
    name, resolution = form
    quantizer = make_quantizer(name, bits)
    quantizer.set_parameters(torch.tensor(scale), torch.tensor(0.0))
    found = np.log2(quantizer(torch.from_numpy(values)).numpy().astype(np.float64) / scale)
    grid = -np.arange(2**bits) / resolution
    assert (np.abs(found[:, None] - grid).min(1) < 1e-5).all()
    wanted = np.log2(values.astype(np.float64) / scale)
    assert (np.abs(found - wanted) <= np.abs(grid - wanted[:, None]).min(1) + 1e-5).all()


def test_log_quantizers_turn_zero_into_their_smallest_value() -> None:
    quantizer = make_quantizer("log2", 3)
    assert float(quantizer(torch.zeros(1))) == 2.0**-7


@pytest.mark.parametrize("form", ["uniform", "two-region", "log2", "log-sqrt2"])
def test_parameters_by_head_equal_one_quantizer_for_each_head(form: Form) -> None:
    heads, bits = 3, 4
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, heads, 5, 7, generator=generator) - (0.2 if form in ("uniform", "two-region") else 0.0)
    scales = torch.tensor([0.01, 0.1, 0.3])
    parameters = [scales, torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0.0, 2.0, 5.0])][
        : 3 if form == "two-region" else 2
    ]
    whole = make_quantizer(form, bits, heads)
    whole.set_parameters(*(p.view(-1, 1, 1) for p in parameters))
    found = whole(x)
    for head in range(heads):
        single = make_quantizer(form, bits)
        single.set_parameters(*(p[head] for p in parameters))
        assert torch.equal(found[:, head], single(x[:, head]))


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        make_quantizer("log3", 4)


@settings(deadline=None, max_examples=50)
@given(arrays(np.float32, 40, elements=st.floats(-20, 20, width=32)), st.floats(0.125, 2.0, width=32))
def test_gradients_pass_straight_through_the_rounding(values: np.ndarray, step: float) -> None:
    low, high = -8.0, 7.0
    x, scale = torch.from_numpy(values).requires_grad_(), torch.tensor(step, requires_grad=True)
    found = round_to_step(x, scale, low, high)
    with torch.no_grad():
        assert torch.allclose(found, round_to_step(x, scale, low, high), rtol=1e-5, atol=1e-5)
    found.sum().backward()
    steps = values.astype(np.float32) / np.float32(step)
    rounded = np.rint(steps)
    inside, edge = (rounded > low) & (rounded < high), (rounded == low) | (rounded == high)
    gradient = x.grad.numpy()
    # At the edge itself the clamp may share the gradient.
    assert np.allclose(gradient[inside], 1.0)
    assert np.allclose(gradient[~inside & ~edge], 0.0)
    if not edge.any():
        # LSQ: rounding error inside the range, the bound beyond it.
        expected = np.where(inside, rounded - steps, np.clip(rounded, low, high)).sum()
        assert float(scale.grad) == pytest.approx(float(expected), abs=1e-2)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("bits", [2, 4, 7])
def test_values_fill_the_range_that_a_quantizer_names_and_stay_in_it(form: Form, bits: int) -> None:
    x = torch.linspace(-3, 5, 2001) if form in ("uniform", "two-region") else torch.linspace(1e-6, 1, 2001)
    quantizer = make_quantizer(form, bits)
    for parameters in quantizer.candidates(x.min(), x.max()):
        quantizer.set_parameters(*parameters)
        low, high = (float(bound) for bound in quantizer.value_range())
        found = quantizer(torch.cat([x, torch.tensor([-1e4, 1e-30, 1e4])]))
        assert float(found.min()) == pytest.approx(low, rel=1e-6, abs=1e-9)
        assert float(found.max()) == pytest.approx(high, rel=1e-6)


@pytest.mark.parametrize("form", list(FORMS))
def test_refined_parameters_begin_with_those_that_are_set(form: Form) -> None:
    quantizer, low, high = make_quantizer(form, 4), torch.tensor(-0.1), torch.tensor(2.0)
    quantizer.set_parameters(*list(quantizer.candidates(low, high))[3])
    expected = [value.float() for value in quantizer.state_dict().values()]
    first = next(quantizer.refined(low, high), None)
    assert first is None or [float(value) for value in first] == [float(value) for value in expected]
    assert (first is None) == form.startswith("log")


def test_a_new_class_of_quantizer_is_found_by_its_form_and_names_are_not_taken_twice() -> None:
    class Binary(UniformQuantizer):
        form = "binary of a test"

    try:
        register(Binary)
        assert isinstance(make_quantizer("binary of a test", 2), Binary)
        register(Binary)  # a module that is read again

        class Other(UniformQuantizer):
            form = "binary of a test"

        with pytest.raises(ConfigError, match="Binary already"):
            register(Other)
    finally:
        FORMS.pop("binary of a test")


@pytest.mark.parametrize("heads", [0, 3])
@pytest.mark.parametrize("bounds_are_tensors", [False, True])
def test_gradients_are_those_of_lsq(heads: int, bounds_are_tensors: bool) -> None:
    """dq/dx is 1 inside the bounds; dq/ds is round(v) - v there, and the bound outside; in float64."""
    generator = torch.Generator().manual_seed(heads)
    shape = (heads, 1, 1) if heads else ()
    x = torch.randn(4, 3, 11, 13, generator=generator, dtype=torch.float64).requires_grad_()
    scale = (0.1 + torch.rand(shape, generator=generator, dtype=torch.float64) / 5).requires_grad_()
    low, high = (torch.tensor(b, dtype=torch.float64) if bounds_are_tensors else b for b in (-3.0, 4.0))
    weight = torch.randn(4, 3, 11, 13, generator=generator, dtype=torch.float64)
    (round_to_step(x, scale, low, high) * weight).sum().backward()
    v, w = (x / scale).detach().numpy(), weight.numpy()
    rounded = np.round(v)
    inside = (rounded >= -3) & (rounded <= 4)
    by_scale = w * np.where(inside, rounded - v, np.clip(rounded, -3, 4))
    np.testing.assert_allclose(x.grad.numpy(), w * inside, rtol=1e-12)
    expected = by_scale.sum((0, 2, 3)).reshape(shape) if heads else by_scale.sum()
    np.testing.assert_allclose(scale.grad.numpy(), expected, rtol=1e-9)
