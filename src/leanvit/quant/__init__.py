"""MPTQ: post-training quantization of any vision model that torch.export can follow."""

from leanvit.quant.mptq import QuantizedModel, quantize
from leanvit.quant.plan import Plan
from leanvit.quant.work import Pass, Work

__all__ = ["Pass", "Plan", "QuantizedModel", "Work", "quantize"]
