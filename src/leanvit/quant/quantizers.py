"""Quantizers: pure functions on tensors, and the modules that a quantized graph holds.

Three kinds for activations, all static and of 2 to 8 bits, with one set of parameters for a tensor or for each head:

    uniform       v = (q - zero_point) * scale
    two-region    one bit of q is the region: v = (q - zero_point) * d1, or v = q * 2^m * d1    (MPTQ-ViT)
    logarithmic   v = scale * 2^(-q / resolution), resolution 1 (log2) or 2 (log-sqrt2), for softmax output

and signed integers with one scale per output channel for weights. Rounding is half to even, as in ONNX's
QuantizeLinear, so that what is simulated here is what an integer runtime computes.

All that the engine knows of an activation quantizer is in its class: its `form` (the name that files carry), the
`sources` that it is meant for, the range that it covers, the parameters that a search should try, and its arithmetic.
A new one is a subclass of ActivationQuantizer with @register; export.onnx.quantizers registers its ONNX form by class.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from leanvit.errors import ConfigError

Form = str
"""Name of a class of activation quantizer, in files and reports: a key of FORMS."""

Parameters = tuple[Tensor, ...]
"""What `set_parameters` takes: scale and zero point, and what a class adds."""

MAX_RATIO = 7
"""Largest m of a two-region quantizer. Region 2 then begins 128 small steps out, what 8 bits with a sign tell apart."""

SHARES = torch.cat([torch.linspace(0.1, 0.5, 7)[:-1], torch.linspace(0.5, 1.0, 13)])
"""Shares of the observed range that a search of up to 6 bits tries: a tenth is for long tails at 2 bits."""

FINE_SHARES = torch.linspace(0.65, 1.0, 8)
"""The same for 7 and 8 bits, where clipping more than a third never pays."""

TOPS = torch.logspace(-1.2, 0.0, 10, base=10.0)
"""Where region 2 may end, as a share of the observed maximum: evenly in the logarithm, from 6% on."""

LOG_TOPS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
"""The largest value of a logarithmic quantizer as a share of the observed maximum; at half of it, the next power."""

REFINED = (0.85, 0.92, 0.96, 1.04, 1.08, 1.15)
"""Factors around the best of the first search: about the distance between two of its candidates."""


def integer_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest quantized integer: 0 to 2^bits - 1; symmetric: -2^(bits-1) to 2^(bits-1) - 1, 8 from -127.

    Below 8 bits every integer counts: -4 is one of eight at 3 bits. At 8 bits it is one of 256, and -127 to 127 is
    what runtimes expect of int8 weights.
    """
    if symmetric:
        high = 2 ** (bits - 1) - 1
        return (-high if bits >= 8 else -high - 1), high
    return 0, 2**bits - 1


def round_to_step(x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """`x` on the multiples of `scale` from `low` to `high` steps; `scale`, `low`, `high` broadcast against x.

    Without autograd the work is done in one new tensor; with it, gradients pass straight through the rounding
    (and through the clamp inside its range), to x and to `scale` as in LSQ (arXiv 1902.08153).
    """
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return StraightThrough.apply(x, scale, low, high)
    step = _number(scale)
    return _clamped((x / step).round_(), low, high).mul_(step)


def _clamped(steps: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """`steps` within bounds, in place."""
    low, high = _number(low), _number(high)
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return steps.clamp_(min=low).clamp_(max=high)
    return steps.clamp_(low, high)


class StraightThrough(torch.autograd.Function):
    """round_to_step with the gradients of LSQ. With v = x / s and q = clamp(round(v), low, high):

    d(q s) / dx = 1 inside the bounds, 0 outside        d(q s) / ds = q - v inside, q outside
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
        """See round_to_step."""
        ratio = x / _number(scale)
        steps = ratio.round()
        rounded = _clamped(steps.clone(), low, high)
        inside = steps == rounded
        ctx.shapes = x.shape, scale.shape
        ctx.save_for_backward(inside, rounded - ratio.mul_(inside) if scale.requires_grad else None)
        return rounded.mul_(_number(scale))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """Of x and of the scale."""
        inside, by_scale = ctx.saved_tensors
        of_x, of_scale = ctx.shapes
        to_x = (gradient * inside).sum_to_size(of_x) if ctx.needs_input_grad[0] else None
        to_scale = (gradient * by_scale).sum_to_size(of_scale) if ctx.needs_input_grad[1] else None
        return to_x, to_scale, None, None


def _number(value: Tensor | float) -> Tensor | float:
    """A tensor of one value on the CPU as that value, with which operations are twice as fast as with the tensor."""
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu" else value


def quantized_integers(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Nearest quantized integer of every value, as a float tensor of whole numbers in [low, high].

    x: any shape. scale (> 0) and zero_point broadcast against x.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`x` quantized to the integers in [low, high] and dequantized, same shape and dtype."""
    return round_to_step(x, scale, low - zero_point, high - zero_point)


def asymmetric_parameters(minimum: Tensor, maximum: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of the unsigned integers that cover [minimum, maximum] and represent 0 exactly."""
    _, high = integer_range(bits, symmetric=False)
    minimum, maximum = minimum.clamp(max=0.0), maximum.clamp(min=0.0)
    scale = ((maximum - minimum) / high).clamp(min=1e-8)
    zero_point = torch.clamp(torch.round(-minimum / scale), 0, high)
    return scale, zero_point


def symmetric_scale(largest: Tensor, bits: int) -> Tensor:
    """Scale of the signed integers that cover [-largest, largest]."""
    _, high = integer_range(bits, symmetric=True)
    return (largest / high).clamp(min=1e-8)


def fake_quantize_two_region(x: Tensor, scale: Tensor, ratio: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """`x` rounded to the values of two regions of 2^(bits-1) integers each (MPTQ-ViT, OPT-m).

    Region 1: (q - zero_point) * scale; region 2: q * 2^ratio * scale. Between the end of region 1 and the next
    value of region 2 the nearer one is taken, so that every value goes to the nearest of all.
    scale (> 0), ratio and zero_point (whole numbers) broadcast against x.
    """
    last = (2 ** (bits - 1) - 1) - zero_point
    wide = torch.exp2(ratio)
    threshold = scale * (last + wide * (torch.floor(last / wide) + 1)) / 2
    # 0 or 1, and arithmetic with it, for torch.where branches at every element on a CPU.
    is_wide = torch.gt(x.detach(), _number(threshold.detach()), out=torch.empty_like(x))
    step = (is_wide * _number(wide - 1)).add_(1) * scale
    below = _number(zero_point)
    high = last if isinstance(below, float) and below == 0 else is_wide.mul_(below).add_(last)
    return round_to_step(x, step, -zero_point, high)


def fake_quantize_log(x: Tensor, scale: Tensor, resolution: int, bits: int) -> Tensor:
    """Non-negative `x` as scale * 2^(-q / resolution), q whole in [0, 2^bits - 1], rounded in the exponent.

    No integer stands for zero: what is smaller than the smallest value becomes the smallest.
    """
    _, high = integer_range(bits, symmetric=False)
    exponent = torch.log2((x / scale).clamp(min=2.0**-126)) * -resolution
    if exponent.requires_grad:
        integers = (exponent + (exponent.round() - exponent).detach()).clamp(0, high)
    else:
        integers = exponent.round_().clamp_(0, high)
    return torch.exp2(integers / -resolution) * scale


class ActivationQuantizer(nn.Module):
    """What all quantizers of an activation have; static and asymmetric.

    scale: () float32, or (heads, 1, 1) where every head has its own. zero_point: same shape, uint8. Quantized integers
    are uint8 whatever `bits`. form: name of the class in files. sources: what a tensor must come from for the class to
    be tried on it ("gelu" counts SiLU, "softmax"); None for any tensor.
    has_kernel: whether a product that reads it can run on integers; the pass `forms` tries no other.
    """

    form: ClassVar[Form]
    sources: ClassVar[frozenset[str] | None] = None
    has_kernel: ClassVar[bool] = True
    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, heads: int | None = None) -> None:
        """Cover [0, 1] until parameters are set."""
        super().__init__()
        self.bits = bits
        self.heads = heads
        self.low, self.high = integer_range(bits, symmetric=False)
        shape = () if heads is None else (heads, 1, 1)
        self.register_buffer("scale", torch.full(shape, 1.0 / self.high))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.uint8))

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take a scale and a zero point, each of one value or one for every head."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.to(torch.uint8))

    def value_range(self) -> tuple[Tensor, Tensor]:
        """The smallest and the largest value that the quantizer returns, each () or (heads, 1, 1)."""
        raise NotImplementedError(f"{type(self).__name__} has no value_range; write one.")

    def candidates(self, low: Tensor, high: Tensor) -> Iterator[Parameters]:
        """Parameters to try first, for values observed between `low` and `high`, each () or (heads, 1, 1)."""
        raise NotImplementedError(f"{type(self).__name__} has no candidates; write them.")

    def refined(self, low: Tensor, high: Tensor) -> Iterator[Parameters]:
        """Parameters to try then, around those that are set, these among them; none by default."""
        return iter(())

    def forward(self, x: Tensor) -> Tensor:
        """`x` quantized and dequantized."""
        raise NotImplementedError(f"{type(self).__name__} has no forward; write one.")

    def extra_repr(self) -> str:
        """Bits, form and heads."""
        return f"bits={self.bits}, form={self.form}" + (f", heads={self.heads}" if self.heads else "")


FORMS: dict[Form, type[ActivationQuantizer]] = {}
"""All classes of activation quantizers by name, in the order in which a choice tries them: of equals the first wins."""

Quantizer = TypeVar("Quantizer", bound=ActivationQuantizer)


def register(cls: type[Quantizer]) -> type[Quantizer]:
    """Class decorator: let files name this class of quantizer, and the pass `forms` try it on its sources.

    Raises ConfigError where another class has the name.
    """
    known = FORMS.setdefault(cls.form, cls)
    if known is not cls:
        raise ConfigError(
            f"quantizer form '{cls.form}' is {known.__qualname__} already, expected a name of its own. "
            f"Give {cls.__qualname__} another `form`."
        )
    return cls


def make_quantizer(form: Form, bits: int, heads: int | None = None) -> ActivationQuantizer:
    """An activation quantizer of a form, its parameters not set yet. Raises ConfigError for an unknown form."""
    if form not in FORMS:
        raise ConfigError(f"quantizer form is {form!r}, expected one of {sorted(FORMS)}")
    return FORMS[form](bits, heads)


@register
class TwoRegionQuantizer(ActivationQuantizer):
    """Two regions whose steps are a power of two apart, for what a GELU or a softmax returns (MPTQ-ViT).

    scale: d1, the small step. zero_point: integers of region 1 below zero. ratio: m, uint8; all of one shape.
    """

    form = "two-region"
    sources = frozenset({"gelu", "softmax"})
    ratio: Tensor

    def __init__(self, bits: int, heads: int | None = None) -> None:
        """Cover [0, 1] with m = 0 until parameters are set."""
        super().__init__(bits, heads)
        self.register_buffer("ratio", torch.zeros_like(self.zero_point))
        self.last = 2 ** (bits - 1) - 1

    def set_parameters(self, scale: Tensor, zero_point: Tensor, ratio: Tensor | None = None) -> None:
        """Take the small step, its zero point and m."""
        super().set_parameters(scale, zero_point)
        if ratio is not None:
            self.ratio.copy_(ratio.to(torch.uint8))

    def value_range(self) -> tuple[Tensor, Tensor]:
        """From the integers of region 1 below zero to the end of region 2, or of region 1 where m is 0."""
        zero_point = self.zero_point.to(self.scale.dtype)
        last = torch.maximum(self.last - zero_point, self.last * torch.exp2(self.ratio.to(self.scale.dtype)))
        return -zero_point * self.scale, last * self.scale

    def candidates(self, low: Tensor, high: Tensor) -> Iterator[Parameters]:
        """Every m, with d1 such that region 2 ends at each share of the observed maximum."""
        for ratio in range(MAX_RATIO + 1):
            for top in TOPS.tolist():
                step = (high * top / (self.last * 2.0**ratio)).clamp(min=1e-8)
                yield step, self._zero_point_for(low, step), torch.full_like(step, ratio)

    def refined(self, low: Tensor, high: Tensor) -> Iterator[Parameters]:
        """The best d1 moved a little, and region 1 shared otherwise between negative and positive values."""
        scale, ratio, zero_point = self.scale.clone(), self.ratio.float(), self.zero_point.float()
        yield scale, zero_point, ratio
        for factor in REFINED:
            yield scale * factor, self._zero_point_for(low, scale * factor), ratio
        if bool((low < 0).any()):
            for shift in (-2, -1, 1, 2):
                yield scale, (zero_point + shift).clamp(0, self.last), ratio

    def _zero_point_for(self, low: Tensor, step: Tensor) -> Tensor:
        """Integers of region 1 below zero: enough for the negative tail, at most all."""
        return torch.round(-low.clamp(max=0.0) / step).clamp(0, self.last)

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the nearest value of both regions."""
        dtype = self.scale.dtype
        return fake_quantize_two_region(x, self.scale, self.ratio.to(dtype), self.zero_point.to(dtype), self.bits)


@register
class UniformQuantizer(ActivationQuantizer):
    """Even steps over a range that holds zero."""

    form = "uniform"

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Cover [minimum, maximum]."""
        self.set_parameters(*asymmetric_parameters(minimum, maximum, self.bits))

    def value_range(self) -> tuple[Tensor, Tensor]:
        """What the lowest and the highest integer stand for."""
        zero_point = self.zero_point.float()
        return -zero_point * self.scale, (self.high - zero_point) * self.scale

    def candidates(self, low: Tensor, high: Tensor) -> Iterator[Parameters]:
        """The observed range shrunk by every share; the whole range is among them."""
        for share in shares_of(self.bits):
            yield asymmetric_parameters(low * share, high * share, self.bits)

    def refined(self, low: Tensor, high: Tensor) -> Iterator[Parameters]:
        """Each end of the best range moved alone."""
        scale, zero_point = self.scale.clone(), self.zero_point.float()
        first, last = self.value_range()
        yield scale, zero_point
        for down, up in [(a, 1.0) for a in REFINED] + [(1.0, a) for a in REFINED]:
            yield asymmetric_parameters(first * down, last * up, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the nearest step."""
        return fake_quantize(x, self.scale, self.zero_point.to(self.scale.dtype), self.low, self.high)


class LogQuantizer(ActivationQuantizer):
    """Powers of 2^(-1 / resolution) times the scale, for softmax output; zero_point is unused.

    No runtime multiplies powers as integers, so the product that reads one stays in float. Tried by `forms`, they took
    6% of the test divergence of mode "best" away (two micro models, W4A4, one seed): less than what they cost.
    """

    sources = frozenset({"softmax"})
    has_kernel = False
    resolution: ClassVar[int]

    def __init__(self, bits: int, heads: int | None = None) -> None:
        """Cover (0, 1] until parameters are set."""
        super().__init__(bits, heads)
        self.scale.fill_(1.0)

    def value_range(self) -> tuple[Tensor, Tensor]:
        """The smallest power, and the scale."""
        return self.scale * 2.0 ** (-self.high / self.resolution), self.scale

    def candidates(self, low: Tensor, high: Tensor) -> Iterator[Parameters]:
        """The largest value as a share of the observed maximum."""
        for top in LOG_TOPS:
            scale = (high * top).clamp(min=1e-8)
            yield scale, torch.zeros_like(scale)

    def forward(self, x: Tensor) -> Tensor:
        """`x` rounded to the nearest power."""
        return fake_quantize_log(x, self.scale, self.resolution, self.bits)


@register
class Log2Quantizer(LogQuantizer):
    """Powers of two."""

    form = "log2"
    resolution = 1


@register
class LogSqrt2Quantizer(LogQuantizer):
    """Powers of the square root of two (RepQ-ViT, arXiv 2212.08254)."""

    form = "log-sqrt2"
    resolution = 2


def shares_of(bits: int) -> list[float]:
    """Shares of an observed range to try at these bits."""
    return (FINE_SHARES if bits > 6 else SHARES).tolist()


class WeightQuantizer(nn.Module):
    """A weight held as signed integers with one scale for each output channel (dimension 0).

    codes: the quantized integers, shape of the weight, int8; files have them under this name.
    scale: (out_channels,) float32.
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, ...], bits: int) -> None:
        """Hold zeros until `set_weight` is called."""
        super().__init__()
        self.bits = bits
        self.low, self.high = integer_range(bits, symmetric=True)
        self.register_buffer("codes", torch.zeros(shape, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(shape[0]))

    def set_weight(self, weight: Tensor, scale: Tensor) -> None:
        """Round `weight` to the nearest multiples of `scale`."""
        integers = quantized_integers(weight, self._spread(scale), weight.new_zeros(()), self.low, self.high)
        self.set_integers(integers, scale)

    def set_integers(self, integers: Tensor, scale: Tensor) -> None:
        """Take quantized integers (whole numbers, shape of the weight) and scales as they are."""
        self.codes.copy_(integers.reshape(self.codes.shape).to(torch.int8))
        self.scale.copy_(scale)

    @staticmethod
    def candidates(weight: Tensor, bits: int) -> Iterator[Tensor]:
        """Scales (out_channels,) to try: every share of the largest value of each channel."""
        largest = weight.reshape(weight.shape[0], -1).abs().amax(1)
        for share in shares_of(bits):
            yield symmetric_scale(largest * share, bits)

    def _spread(self, scale: Tensor) -> Tensor:
        return scale.view(-1, *[1] * (self.codes.dim() - 1))

    def forward(self) -> Tensor:
        """The dequantized weight."""
        return self.codes.float() * self._spread(self.scale)

    def extra_repr(self) -> str:
        """Bits and shape."""
        return f"bits={self.bits}, shape={tuple(self.codes.shape)}"
