"""Uniform quantizers: pure functions on tensors, and the modules that a quantized graph holds.

A code q stands for the value (q - zero_point) * scale. Rounding is half to even, as in ONNX's
QuantizeLinear, so that what is simulated here is what an integer runtime computes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def code_range(bits: int, *, symmetric: bool) -> tuple[int, int]:
    """Lowest and highest code: 0 to 2^bits - 1, or for symmetric ones -(2^(bits-1) - 1) to 2^(bits-1) - 1."""
    if symmetric:
        high = 2 ** (bits - 1) - 1
        return -high, high
    return 0, 2**bits - 1


def quantize_codes(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """Nearest code of every value, as a float tensor of whole numbers in [low, high].

    x: any shape. scale (> 0) and zero_point broadcast against x.
    """
    return torch.clamp(torch.round(x / scale) + zero_point, low, high)


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """`x` rounded to the grid of the codes: quantized and dequantized, same shape and dtype."""
    return (quantize_codes(x, scale, zero_point, low, high) - zero_point) * scale


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


class ActivationQuantizer(nn.Module):
    """Per-tensor, static, asymmetric quantizer of an activation.

    scale: () float32. zero_point: () uint8. Codes are uint8 whatever `bits`.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int) -> None:
        """Cover [0, 1] until `set_range` is called."""
        super().__init__()
        self.bits = bits
        self.low, self.high = code_range(bits, symmetric=False)
        self.register_buffer("scale", torch.tensor(1.0 / self.high))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.uint8))

    def set_range(self, minimum: Tensor, maximum: Tensor) -> None:
        """Cover [minimum, maximum]."""
        scale, zero_point = asymmetric_parameters(minimum, maximum, self.bits)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point.to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of the codes."""
        return fake_quantize(x, self.scale, self.zero_point.float(), self.low, self.high)

    def extra_repr(self) -> str:
        """Bits and covered range."""
        first = -float(self.zero_point) * float(self.scale)
        return f"bits={self.bits}, range=({first:.4g}, {first + self.high * float(self.scale):.4g})"


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
        codes = quantize_codes(weight, self._spread(scale), torch.zeros(()), self.low, self.high)
        self.codes.copy_(codes.to(torch.int8))
        self.scale.copy_(scale)

    def _spread(self, scale: Tensor) -> Tensor:
        return scale.view(-1, *[1] * (self.codes.dim() - 1))

    def forward(self) -> Tensor:
        """The dequantized weight."""
        return self.codes.float() * self._spread(self.scale)

    def extra_repr(self) -> str:
        """Bits and shape."""
        return f"bits={self.bits}, shape={tuple(self.codes.shape)}"
