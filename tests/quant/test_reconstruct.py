"""Rounding with feedback and closed-form correction against nearest rounding, brute force and float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from leanvit.quant.quantizers import integer_range
from leanvit.quant.reconstruct import (
    SLOPES,
    Corrected,
    choose_ridge,
    compensate,
    conv_patches,
    correct,
    descend,
    regression_sums,
    round_with_feedback,
)


def correlated(rows: int, ins: int, seed: int, groups: int = 1) -> Tensor:
    """Rows whose channels go together and differ in width, (groups, rows, ins)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(groups, ins, ins, generator=generator) / ins**0.5
    width = torch.exp(torch.randn(groups, 1, ins, generator=generator))
    return torch.randn(groups, rows, ins, generator=generator) @ (mix + 0.3 * torch.eye(ins)) * width + 0.5


def dequantized(done: Corrected) -> Tensor:
    return done.integers * done.scale[..., None]


def output(done: Corrected, x: Tensor) -> Tensor:
    return x @ dequantized(done).transpose(1, 2) + done.bias[:, None]


def cost(weight: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor) -> np.ndarray:
    """(w - q) H (w - q)^T of every output channel, in float64."""
    error = (weight.double() - codes.double() * scale.double()[..., None]).numpy()
    return np.einsum("goi,gij,goj->go", error, hessian.double().numpy(), error)


def problem(outs: int, ins: int, seed: int) -> tuple[Tensor, Tensor]:
    x = correlated(8 * ins, ins, seed)
    x = x - x.mean(1, keepdim=True)
    weight = torch.randn(1, outs, ins, generator=torch.Generator().manual_seed(seed + 1))
    return weight, x.transpose(1, 2) @ x / x.shape[1]


def test_sums_of_a_regression_are_those_of_its_rows_and_its_ridge_is_sklearns() -> None:
    """All of it in float64: parts of a sum instead of a second pass must not show."""
    images, each, ins = 20, 51, 12
    x = correlated(images * each, ins, 3, groups=2).double()
    truth = torch.randn(2, 5, ins, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    error = x @ truth.transpose(1, 2) + 3 * torch.randn(2, images * each, 5, dtype=torch.float64)
    x, error = x - x.mean(1, keepdim=True), error - error.mean(1, keepdim=True)
    found, kept = regression_sums(x, error, images), 15 * each
    torch.testing.assert_close(found.hessian, x.transpose(1, 2) @ x / (images * each), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.moment, x.transpose(1, 2) @ error / (images * each), rtol=1e-10, atol=1e-12)
    left = {}
    for share in (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0):
        total = 0.0
        for own, wanted in zip(x.numpy(), error.numpy(), strict=True):
            centred = own[:kept] - own[:kept].mean(0)
            strength = share * np.square(centred).sum(0).mean()
            model = Ridge(alpha=strength).fit(own[:kept], wanted[:kept])
            total += np.square(wanted[kept:] - model.predict(own[kept:])).sum()
        left[share] = total
    assert choose_ridge(found) == min(left, key=left.__getitem__)
    assert float(found.held[2]) > min(left.values())


def test_at_eight_bits_the_output_is_nearly_exact() -> None:
    x = correlated(400, 24, 0)
    weight = torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(1))
    target = x @ weight.transpose(1, 2) + 3.0
    for ridge in (False, True):
        done = correct(weight, x, target, 8, ridge=ridge, images=20)
        error = (output(done, x) - target).norm() / (target - target.mean(1, keepdim=True)).norm()
        assert float(error) < 0.01
        assert int(done.integers.abs().max()) <= 127


def compensated(seed: int, gain: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A weight, its inputs, targets that are its outputs stretched, moved and disturbed, and what is made of them."""
    x = correlated(400, 12, seed)
    weight = torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(seed + 1))
    output = x @ weight.transpose(1, 2)
    disturbance = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed + 2))
    target = output * gain + 0.7 + noise * output.std() * disturbance
    return weight, x, target, *compensate(weight, torch.zeros(1, 6), x, target, images=20)


def test_a_line_is_found_again() -> None:
    gain = torch.tensor([0.6, 0.8, 1.0, 1.1, 1.5, 1.9])
    _, _, _, factor, bias = compensated(0, gain, 0.0)
    assert torch.allclose(factor[0], gain, atol=1e-4)
    assert torch.allclose(bias[0], torch.full((6,), 0.7), atol=1e-3)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.0, 3.0))
def test_a_compensation_never_loses_on_the_images_that_decide(seed: int, noise: float) -> None:
    weight, x, target, factor, bias = compensated(seed, torch.linspace(0.2, 3.0, 6), noise)
    output = (x @ weight.transpose(1, 2))[:, 300:]
    kept = factor == 1.0
    before = (target[:, 300:] - output).square().sum(1)
    # What is fitted on all images hardly differs from what was judged, fitted on three quarters.
    after = (target[:, 300:] - factor[:, None] * output - bias[:, None]).square().sum(1)
    assert bool((after <= before * 1.02)[~kept].all())
    assert bool((bias == 0)[kept].all())
    assert float(factor.min()) >= SLOPES[0]
    assert float(factor.max()) <= SLOPES[1]


def test_without_images_to_hold_out_nothing_is_fitted() -> None:
    weight, x = torch.randn(1, 3, 4), torch.randn(1, 10, 4)
    bias = torch.randn(1, 3)
    factor, kept = compensate(weight, bias, x, torch.randn(1, 10, 3), images=1)
    assert torch.equal(factor, torch.ones(1, 3))
    assert torch.equal(kept, bias)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(2, 6), st.sampled_from([3, 16, 80]))
def test_feedback_and_descent_are_never_worse_than_nearest_rounding(seed: int, bits: int, ins: int) -> None:
    weight, hessian = problem(6, ins, seed)
    low, high = integer_range(bits, symmetric=True)
    scale = weight.abs().amax(-1) / high
    nearest = (weight / scale[..., None]).round().clamp(low, high)
    codes, found_scale = descend(weight, hessian, *round_with_feedback(weight, hessian, bits), bits)
    assert torch.equal(codes, codes.round().clamp(low, high))
    reference = cost(weight, hessian, nearest, scale)
    assert (cost(weight, hessian, codes, found_scale) <= reference * (1 + 1e-4) + 1e-9).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 6))
def test_descent_never_raises_the_error(seed: int, bits: int) -> None:
    weight, hessian = problem(5, 70, seed)
    low, high = integer_range(bits, symmetric=True)
    scale = 0.7 * weight.abs().amax(-1) / high
    codes = (weight / scale[..., None]).round().clamp(low, high)
    before = cost(weight, hessian, codes, scale)
    after = cost(weight, hessian, *descend(weight, hessian, codes, scale, bits))
    assert (after <= before * (1 + 1e-4)).all()


def test_tiny_problems_come_near_the_optimum() -> None:
    """Two bits and four inputs: all 256 codes, each with its best scale."""
    everything = torch.tensor(list(itertools.product((-2.0, -1.0, 0.0, 1.0), repeat=4)), dtype=torch.float64)
    found, best = [], []
    for seed in range(40):
        weight, hessian = problem(1, 4, seed)
        codes, scale = descend(weight, hessian, *round_with_feedback(weight, hessian, 2), 2)
        found.append(cost(weight, hessian, codes, scale).item())
        w, h = weight[0, 0].double(), hessian[0].double()
        energy = torch.einsum("ni,ij,nj->n", everything, h, everything).clamp(min=1e-12)
        gain = (everything @ h @ w).clamp(min=0) ** 2 / energy
        best.append(float(w @ h @ w - gain.max()))
    ratios = np.array(found) / np.array(best)
    assert ratios.min() > 1 - 1e-4
    # Coordinate descent may end in a local optimum; seven in ten are within a tenth.
    assert np.median(ratios) < 1.01
    assert np.quantile(ratios, 0.7) < 1.1


@pytest.mark.parametrize("seed", range(4))
def test_ridge_lowers_held_out_error_where_inputs_are_noisy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(6, 24, generator=generator)
    clean = (torch.randn(1, 1200, 6, generator=generator) @ basis) + 1.0
    noisy = clean + 1.5 * torch.randn(clean.shape, generator=generator)
    weight = torch.randn(1, 10, 24, generator=generator)
    target = clean @ weight.transpose(1, 2)
    plain, ridge = (
        correct(weight, noisy[:, :800], target[:, :800], 6, ridge=flag, images=40) for flag in (False, True)
    )
    assert plain.correction is None
    assert ridge.correction is not None
    errors = [float((output(done, noisy[:, 800:]) - target[:, 800:]).square().sum()) for done in (plain, ridge)]
    assert errors[1] < 0.9 * errors[0]


def test_ridge_is_left_out_where_nothing_is_to_gain() -> None:
    x = correlated(400, 8, 3)
    weight = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(3))
    # The residual is noise that no linear map of the inputs explains.
    noise = torch.randn(1, 400, 5, generator=torch.Generator().manual_seed(4))
    held = [correct(weight, x, x @ weight.transpose(1, 2) + noise, 8, ridge=True, images=20).correction]
    assert held[0] is None or held[0] >= 1e-1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(2, 8), st.floats(-5, 5))
def test_bias_removes_the_mean_error(seed: int, bits: int, shift: float) -> None:
    x = correlated(300, 12, seed) + shift
    weight = torch.randn(1, 7, 12, generator=torch.Generator().manual_seed(seed))
    target = x @ weight.transpose(1, 2) + torch.arange(7.0)
    done = correct(weight, x, target, bits, ridge=False, images=10)
    assert float((output(done, x) - target).double().mean(1).abs().max()) < 1e-3


def test_groups_equal_separate_calls() -> None:
    groups = 3
    x = correlated(320, 10, 5, groups)
    weight = torch.randn(groups, 4, 10, generator=torch.Generator().manual_seed(6))
    target = x @ weight.transpose(1, 2)
    together = correct(weight, x, target, 3, ridge=False, images=16)
    for g in range(groups):
        alone = correct(weight[g : g + 1], x[g : g + 1], target[g : g + 1], 3, ridge=False, images=16)
        assert torch.equal(together.integers[g], alone.integers[0])
        assert torch.allclose(together.scale[g], alone.scale[0], rtol=1e-4)
        assert torch.allclose(together.bias[g], alone.bias[0], rtol=1e-4, atol=1e-4)


def test_dead_inputs_do_no_harm() -> None:
    x = correlated(200, 8, 7)
    x[..., 2] = 0.0
    weight = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(8))
    for values in (x, torch.zeros_like(x)):
        target = values @ weight.transpose(1, 2) + 1.0
        done = correct(weight, values, target, 4, ridge=True, images=10)
        assert bool(output(done, values).isfinite().all())
        assert float((output(done, values) - target).square().mean()) <= 0.1 * float(target.var()) + 1e-6


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups"),
    [((3, 3), (1, 1), (1, 1), (1, 1), 1), ((3, 3), (2, 2), (1, 1), (1, 1), 4), ((2, 4), (2, 1), (0, 3), (1, 2), 2)],
)
def test_patches_give_the_convolution(
    kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], groups: int
) -> None:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 4, 9, 11, generator=generator)
    weight = torch.randn(8, 4 // groups, *kernel, generator=generator)
    rows = conv_patches(x, weight, (stride, padding, dilation, groups))
    found = rows @ weight.reshape(groups, 8 // groups, -1).transpose(1, 2)
    expected = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    places = expected.flatten(2).transpose(1, 2).reshape(-1, groups, 8 // groups).transpose(0, 1)
    assert torch.allclose(found, places, atol=1e-4)
