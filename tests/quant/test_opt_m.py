"""Searched quantizers against minimum and maximum, and against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from leanvit.quant.graph import Site
from leanvit.quant.opt_m import choose_form, fit_activation
from leanvit.quant.quantizers import Form
from leanvit.quant.samples import SiteSample

FORMS: tuple[Form, ...] = ("uniform", "two-region", "log2", "log-sqrt2")


def sample_of(x: Tensor, kind: str | None = None) -> SiteSample:
    """A site whose error is the squared error of its input."""
    return SiteSample(Site("conv", "conv2d", "conv", 0), (x,), ((x.min(), x.max()),), None, None, (kind,))


def linear_sample(x: Tensor, weight: Tensor) -> SiteSample:
    return SiteSample(Site("fc", "linear", "fc", 0), (x,), ((x.min(), x.max()),), None, weight, (None,))


def gelu_values(count: int = 3000, seed: int = 0) -> Tensor:
    return F.gelu(torch.randn(count, generator=torch.Generator().manual_seed(seed)))


def peaked_softmax(seed: int = 0) -> Tensor:
    """Attention of 4 images and 3 heads over 50 keys, most of it on few of them."""
    return (4 * torch.randn(4, 3, 20, 50, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from(["uniform", "two-region"]))
def test_searched_ranges_are_never_worse_than_min_max(seed: int, bits: int, form: Form) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 8, generator=generator) ** 3
    weight = torch.randn(5, 8, generator=generator)
    for sample in (sample_of(x), linear_sample(x, weight)):
        plain, _ = fit_activation(sample, 0, bits, search=False)
        _, least = fit_activation(sample, 0, bits)
        measure = sample.error(0, grouped=False)
        assert float(least) <= float(measure(plain(x))) * (1 + 1e-5)
        quantizer, claimed = fit_activation(sample, 0, bits, form)
        assert float(claimed) == pytest.approx(float(measure(quantizer(x))), rel=1e-4, abs=1e-6)


def test_the_error_of_a_linear_is_that_of_its_output() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 8, generator=generator)
    for outs in (3, 20):
        weight = torch.randn(outs, 8, generator=generator)
        quantizer, least = fit_activation(linear_sample(x, weight), 0, 4)
        delta = (quantizer(x) - x).double().numpy() @ weight.double().numpy().T
        assert float(least) == pytest.approx(float((delta**2).sum()), rel=1e-4)


def test_scores_are_judged_without_what_all_keys_share() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 3, 6, 4, generator=generator), torch.randn(2, 3, 4, 6, generator=generator)
    bounds = tuple((v.min(), v.max()) for v in (q, k))
    sample = SiteSample(Site("attn.qk", "matmul", "m", 0), (q, k), bounds, bounds, None, (None, None))
    moved = k + torch.randn(2, 3, 4, 1, generator=generator)
    assert float(sample.error(1, grouped=False)(moved)) < 1e-8
    assert float(sample.error(1, grouped=False)(k + 0.1 * torch.randn(k.shape, generator=generator))) > 1e-2


def brute_force(x: np.ndarray, bits: int) -> float:
    """Least squared error over a fine grid of small steps, all ratios and all zero points."""
    levels = 2 ** (bits - 1)
    least = np.inf
    for ratio in range(8):
        top = (levels - 1) * 2.0**ratio
        for step in x.max() / top * np.geomspace(0.02, 1.3, 100):
            for zero_point in range(levels):
                codes = np.arange(levels)
                grid = np.unique(np.concatenate([codes - zero_point, codes * 2**ratio])) * step
                nearest = grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, x)]
                least = min(least, float(((nearest - x) ** 2).sum()))
    return least


@pytest.mark.parametrize("bits", [3, 4])
def test_opt_m_is_near_the_best_of_all_two_region_quantizers(bits: int) -> None:
    x = gelu_values(1000)
    _, least = fit_activation(sample_of(x, "gelu"), 0, bits, "two-region")
    assert float(least) <= 1.02 * brute_force(x.double().numpy(), bits)


@pytest.mark.parametrize("seed", range(3))
def test_two_regions_beat_uniform_steps_at_four_bits_where_most_values_are_small(seed: int) -> None:
    # Not for GELU of a wide Gaussian: half its values are spread evenly, and codes that both regions have are lost.
    generator = torch.Generator().manual_seed(seed)
    mostly_negative = F.gelu(torch.randn(3000, generator=generator) - 1)
    heavy = F.gelu(torch.randn(3000, generator=generator) * torch.randn(3000, generator=generator).exp())
    attention = (2 * torch.randn(4, 3, 10, 197, generator=generator)).softmax(-1)
    for x in (mostly_negative, heavy, attention):
        sample = sample_of(x)
        _, uniform = fit_activation(sample, 0, 4)
        _, regions = fit_activation(sample, 0, 4, "two-region")
        assert float(regions) < 0.8 * float(uniform)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_chosen_form_is_the_best(bits: int) -> None:
    for x in (peaked_softmax(), torch.rand(2000, generator=torch.Generator().manual_seed(0))):
        sample = sample_of(x, "softmax")
        errors = {form: float(fit_activation(sample, 0, bits, form)[1]) for form in FORMS}
        quantizer, error = choose_form(sample, 0, bits, FORMS)
        assert float(error) == min(errors.values()) == errors[quantizer.form]


def test_every_head_gets_its_own_best_parameters() -> None:
    generator = torch.Generator().manual_seed(3)
    spread = torch.tensor([0.01, 1.0, 30.0]).view(3, 1, 1)
    a, b = (torch.randn(4, 3, 8, 8, generator=generator) * spread for _ in range(2))

    def sample(a: Tensor, b: Tensor, *, heads: bool) -> SiteSample:
        bounds = tuple((v.min(), v.max()) for v in (a, b))
        by_head = tuple(
            (v.movedim(1, 0).flatten(1).amin(1).view(-1, 1, 1), v.movedim(1, 0).flatten(1).amax(1).view(-1, 1, 1))
            for v in (a, b)
        )
        return SiteSample(
            Site("attn.av", "matmul", "m", 0), (a, b), bounds, by_head if heads else None, None, (None, None)
        )

    quantizer, errors = fit_activation(sample(a, b, heads=True), 0, 4, per_head=True)
    assert errors.shape == (3, 1, 1)
    for head in range(3):
        alone, error = fit_activation(sample(a[:, head : head + 1], b[:, head : head + 1], heads=False), 0, 4)
        assert float(errors[head]) == pytest.approx(float(error), rel=1e-4)
        assert float(quantizer.scale[head]) == pytest.approx(float(alone.scale), rel=1e-6)
