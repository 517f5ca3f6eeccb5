"""MPTQ: post-training quantization of any vision model that torch.export can follow."""

from leanvit.quant.mptq import QuantizedModel, quantize

__all__ = ["QuantizedModel", "quantize"]
