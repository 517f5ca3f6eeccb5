"""Multiply-adds of a network, counted while it runs on shapes alone."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, size: tuple[int, int]) -> int:
    """Multiply-adds of one image (H, W): linear layers, convolutions and both attention products.

    model: on the meta device, so that nothing is computed; it is left in the mode that it was in. Norms,
    activations, softmax, pooling and sums are not counted, as in the papers' tables. A network that makes logits again
    in blocks (`attention_memory`) is counted as it runs.
    """
    training, channels = model.training, getattr(model, "in_chans", 3)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        model.eval()(torch.empty(1, channels, *size))
    model.train(training)
    # The counter takes a multiply-add for two operations.
    return int(counter.get_total_flops()) // 2
