"""Quantizers as ONNX operations: what a quantized graph holds is swapped for these before export.

Every form that an integer kernel can run becomes one QuantizeLinear and DequantizeLinear pair of uint8: uniform
integers of k bits are clipped to their 2^k values; a two-region value is a whole number of small steps, of at most
(2^(k-1) - 1) 2^m of them, and fits where that plus the integers below zero is at most 255. Where it does not, the
tensor is the sum of its two regions, each with a pair of its own. Scales by head are multiplied in after the product.
Logarithmic forms have no integer kernel and stay float arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.quant.quantizers import ActivationQuantizer, TwoRegionQuantizer, UniformQuantizer

OPSET = 21
"""Of what torch.onnx writes."""

UINT8_MAX = 255
CENTRE = 128
"""Zero point of uint8 integers that lie evenly around zero; as int8 they have none."""
BLOCK_SIZE = 32
"""Inputs that share a scale in MatMulNBits; ours repeat the scale of their channel."""


def onnx_operation(name: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, shape: Any, **attributes: Any) -> Tensor:
    """One ONNX operation by its name, in the graph that torch.onnx.export writes; in torch it returns zeros."""
    version = OPSET if "::" not in name else None
    return torch.onnx.ops.symbolic(name, inputs, attributes, dtype=dtype, shape=shape, version=version)


def _dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return onnx_operation("DequantizeLinear", (codes, scale), torch.float32, codes.shape, axis=axis)


class QDQPair(nn.Module):
    """QuantizeLinear with one scale, DequantizeLinear with another, on uint8 or int8 with one zero point.

    low, high: range of x that the quantized integers may take, where it is less than that of 8 bits.
    """

    scale: Tensor
    scale_back: Tensor

    def __init__(
        self,
        scale: Tensor,
        zero_point: int,
        scale_back: Tensor | None = None,
        limits: tuple[float, float] | None = None,
        *,
        four_bit_type: bool = False,
        signed: bool = False,
    ) -> None:
        """scale_back: of DequantizeLinear, None for the same. four_bit_type: integers are UINT4, see `storage`.

        signed: integers are int8, and the zero point one of these.
        """
        super().__init__()
        self.limits = limits
        self.codes = torch.int8 if signed else torch.uint8
        self.name = "zero_point4" if four_bit_type else "zero_point"
        self.register_buffer("scale", scale.clone().float().reshape(()))
        self.register_buffer("scale_back", (scale if scale_back is None else scale_back).clone().float().reshape(()))
        # Of another dtype until it is packed: torch.onnx merges equal constants, whatever their names.
        kind = torch.int8 if four_bit_type else self.codes
        self.register_buffer(self.name, torch.tensor(zero_point, dtype=kind))

    def forward(self, x: Tensor) -> Tensor:
        """x rounded to the values of the quantized integers."""
        if self.limits is not None:
            x = x.clamp(*self.limits)
        zero_point = self.get_buffer(self.name)
        codes = onnx_operation("QuantizeLinear", (x, self.scale, zero_point), self.codes, x.shape)
        inputs = (codes, self.scale_back, zero_point)
        return onnx_operation("DequantizeLinear", inputs, torch.float32, x.shape)


class WholeNumbers(nn.Module):
    """x in whole numbers of its small step, by the arithmetic of the simulation, then through a Q/DQ pair.

    region: 0 for both regions as one number, 1 or 2 for that region alone, zero where x is in the other.
    """

    step: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, quantizer: ActivationQuantizer, region: int = 0) -> None:
        """Take the parameters of a uniform or a two-region quantizer, one set or one for every head."""
        super().__init__()
        self.two_region = isinstance(quantizer, TwoRegionQuantizer)
        self.region = region
        zero_point = quantizer.zero_point.float()
        levels = 2 ** (quantizer.bits - 1) if self.two_region else 2**quantizer.bits
        self.levels = float(levels - 1)
        self.register_buffer("step", quantizer.scale.clone())
        self.register_buffer("low", -zero_point)
        self.register_buffer("high", self.levels - zero_point)
        if self.two_region:
            wide = torch.exp2(quantizer.get_buffer("ratio").float())
            last = self.levels - zero_point
            self.register_buffer("wide", wide)
            self.register_buffer("wide_step", quantizer.scale * wide)
            self.register_buffer("threshold", quantizer.scale * (last + wide * (torch.floor(last / wide) + 1)) / 2)
        by_head = quantizer.scale.dim() > 0
        smallest, largest = whole_range(quantizer, region)
        unit = torch.ones(())
        step = self.get_buffer("wide_step") if region == 2 else quantizer.scale
        self.factor = step.clone() if by_head else None
        self.pair = QDQPair(unit, -smallest, unit if by_head else step)
        self.fits = largest - smallest <= UINT8_MAX

    def forward(self, x: Tensor) -> Tensor:
        """x quantized; in steps where a factor by head is to follow."""
        numbers = torch.minimum(torch.maximum(torch.round(x / self.step), self.low), self.high)
        if self.two_region:
            numbers = self._choose(x, numbers)
        return self.pair(numbers)

    def _choose(self, x: Tensor, small: Tensor) -> Tensor:
        large = torch.round(x / self.get_buffer("wide_step")).clamp(0.0, self.levels)
        in_first = x <= self.get_buffer("threshold")
        if self.region == 0:
            return torch.where(in_first, small, large * self.get_buffer("wide"))
        zero = torch.zeros_like(small)
        return torch.where(in_first, small, zero) if self.region == 1 else torch.where(in_first, zero, large)


def whole_range(quantizer: ActivationQuantizer, region: int = 0) -> tuple[int, int]:
    """Smallest and largest whole number of small steps (region 2: of large ones) over all heads."""
    below = int(quantizer.zero_point.max())
    if not isinstance(quantizer, TwoRegionQuantizer):
        return -below, 2**quantizer.bits - 1 - int(quantizer.zero_point.min())
    last = 2 ** (quantizer.bits - 1) - 1
    first_region = last - int(quantizer.zero_point.min())
    second_region = last * 2 ** int(quantizer.ratio.max())
    return {0: (-below, max(first_region, second_region)), 1: (-below, first_region), 2: (0, last)}[region]


class FloatQuantizer(nn.Module):
    """A quantizer that no integer kernel runs: x quantized by float arithmetic."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        """Keep the quantizer; its forward is exported as it is."""
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        """x quantized."""
        quantized: Tensor = self.quantizer(x)
        return quantized


@dataclass(frozen=True)
class Branch:
    """One summand of a quantized tensor: module(x), times `factor` after the product that reads it."""

    module: nn.Module
    factor: Tensor | None = None


@singledispatch
def branches_of(quantizer: ActivationQuantizer, *, four_bit_types: bool = False, signed: bool = False) -> list[Branch]:
    """The ONNX form of a quantizer: the summands of what it returns, as uint8 integers where a kernel can run them.

    Each class registers its own with @branches_of.register(CLASS); one that does not (the logarithmic ones) is float
    arithmetic, its forward as it is. four_bit_types: uniform integers of 4 bits and below as UINT4, which compilers for
    accelerators look for. signed: uniform integers of 8 bits around CENTRE as int8 around zero, which mean the same.
    """
    return [Branch(FloatQuantizer(quantizer))]


@branches_of.register(UniformQuantizer)
def _uniform(quantizer: UniformQuantizer, *, four_bit_types: bool = False, signed: bool = False) -> list[Branch]:
    if quantizer.scale.dim() > 0:
        return _whole(quantizer) or [Branch(FloatQuantizer(quantizer))]
    if signed and quantizer.bits == 8 and int(quantizer.zero_point) == CENTRE:
        return [Branch(QDQPair(quantizer.scale, 0, signed=True))]
    return [Branch(_uniform_pair(quantizer, four_bit_types))]


@branches_of.register(TwoRegionQuantizer)
def _two_region(quantizer: TwoRegionQuantizer, *, four_bit_types: bool = False, signed: bool = False) -> list[Branch]:
    return _whole(quantizer) or _whole(quantizer, 1, 2) or [Branch(FloatQuantizer(quantizer))]


def _whole(quantizer: ActivationQuantizer, *regions: int) -> list[Branch]:
    """Whole numbers of steps, together or one summand a region; empty where one of them does not fit into 8 bits."""
    parts = [WholeNumbers(quantizer, region) for region in regions or (0,)]
    return [Branch(part, part.factor) for part in parts] if all(part.fits for part in parts) else []


def _uniform_pair(quantizer: ActivationQuantizer, four_bit_types: bool) -> QDQPair:
    zero_point, scale = int(quantizer.zero_point), quantizer.scale
    four_bit_type = four_bit_types and quantizer.bits <= 4
    if quantizer.bits == 8 or (four_bit_type and quantizer.bits == 4):
        return QDQPair(scale, zero_point, four_bit_type=four_bit_type)
    low, high = (-zero_point * scale, (quantizer.high - zero_point) * scale)
    return QDQPair(scale, zero_point, limits=(float(low), float(high)), four_bit_type=four_bit_type)


class OnnxLinear(nn.Module):
    """A linear whose weight is int8: x (..., in) times (in, out), scaled per output channel, plus bias.

    Weights of 4 bits and below are in the buffer `codes4`, which `storage` stores as INT4.
    """

    scale: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, *, four_bit: bool) -> None:
        """codes: (out, ...) int8; a convolution's kernel counts as `in`. scale: (out,)."""
        super().__init__()
        self.name = "codes4" if four_bit else "codes"
        self.register_buffer(self.name, codes.flatten(1).t().contiguous())
        self.register_buffer("scale", scale.clone())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out)."""
        product = torch.matmul(x, _dequantize(self.get_buffer(self.name), self.scale, 1))
        return product if bias is None else product + bias


class BlockLinear(nn.Module):
    """A linear whose weight alone has 4 or 8 bits: com.microsoft.MatMulNBits on float activations."""

    packed: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, *, four_bit: bool) -> None:
        """codes: (out, in) int8; scale: (out,), repeated for every block of BLOCK_SIZE inputs."""
        super().__init__()
        self.outputs, self.inputs = codes.shape
        self.bits = 4 if four_bit else 8
        offset = 2 ** (self.bits - 1)
        blocks = -(-self.inputs // BLOCK_SIZE)
        unsigned = torch.full((self.outputs, blocks * BLOCK_SIZE), offset, dtype=torch.uint8)
        unsigned[:, : self.inputs] = (codes.int() + offset).to(torch.uint8)
        if four_bit:
            unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
        self.register_buffer("packed", unsigned.view(self.outputs, blocks, -1).contiguous())
        self.register_buffer("scales", scale[:, None].repeat(1, blocks).flatten())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out)."""
        shape = (*x.shape[:-1], self.outputs)
        sizes = {"K": self.inputs, "N": self.outputs, "bits": self.bits, "block_size": BLOCK_SIZE}
        inputs = (x, self.packed, self.scales)
        product = onnx_operation("com.microsoft::MatMulNBits", inputs, torch.float32, shape, **sizes)
        return product if bias is None else product + bias


class OnnxPatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, as one product over flattened patches.

    A patch is read row by row, its channels last: so it lies in the image that a file is given.
    """

    def __init__(self, activation: nn.Module, linear: nn.Module, stride: tuple[int, int], *, tokens: bool) -> None:
        """Quantize after the reshape, so that nothing stands between the quantizer and the product.

        linear: of (rows, columns, channels) flattened. tokens: return (B, patches, out) and no map.
        """
        super().__init__()
        self.stride = stride
        self.activation = activation
        self.linear = linear
        self.tokens = tokens

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, out, H / stride, W / stride), or to tokens."""
        batch, channels, height, width = x.shape
        rows, columns = self.stride
        down, across = height // rows, width // columns
        x = x.permute(0, 2, 3, 1).reshape(batch, down, rows, across, columns * channels)
        x = x.permute(0, 1, 3, 2, 4).reshape(batch, down * across, -1)
        product: Tensor = self.linear(self.activation(x), bias)
        return product if self.tokens else product.reshape(batch, down, across, -1).permute(0, 3, 1, 2)


class OnnxWeight(nn.Module):
    """Any other quantized weight: int8 and one scale per output channel.

    folded: for products that run in float; the scale's name makes storage.compute_at_load write a Cast and a Mul of
    constants, which runtimes compute once, where a DequantizeLinear would be computed at every run.
    """

    def __init__(self, codes: Tensor, scale: Tensor, *, four_bit: bool, folded: bool) -> None:
        """codes: shape of the weight, int8. scale: (out,)."""
        super().__init__()
        self.name = "codes4" if four_bit else "codes"
        self.scale_name = "load_scale" if folded else "scale"
        self.register_buffer(self.name, codes.clone())
        self.register_buffer(self.scale_name, scale.clone().view(-1))

    def forward(self) -> Tensor:
        """The dequantized weight."""
        return _dequantize(self.get_buffer(self.name), self.get_buffer(self.scale_name), 0)
