"""A task's network as the networks without data-dependent shapes that are quantized and exported, and back again."""

from __future__ import annotations

import copy
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.tasks import task_named
from leanvit.tasks.task import Measure

WHOLE = "network"
"""Name of the one part of a network that is not cut."""


@runtime_checkable
class CutNetwork(Protocol):
    """A network that is quantized and exported in parts, because between them shapes depend on the data.

    Any other network is one part, WHOLE.
    """

    def parts(self) -> dict[str, nn.Module]:
        """The parts by name, in the order in which they run; they share the network's weights. The first takes x."""

    def part_outputs(self) -> dict[str, tuple[str, ...]]:
        """What every part returns, in order."""

    def part_example(self, part: str, size: tuple[int, int]) -> Tensor:
        """An input of a part, a batch of 2, for images of `size` (height, width)."""

    def part_inputs(self, x: Tensor, seed: int) -> dict[str, Tensor]:
        """What every part reads when the network runs on x (B, 3, H, W) float32 normalised."""

    def part_measures(self, size: tuple[int, int]) -> dict[str, Measure]:
        """What the bits of the parts are chosen by, for images of `size`; a part without has its outputs' error."""

    def replace_parts(self, parts: dict[str, nn.Module]) -> None:
        """Run `parts` of the same interface instead of the network's own."""


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name, in the order in which they run."""
    return network.parts() if isinstance(network, CutNetwork) else {WHOLE: network}


def output_names(network: nn.Module, info: CheckpointInfo) -> dict[str, tuple[str, ...]]:
    """What every part of a network returns, in order."""
    return network.part_outputs() if isinstance(network, CutNetwork) else {WHOLE: task_named(info.task).output_names}


def example_of(network: nn.Module, part: str, info: CheckpointInfo) -> Tensor:
    """An input of a part of a network: a batch of 2."""
    size = info.preprocess.input_size
    return (
        network.part_example(part, size)
        if isinstance(network, CutNetwork)
        else torch.zeros(2, info.preprocess.channels, *size)
    )


def with_parts(network: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """A network that runs other parts of the same interface, e.g. quantized ones; the given one is not changed."""
    if not isinstance(network, CutNetwork):
        return parts[WHOLE]
    copied = copy.deepcopy(network)
    copied.replace_parts(parts)
    return copied.eval()


@torch.no_grad()
def part_inputs(network: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What every part reads when the network runs on x (B, 3, H, W) float32 normalised: batches for calibration."""
    like = next(network.parameters(), None)
    x = x if like is None else x.to(like.device)
    return network.part_inputs(x, seed) if isinstance(network, CutNetwork) else {WHOLE: x}
