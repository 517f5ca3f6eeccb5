"""MPTQ: post-training quantization of any vision model that torch.export can follow."""

from leanvit.quant.mptq import QuantizedModel, quantize
from leanvit.quant.plan import Plan

__all__ = ["Plan", "QuantizedModel", "quantize"]
