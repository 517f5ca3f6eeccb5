"""OPT-m: quantizer parameters from data, by the least error of what the site computes (MPTQ-ViT, arXiv 2401.14895).

PTQ4ViT and TSPTQ-ViT set the ratio 2^m of a two-region quantizer by hand. OPT-m chooses m and the small step d1 for
every site. `minimise` is where that is done, and has the objective; the same one sets uniform ranges and chooses
between forms (ours). Candidates are the quantizer's (see `quantizers`). Everything is evaluated on a sample of a site's
inputs (see `samples`), never by running the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from leanvit.quant.quantizers import (
    ActivationQuantizer,
    Form,
    Parameters,
    UniformQuantizer,
    WeightQuantizer,
    asymmetric_parameters,
    fake_quantize,
    integer_range,
    make_quantizer,
    symmetric_scale,
)
from leanvit.quant.samples import SiteSample, some_values

Error = Callable[[Tensor], Tensor]
"""Squared error of a site's output where one operand is replaced: () or (heads, 1, 1)."""


def minimise(quantizer: ActivationQuantizer, x: Tensor, error: Error, low: Tensor, high: Tensor) -> Tensor:
    """Set the parameters of a quantizer that minimise the squared error of the site's output (OPT-m).

    With Q(x; p) the operand x quantized with parameters p, over the rows x of the sample:

        p* = argmin_p  sum_x || (Q(x; p) - x) W^T ||^2            a linear with weight W
        p* = argmin_p  sum_x || (Q(x; p) - x) B ||^2              a product with operand B
        p* = argmin_p  sum_x || Q(x; p) - x ||^2                  any other site

    For a two-region quantizer p = (d1, zero point, m), with m in 0..7 and d1 on a logarithmic scale, then once more
    around the best d1; for a uniform one p = (scale, zero point).

    x: the operand. error: the sum above for Q(x; p), one number or one for each head, which then has its own p*.
    low, high: bounds of all calibration data, of the shape of the parameters. Returns the least error.
    """
    least = _best(quantizer, x, error, quantizer.candidates(low, high), None)
    return _best(quantizer, x, error, quantizer.refined(low, high), least)


def _best(
    quantizer: ActivationQuantizer, x: Tensor, error: Error, candidates: Iterable[Parameters], known: Tensor | None
) -> Tensor:
    """Set the quantizer to the best candidate, for each head its own; returns the least errors.

    known: the error with the parameters that are set, which stay where there is no candidate.
    """
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
        if known is None:
            raise ValueError(f"{type(quantizer).__name__}.candidates yields nothing, expected at least one")
        return known
    quantizer.set_parameters(*chosen)
    return least


def fit_activation(
    sample: SiteSample, operand: int, bits: int, form: Form = "uniform", *, per_head: bool = False, search: bool = True
) -> tuple[ActivationQuantizer, Tensor]:
    """A quantizer for one operand of a site with the least error of the site's output.

    form: a key of quantizers.FORMS. per_head: parameters of its own for each head, where the operand has heads.
    search: False takes the observed minimum and maximum, and a uniform quantizer.
    Returns the quantizer and its squared error, () or (heads, 1, 1).
    """
    heads = sample.heads if per_head else None
    x = sample.inputs[operand]
    error = sample.error(operand, grouped=heads is not None)
    low, high = sample.bounds(operand, grouped=heads is not None)
    if not search:
        plain = UniformQuantizer(bits, heads).to(x.device)
        return plain, _best(plain, x, error, [asymmetric_parameters(low, high, bits)], None)
    quantizer = make_quantizer(form, bits, heads).to(x.device)
    return quantizer, minimise(quantizer, x, error, low, high)


def choose_form(
    sample: SiteSample, operand: int, bits: int, forms: Iterable[Form], *, per_head: bool = False
) -> tuple[ActivationQuantizer, Tensor]:
    """The form among `forms` with the least error, and its error; ties go to the earlier."""
    fitted = [fit_activation(sample, operand, bits, form, per_head=per_head) for form in forms]
    return min(fitted, key=lambda pair: float(pair[1].sum()))


def fit_tensor(x: Tensor, bits: int) -> UniformQuantizer:
    """A uniform quantizer with the least squared error of x itself, a tensor of any shape."""
    x = some_values(x)
    quantizer = UniformQuantizer(bits).to(x.device)
    candidates = quantizer.candidates(x.amin(), x.amax())
    _best(quantizer, x, lambda rounded: (rounded - x).square().sum(), candidates, None)
    return quantizer


def search_weight_scale(weight: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """One scale per output channel with the least weighted squared error.

    weight: (out, ...). importance: mean squared input of every input channel, broadcast against one
    channel's weights (diagonal of the Hessian of the site's output error); None weighs all alike.
    Returns (out,) scales.
    """
    rows = weight.reshape(weight.shape[0], -1)
    low, high = integer_range(bits, symmetric=True)
    weights = torch.ones_like(rows[0]) if importance is None else importance.reshape(-1).expand_as(rows[0])
    largest = rows.abs().amax(1)
    zero = torch.zeros_like(largest)[:, None]
    best_scale = symmetric_scale(largest, bits)
    best_error = torch.full_like(largest, torch.inf)
    for scale in WeightQuantizer.candidates(rows, bits):
        error = (fake_quantize(rows, scale[:, None], zero, low, high) - rows).square_()
        total = error @ weights
        better = total < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, total, best_error)
    return best_scale
