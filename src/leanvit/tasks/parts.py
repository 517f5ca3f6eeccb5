"""A task's network as the networks without data-dependent shapes that are quantized and exported, and back again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.tasks.build import OUTPUT_NAMES
from leanvit.tasks.detect import BOX, BOX_CELLS, LEVELS, MASK, MASK_CELLS, PYRAMID, Detector

WHOLE = "network"
"""Name of the one part of a network that is not cut."""

PART_OUTPUTS: dict[str, tuple[str, ...]] = {
    PYRAMID: tuple(f"{name}_{level}" for name in ("map", "objectness", "deltas") for level in LEVELS),
    BOX: ("class_logits", "box_deltas"),
    MASK: ("mask_logits",),
}
"""What the parts of a detector give; the pyramid takes images, the others cells of it."""

CELLS_KEPT = 512
"""Cut-outs of the pyramid on which box and mask heads are calibrated."""


def parts_of(network: nn.Module) -> dict[str, nn.Module]:
    """The parts of a network by name, in the order in which they run."""
    return network.parts() if isinstance(network, Detector) else {WHOLE: network}


def output_names(part: str, info: CheckpointInfo) -> tuple[str, ...]:
    """What a part gives, in order."""
    return OUTPUT_NAMES[info.task] if part == WHOLE else PART_OUTPUTS[part]


def example_of(part: str, info: CheckpointInfo) -> Tensor:
    """An input of a part: (2, 3, H, W), or (2, C, cells, cells) of the pyramid."""
    if part in (BOX, MASK):
        side = BOX_CELLS if part == BOX else MASK_CELLS
        return torch.zeros(2, info.head["channels"], side, side)
    return torch.zeros(2, 3, *info.preprocess.input_size)


def with_parts(network: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """A network that runs other parts of the same interface, e.g. quantized ones; the given one is not changed."""
    if not isinstance(network, Detector):
        return parts[WHOLE]
    copied = copy.deepcopy(network)
    copied.replace_parts(parts)
    return copied.eval()


@torch.no_grad()
def part_inputs(network: nn.Module, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """What every part reads when the network runs on x (B, 3, H, W) float32 normalised: batches for calibration.

    Of cells, at most CELLS_KEPT are kept, drawn by the seed.
    """
    if not isinstance(network, Detector):
        return {WHOLE: x}
    heads = network.network.roi_heads
    seen: dict[str, list[Tensor]] = {BOX: [], MASK: []}
    pools: dict[str, Any] = {BOX: heads.box_roi_pool, MASK: heads.mask_roi_pool}
    hooks = [
        pool.register_forward_hook(lambda _m, _a, output, name=name: seen[name].append(output))
        for name, pool in pools.items()
        if pool is not None
    ]
    try:
        for batch in torch.split(x, 16):
            network(batch)
    finally:
        for hook in hooks:
            hook.remove()
    generator = torch.Generator().manual_seed(seed)
    inputs = {PYRAMID: x}
    for name in network.parts():
        if name in seen:
            cells = torch.cat(seen[name])
            picks = torch.randperm(len(cells), generator=generator)[:CELLS_KEPT].sort().values
            inputs[name] = cells[picks.to(cells.device)]
    return inputs
