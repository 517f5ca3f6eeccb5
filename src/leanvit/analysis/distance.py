"""Mean attention distance: how far a head looks.

    d = mean over queries i of  sum_j A_ij |p_i - p_j|  /  sum_j A_ij

with A the attention weights and p the centres of the patches in pixels; class tokens and padding are left out.
Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929, figure 7; Raghu et al., "Do Vision
Transformers See Like Convolutional Neural Networks?", NeurIPS 2021, arXiv 2108.08810.
"""

from __future__ import annotations

import torch
from torch import Tensor

from leanvit.analysis.attention import AttentionLayer
from leanvit.analysis.places import Grid


def attention_distance(layer: AttentionLayer, size: Grid) -> Tensor:
    """Mean attention distance of every head, in pixels: (B, heads).

    size: (H, W) of the image in pixels. Raises ModelError where it is not known where the tokens stand.
    """
    return _mean_distance(layer, layer.weights, size)


def uniform_distance(layer: AttentionLayer, size: Grid) -> float:
    """The distance, in pixels, of a head that looks alike at all that some head of some image looks at.

    In shifted windows that leaves out what is masked. Raises ModelError as `attention_distance` does.
    """
    # timm's mask of -100 leaves about 1e-44.
    even = (layer.weights.amax((0, 2)) > 1e-20).to(layer.weights.dtype)
    return float(_mean_distance(layer, even[None, :, None], size))


def _mean_distance(layer: AttentionLayer, weights: Tensor, size: Grid) -> Tensor:
    queries, keys = layer.places()
    device = weights.device
    between = torch.cdist(queries.centres(size).to(device), keys.centres(size).to(device)).to(weights.dtype)
    asked, seen = (places.known.to(device, weights.dtype) for places in (queries, keys))
    mass = torch.einsum("bghqk,gk->bghq", weights, seen)
    travelled = torch.einsum("bghqk,gqk->bghq", weights, between * seen[:, None])
    # A query that looks at class tokens or padding alone has no distance.
    counts = asked[None, :, None] * (mass > 0)
    distance = torch.where(mass > 0, travelled / mass, 0.0)
    return (distance * counts).sum((1, 3)) / counts.sum((1, 3)).clamp(min=1)
