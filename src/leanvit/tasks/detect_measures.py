"""How far a detector's quantized parts are from the float ones, in what they say of scores and boxes.

These are the losses that torchvision trains by, with the float detector's own answers as targets, so that what bits
are chosen by is what a detection is made of (Ren et al., arXiv 1506.01497, equation 1): divergence of the scores, and
the smooth L1 distance of the boxes (`box_deltas`, in their units), each weighted by how surely there is an object.
Values a region that holds an object, so that empty pictures don't count for less.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import concat_box_prediction_layers

from leanvit.tasks.features import STRIDES
from leanvit.tasks.task import Measure, PartOutputs

if TYPE_CHECKING:
    from leanvit.tasks.detect import Detector

REGIONS = 32
"""Proposals of a picture, those of the highest objectness, on which the box head tells what the maps are worth: more
than a picture has objects, and as many as calibration takes cells of a picture."""

TINY = 1e-12
"""Objects at least, so that pictures without any divide by more than zero."""


def box_measure(truth: PartOutputs, found: PartOutputs) -> float:
    """Of class logits (R, classes + 1), the background first, and deltas (R, 4 (classes + 1))."""
    logits, deltas = (value.double() for value in truth)
    own_logits, own_deltas = (value.double() for value in found)
    expected = logits.log_softmax(1)
    scores = F.kl_div(own_logits.log_softmax(1), expected, reduction="sum", log_target=True)
    shares = expected.exp()[:, 1:]
    moved = smooth_l1(own_deltas - deltas).view(len(deltas), -1, 4)[:, 1:].sum(2)
    return float((scores + (shares * moved).sum()) / shares.sum().clamp(min=TINY))


def mask_measure(truth: PartOutputs, found: PartOutputs) -> float:
    """Of mask logits (R, classes + 1, 28, 28): mean divergence of a pixel."""
    return float(binary_divergence(truth[0].double(), found[0].double()).mean())


def pyramid_measure(detector: Detector, size: tuple[int, int]) -> Measure:
    """Of maps, objectness and deltas of every level: what the region proposal network says of the anchors, and what
    the float box head says of the float network's proposals when it reads these maps.

    size: (height, width) of the pictures. The measure remembers the proposals of the last truth that it was given.
    """
    levels = len(STRIDES)
    heads = detector.network.roi_heads
    proposer = _Proposer(detector, size)
    seen: dict[str, tuple[Tensor, list[Tensor], PartOutputs]] = {}

    def answers(maps: PartOutputs, regions: list[Tensor]) -> PartOutputs:
        cells = heads.box_roi_pool({str(i): value for i, value in enumerate(maps)}, regions, [size] * len(regions))
        logits, deltas = heads.box_predictor(heads.box_head(cells))
        return logits, deltas

    @torch.no_grad()
    def measure(truth: PartOutputs, found: PartOutputs) -> float:
        if "last" not in seen or seen["last"][0] is not truth[0]:
            regions = proposer(truth[:levels], truth[levels:])
            seen["last"] = truth[0], regions, answers(truth[:levels], regions)
        _, regions, wanted = seen["last"]
        first = _anchor_measure(truth[levels:], found[levels:])
        if not sum(len(boxes) for boxes in regions):
            return first
        return first + box_measure(wanted, answers(found[:levels], regions))

    return measure


class _Proposer:
    """Region proposals of a picture from what was said of its anchors."""

    def __init__(self, detector: Detector, size: tuple[int, int]) -> None:
        self.network, self.size = deepcopy(detector.network.rpn).eval(), size
        self.network._post_nms_top_n = {"training": REGIONS, "testing": REGIONS}

    def __call__(self, maps: PartOutputs, said: PartOutputs) -> list[Tensor]:
        """maps: (B, C, h, w) of each level. said: objectness of each level, then deltas. Boxes (R, 4) a picture."""
        self.network.head = _Said(said)
        pictures = ImageList(maps[0].new_zeros(len(maps[0]), 1, *self.size), [self.size] * len(maps[0]))
        boxes: list[Tensor] = self.network(pictures, {str(i): value for i, value in enumerate(maps)})[0]
        return boxes


class _Said(nn.Module):
    """A region proposal head that has answered already."""

    def __init__(self, said: PartOutputs) -> None:
        super().__init__()
        self.said = said

    def forward(self, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.said[: len(maps)]), list(self.said[len(maps) :])


def _anchor_measure(truth: PartOutputs, found: PartOutputs) -> float:
    """Of objectness of every level (B, A, h, w), then deltas (B, 4 A, h, w)."""
    (logits, deltas), (own_logits, own_deltas) = (_of_anchors(values) for values in (truth, found))
    shares = logits.sigmoid()
    moved = smooth_l1(own_deltas - deltas).sum(1)
    total = binary_divergence(logits, own_logits).sum() + (shares * moved).sum()
    return float(total / shares.sum().clamp(min=TINY))


def _of_anchors(said: PartOutputs) -> tuple[Tensor, Tensor]:
    """Objectness (anchors,) and deltas (anchors, 4) in float64, of all levels and pictures."""
    half = len(said) // 2
    objectness, deltas = concat_box_prediction_layers(list(said[:half]), list(said[half:]))
    return objectness.flatten().double(), deltas.double()


def binary_divergence(truth: Tensor, found: Tensor) -> Tensor:
    """KL divergence in nats of sigmoid(found) from sigmoid(truth), both logits of one shape, at each place."""
    share = truth.sigmoid()
    yes = F.logsigmoid(truth) - F.logsigmoid(found)
    no = F.logsigmoid(-truth) - F.logsigmoid(-found)
    return share * yes + (1 - share) * no


def smooth_l1(difference: Tensor) -> Tensor:
    """torchvision's distance of boxes at each place, in the units of its deltas, with its beta of a ninth."""
    return F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=1 / 9, reduction="none")
