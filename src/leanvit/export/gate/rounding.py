"""How exactly the outputs of a quantized network are defined: the rest is rounding, which no file can repeat.

A value near the middle between two quantized integers rounds to one or the other by the last bit of a float sum, and a
deep network makes more of that. The same simulation in float64 shows how far outputs move by it; a runtime, whose sums
have another order, can't be asked for less.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from leanvit.export.gate.limits import LOW_BIT_SQNR_DB, MARGIN_DB, QUANTIZED_SQNR_DB
from leanvit.export.onnx.simulation import activation_quantizers

T = TypeVar("T")


def some_tensor(network: nn.Module) -> Tensor:
    """A floating tensor of the network, for its device and its dtype; an empty one where it has none."""
    tensors = (tensor for tensor in (*network.parameters(), *network.buffers()) if tensor.is_floating_point())
    return next(tensors, torch.zeros(0))


def in_double(network: nn.Module, run: Callable[[nn.Module], T]) -> T:
    """run(copy) on a copy of the network that computes in float64, also where its graph asks for float32 by name."""
    copied = copy.deepcopy(network).double()
    for module in copied.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                node.args = tuple(torch.float64 if value is torch.float32 else value for value in node.args)
                node.kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in node.kwargs.items()}
            module.recompile()
    usual = torch.get_default_dtype()
    # Tensors that a graph makes without naming a dtype, as linspace does, follow the default.
    torch.set_default_dtype(torch.float64)
    try:
        return run(copied)
    finally:
        torch.set_default_dtype(usual)


def least_sqnr_db(network: nn.Module, own_db: Callable[[], float]) -> float:
    """The least SQNR in dB that the gate asks of a quantized network's golden outputs in a runtime.

    network: the simulation in its executed form. own_db: returns the SQNR of its outputs to those of the same in
    float64, see `in_double`; not asked where it doesn't count. QUANTIZED_SQNR_DB where all activations have 8 bits,
    less where rounding alone moves the outputs further; never below LOW_BIT_SQNR_DB.
    """
    if any(quantizer.bits < 8 for quantizer in activation_quantizers(network).values()):
        return LOW_BIT_SQNR_DB
    return max(LOW_BIT_SQNR_DB, min(QUANTIZED_SQNR_DB, round(own_db() - MARGIN_DB, 1)))
