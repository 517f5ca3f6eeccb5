"""The weights that a training starts from: those of any source, in a network with its own classes and size."""

from __future__ import annotations

import torch
from torch import nn

from leanvit.checkpoint import load_weights
from leanvit.config import LoadOptions
from leanvit.load import files, own
from leanvit.load.api import load
from leanvit.load.state_dicts import fitted, without_prefixes


@torch.no_grad()
def start_from(network: nn.Module, spec: str, options: LoadOptions) -> None:
    """Copy the weights of a spec into a network of the same architecture that has its own classes and size.

    The classifier keeps its random weights where the number of classes differs.
    Raises CheckpointError where the spec is none or its weights don't fit.
    """
    source: nn.Module | None = None
    if files.claims(spec) and not own.claims(spec):
        tensors = without_prefixes(files.read_weights(spec, ema=options.ema).tensors, set(network.state_dict()))
    else:
        source = load(spec, options)[0]
        tensors = source.state_dict()
    load_weights(network, fitted(tensors, network, source), spec, head=False)
