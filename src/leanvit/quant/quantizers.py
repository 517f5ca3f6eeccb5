"""Quantizers: pure functions on tensors, and the modules that a quantized graph holds.

Three forms for activations, all static and of 2 to 8 bits, with one set of parameters for a tensor or for each head:

    uniform       v = (q - zero_point) * scale
    two-region    one bit of the code is the region: v = (q - zero_point) * d1, or v = q * 2^m * d1    (MPTQ-ViT)
    logarithmic   v = scale * 2^(-q / resolution), resolution 1 (log2) or 2 (log-sqrt2), for softmax output

and signed codes with one scale per output channel for weights. Rounding is half to even, as in ONNX's
QuantizeLinear, so that what is simulated here is what an integer runtime computes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from leanvit.errors import ConfigError

Form = Literal["uniform", "two-region", "log2", "log-sqrt2"]
MAX_RATIO = 7
"""Largest m of a two-region quantizer."""


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest code: 0 to 2^bits - 1, or for symmetric ones -(2^(bits-1) - 1) to 2^(bits-1) - 1."""
    if symmetric:
        high = 2 ** (bits - 1) - 1
        return -high, high
    return 0, 2**bits - 1


def round_to_step(x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """`x` on the multiples of `scale` from `low` to `high` steps; `scale`, `low`, `high` broadcast against x.

    Without autograd the work is done in one new tensor; with it, gradients pass straight through the rounding
    (and through the clamp inside its range), to x and to `scale` as in LSQ (arXiv 1902.08153).
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        steps = x / scale
        rounded = steps + (steps.round() - steps).detach()
        return torch.minimum(torch.maximum(rounded, _like(low, x)), _like(high, x)) * scale
    steps = (x / scale).round_()
    return torch.clamp(steps, low, high, out=steps).mul_(scale)  # type: ignore[arg-type]


def _like(bound: Tensor | float, x: Tensor) -> Tensor:
    return bound if isinstance(bound, Tensor) else x.new_tensor(bound)


def quantize_codes(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Nearest code of every value, as a float tensor of whole numbers in [low, high].

    x: any shape. scale (> 0) and zero_point broadcast against x.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`x` rounded to the grid of the codes: quantized and dequantized, same shape and dtype."""
    return round_to_step(x, scale, low - zero_point, high - zero_point)


def asymmetric_parameters(minimum: Tensor, maximum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the unsigned codes that cover [minimum, maximum] and represent 0 exactly."""
    _, high = code_range(bits, symmetric=False)
    minimum, maximum = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    scale = ((maximum - minimum) / high).clamp(min=1e-8)
    zero_point = torch.clamp(torch.round(-minimum / scale), 0, high)
    return scale, zero_point


def symmetric_scale(largest: Tensor, bits: int) -> Tensor:
    """Scale of the signed codes that cover [-largest, largest]."""
    _, high = code_range(bits, symmetric=True)
    return (largest / high).clamp(min=1e-8)


def fake_quantize_two_region(x: Tensor, scale: Tensor, ratio: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """`x` on the union of two grids of 2^(bits-1) codes each (MPTQ-ViT, OPT-m).

    Region 1: (q - zero_point) * scale; region 2: q * 2^ratio * scale. Between the end of region 1 and the next
    value of region 2 the nearer one is taken, so that every value goes to the nearest of all codes.
    scale (> 0), ratio and zero_point (whole numbers) broadcast against x.
    """
    levels = 2 ** (bits - 1)
    last = (levels - 1) - zero_point
    wide = torch.exp2(ratio)
    threshold = scale * (last + wide * (torch.floor(last / wide) + 1)) / 2
    small = round_to_step(x, scale, -zero_point, last)
    large = round_to_step(x, scale * wide, 0.0, float(levels - 1))
    return torch.where(x <= threshold, small, large)


def fake_quantize_log(x: Tensor, scale: Tensor, resolution: int, bits: int) -> Tensor:
    """Non-negative `x` as scale * 2^(-q / resolution), q whole in [0, 2^bits - 1], rounded in the exponent.

    There is no code for zero: what is smaller than the smallest value becomes the smallest.
    """
    _, high = code_range(bits, symmetric=False)
    exponent = torch.log2((x / scale).clamp(min=2.0**-126)) * -resolution
    codes = exponent.round_().clamp_(0, high) if not exponent.requires_grad else exponent.round().clamp(0, high)
    return torch.exp2(codes / -resolution) * scale


class ActivationQuantizer(nn.Module):
    """Static, asymmetric, uniform quantizer of an activation.

    scale: () float32, or (heads, 1, 1) where every head has its own. zero_point: same shape, uint8. Codes are
    uint8 whatever `bits`.
    """

    form: Form = "uniform"
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, heads: int | None = None) -> None:
        """Cover [0, 1] until parameters are set."""
        super().__init__()
        self.bits = bits
        self.heads = heads
        self.low, self.high = code_range(bits, symmetric=False)
        shape = () if heads is None else (heads, 1, 1)
        self.register_buffer("scale", torch.full(shape, 1.0 / self.high))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.uint8))

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Cover [minimum, maximum]."""
        self.set_parameters(*asymmetric_parameters(minimum, maximum, self.bits))

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a scale and a zero point, each of one value or one for every head."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of the codes."""
        return fake_quantize(x, self.scale, self.zero_point.to(self.scale.dtype), self.low, self.high)

    def extra_repr(self) -> str:
        """Bits, form and heads."""
        return f"bits={self.bits}, form={self.form}" + (f", heads={self.heads}" if self.heads else "")


class TwoRegionQuantizer(ActivationQuantizer):
    """Two grids whose steps are a power of two apart, for what a GELU or a softmax gives.

    scale: d1, the small step. zero_point: codes of region 1 below zero. ratio: m, uint8; all of one shape.
    """

    form: Form = "two-region"
    ratio: Tensor

    def __init__(self, bits: int, heads: int | None = None) -> None:
        """Cover [0, 1] with m = 0 until parameters are set."""
        super().__init__(bits, heads)
        self.register_buffer("ratio", torch.zeros_like(self.zero_point))

    def set_parameters(self, scale: Tensor, zero_point: Tensor, ratio: Tensor | None = None) -> None:
        """Take the small step, its zero point and m."""
        super().set_parameters(scale, zero_point)
        if ratio is not None:
            self.ratio.copy_(ratio.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the union of both grids."""
        dtype = self.scale.dtype
        return fake_quantize_two_region(x, self.scale, self.ratio.to(dtype), self.zero_point.to(dtype), self.bits)


class LogQuantizer(ActivationQuantizer):
    """Powers of two (log2) or of its square root (log-sqrt2), for softmax output; zero_point is unused."""

    def __init__(self, bits: int, heads: int | None = None, *, resolution: int = 1) -> None:
        """Cover (0, 1] until parameters are set."""
        super().__init__(bits, heads)
        self.resolution = resolution
        self.form = "log2" if resolution == 1 else "log-sqrt2"
        self.scale.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the powers."""
        return fake_quantize_log(x, self.scale, self.resolution, self.bits)


def make_quantizer(form: Form, bits: int, heads: int | None = None) -> ActivationQuantizer:
    """An activation quantizer of a form, its parameters not set yet. Raises ConfigError for an unknown form."""
    makers: dict[str, Any] = {
        "uniform": ActivationQuantizer,
        "two-region": TwoRegionQuantizer,
        "log2": LogQuantizer,
        "log-sqrt2": lambda bits, heads: LogQuantizer(bits, heads, resolution=2),
    }
    if form not in makers:
        raise ConfigError(f"quantizer form is {form!r}, expected one of {sorted(makers)}")
    quantizer: ActivationQuantizer = makers[form](bits, heads)
    return quantizer


class WeightQuantizer(nn.Module):
    """A weight held as signed codes with one scale for each output channel (dimension 0).

    codes: shape of the weight, int8. scale: (out_channels,) float32.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int) -> None:
        """Hold zeros until `set_weight` is called."""
        super().__init__()
        self.bits = bits
        self.low, self.high = code_range(bits, symmetric=True)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(shape[0]))

    def set_weight(self, weight: Tensor, scale: Tensor) -> None:
        """Round `weight` to the nearest codes of `scale`."""
        codes = quantize_codes(weight, self._spread(scale), weight.new_zeros(()), self.low, self.high)
        self.set_codes(codes, scale)

    def set_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Take codes (whole numbers, shape of the weight) and scales as they are."""
        self.codes.copy_(codes.reshape(self.codes.shape).to(torch.int8))
        self.scale.copy_(scale)

    def _spread(self, scale: Tensor) -> Tensor:
        return scale.view(-1, *[1] * (self.codes.dim() - 1))

    def forward(self) -> Tensor:
        """The dequantized weight."""
        return self.codes.float() * self._spread(self.scale)

    def extra_repr(self) -> str:
        """Bits and shape."""
        return f"bits={self.bits}, shape={tuple(self.codes.shape)}"
