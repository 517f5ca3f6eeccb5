"""Search of quantizer parameters: those with the least squared error of the site's output on calibration data.

OPT-m (MPTQ-ViT, arXiv 2401.14895) chooses the ratio 2^m and the small step d1 of two-region quantizers from
data instead of by hand; the same objective sets uniform ranges and chooses between forms. Everything is
evaluated on a sample of a site's inputs (see `samples`), never by running the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from leanvit.quant.quantizers import (
    MAX_RATIO,
    ActivationQuantizer,
    Form,
    asymmetric_parameters,
    code_range,
    fake_quantize,
    make_quantizer,
    symmetric_scale,
)
from leanvit.quant.samples import SiteSample, some_values

Error = Callable[[Tensor], Tensor]
"""Squared error of a site's output where one operand is replaced: () or (heads, 1, 1)."""

Parameters = tuple[Tensor, ...]

_SHARES = torch.cat([torch.linspace(0.1, 0.5, 7)[:-1], torch.linspace(0.5, 1.0, 13)])
_FINE_SHARES = torch.linspace(0.65, 1.0, 8)
"""Shares of the observed range for 7 and 8 bits, where clipping more than a third never pays."""

_TOPS = torch.logspace(-1.2, 0.0, 10, base=10.0)
_REFINED = (0.85, 0.92, 0.96, 1.04, 1.08, 1.15)


def _best(quantizer: ActivationQuantizer, x: Tensor, error: Error, candidates: Iterable[Parameters]) -> Tensor:
    """Set the quantizer to the best candidate, for each head its own; returns the least errors."""
    least: Tensor | None = None
    chosen: Parameters = ()
    for candidate in candidates:
        quantizer.set_parameters(*candidate)
        found = error(quantizer(x))
        if least is None:
            least, chosen = found, tuple(p.clone() for p in candidate)
            continue
        better = found < least
        least = torch.where(better, found, least)
        chosen = tuple(torch.where(better, new, old) for new, old in zip(candidate, chosen, strict=True))
    if least is None:
        raise ValueError("no candidates to search")
    quantizer.set_parameters(*chosen)
    return least


def fit_activation(
    sample: SiteSample, operand: int, bits: int, form: Form = "uniform", *, per_head: bool = False, search: bool = True
) -> tuple[ActivationQuantizer, Tensor]:
    """A quantizer for one operand of a site with the least error of the site's output.

    form: see `quantizers`. per_head: parameters of its own for each head, where the operand has heads.
    search: False takes the observed minimum and maximum (uniform only).
    Returns the quantizer and its squared error, () or (heads, 1, 1).
    """
    heads = sample.heads if per_head else None
    x = sample.inputs[operand]
    error = sample.error(operand, grouped=heads is not None)
    quantizer = make_quantizer(form, bits, heads).to(x.device)
    low, high = sample.bounds(operand, grouped=heads is not None)
    if form == "uniform":
        candidates = _uniform_ranges(low, high, bits) if search else iter([asymmetric_parameters(low, high, bits)])
        least = _best(quantizer, x, error, candidates)
        if search:
            least = _best(quantizer, x, error, _refined_ranges(quantizer))
    elif form == "two-region":
        least = _best(quantizer, x, error, _two_region_grid(low, high, bits))
        least = _best(quantizer, x, error, _refined_steps(quantizer, low, bits))
    else:
        least = _best(quantizer, x, error, _log_tops(high))
    return quantizer, least


def fit_tensor(x: Tensor, bits: int) -> ActivationQuantizer:
    """A uniform quantizer with the least squared error of x itself, a tensor of any shape."""
    x = some_values(x)
    quantizer = make_quantizer("uniform", bits).to(x.device)
    _best(quantizer, x, lambda rounded: (rounded - x).square().sum(), _uniform_ranges(x.amin(), x.amax(), bits))
    return quantizer


def choose_form(
    sample: SiteSample, operand: int, bits: int, forms: Iterable[Form], *, per_head: bool = False
) -> tuple[ActivationQuantizer, Tensor]:
    """The form among `forms` with the least error, and its error; ties go to the earlier."""
    fitted = [fit_activation(sample, operand, bits, form, per_head=per_head) for form in forms]
    return min(fitted, key=lambda pair: float(pair[1].sum()))


def _uniform_ranges(low: Tensor, high: Tensor, bits: int) -> Iterator[Parameters]:
    """The observed range shrunk by every share; the whole range is among them."""
    for share in (_FINE_SHARES if bits > 6 else _SHARES).tolist():
        yield asymmetric_parameters(low * share, high * share, bits)


def _refined_ranges(quantizer: ActivationQuantizer) -> Iterator[Parameters]:
    """Each end of the best range moved alone."""
    scale, zero_point = quantizer.scale.clone(), quantizer.zero_point.float()
    first, last = -zero_point * scale, (quantizer.high - zero_point) * scale
    yield scale, zero_point
    for low, high in [(a, 1.0) for a in _REFINED] + [(1.0, a) for a in _REFINED]:
        yield asymmetric_parameters(first * low, last * high, quantizer.bits)


def _zero_point(low: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes of region 1 below zero: enough for the negative tail, at most all."""
    return torch.round(-low.clamp(max=0.0) / step).clamp(0, 2 ** (bits - 1) - 1)


def _two_region_grid(low: Tensor, high: Tensor, bits: int) -> Iterator[Parameters]:
    """Every m, with d1 such that the largest value is a share of the observed maximum (log grid)."""
    for ratio in range(MAX_RATIO + 1):
        for top in _TOPS.tolist():
            step = (high * top / ((2 ** (bits - 1) - 1) * 2.0**ratio)).clamp(min=1e-8)
            yield step, _zero_point(low, step, bits), torch.full_like(step, ratio)


def _refined_steps(quantizer: ActivationQuantizer, low: Tensor, bits: int) -> Iterator[Parameters]:
    """The best d1 moved a little, and region 1 shared otherwise between negative and positive values."""
    scale, ratio = quantizer.scale.clone(), quantizer.get_buffer("ratio").float()
    zero_point = quantizer.zero_point.float()
    yield scale, zero_point, ratio
    for factor in _REFINED:
        yield scale * factor, _zero_point(low, scale * factor, bits), ratio
    if bool((low < 0).any()):
        for shift in (-2, -1, 1, 2):
            yield scale, (zero_point + shift).clamp(0, 2 ** (bits - 1) - 1), ratio


def _log_tops(high: Tensor) -> Iterator[Parameters]:
    """The largest value as a share of the observed maximum."""
    for top in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        scale = (high * top).clamp(min=1e-8)
        yield scale, torch.zeros_like(scale)


def search_weight_scale(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """One scale per output channel with the least weighted squared error.

    weight: (out, ...). importance: mean squared input of every input channel, broadcast against one
    channel's weights (diagonal of the Hessian of the site's output error); None weighs all alike.
    Returns (out,) scales.
    """
    rows = weight.reshape(weight.shape[0], -1)
    low, high = code_range(bits, symmetric=True)
    weights = torch.ones_like(rows[0]) if importance is None else importance.reshape(-1).expand_as(rows[0])
    largest = rows.abs().amax(1)
    zero = torch.zeros_like(largest)[:, None]
    best_scale = symmetric_scale(largest, bits)
    best_error = torch.full_like(largest, torch.inf)
    for share in (_FINE_SHARES if bits > 6 else _SHARES).tolist():
        scale = symmetric_scale(largest * share, bits)
        error = (fake_quantize(rows, scale[:, None], zero, low, high) - rows).square_()
        total = error @ weights
        better = total < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, total, best_error)
    return best_scale
