"""What calibration keeps of one site: sampled operands, their bounds, its weight, and the error of its output."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from leanvit.quant.graph import QuantGraph, Site, site_inputs, source_kind

ROWS = 768
"""Vectors of a linear's input that are kept."""

ELEMENTS = 2**18
"""Elements of a map or of an attention operand that are kept, in whole images or windows."""

PRODUCT_ELEMENTS = 4 * ELEMENTS
"""Elements of a product that are kept at most, in whole rows of its first operand where two images would have more:
attention over 640 x 640 pixels has ten million an image. ViT-B at 224 keeps two whole images, 0.9 million."""

FEW_PIXELS = 32 * 224 * 224
"""Of the images that moments and rows for a comparison are taken from: with patches of 16 x 16, 6,272 rows a layer, for
moments of 64 x 64 and for the ROWS that are drawn."""

Bounds = tuple[Tensor, Tensor]


@dataclass
class SiteSample:
    """A sample of one site's operands.

    inputs: linear: ((rows, in),); conv2d: ((images, C, H, W),); matmul: (b, ..., N, K) and (b, ..., K, M).
    ranges: of each operand, minimum and maximum over all calibration data, and of every head (heads, 1, 1)
        or None. weight: that of a linear or convolution; rows of linears that share the input are stacked.
    kinds: what each operand comes from: "gelu", "softmax" or None.
    heads: where both operands of a matmul have a dimension of heads at -3.
    """

    site: Site
    inputs: tuple[Tensor, ...]
    ranges: tuple[Bounds, ...]
    head_ranges: tuple[Bounds, ...] | None
    weight: Tensor | None
    kinds: tuple[str | None, ...]

    @property
    def heads(self) -> int | None:
        """Number of heads, where operands have them."""
        return None if self.head_ranges is None else self.inputs[0].shape[-3]

    def bounds(self, operand: int, *, grouped: bool) -> Bounds:
        """Observed minimum and maximum: (), or (heads, 1, 1) where `grouped`."""
        if grouped and self.head_ranges is not None:
            return self.head_ranges[operand]
        return self.ranges[operand]

    def error(self, operand: int, *, grouped: bool) -> Callable[[Tensor], Tensor]:
        """A function from a replaced operand to the squared error of the site's output, () or (heads, 1, 1)."""
        x = self.inputs[operand]
        if self.site.kind == "linear" and self.weight is not None:
            return _linear_error(x, self.weight)
        if self.site.kind == "matmul":
            return self._product_error(operand, grouped)
        return lambda replaced: (replaced - x).square_().sum()

    def _product_error(self, operand: int, grouped: bool) -> Callable[[Tensor], Tensor]:
        x, other = self.inputs[operand], self.inputs[1 - operand]
        scores = self.site.name.split("#")[0].endswith(".qk")

        def error(replaced: Tensor) -> Tensor:
            delta = replaced - x
            moved = torch.matmul(delta, other) if operand == 0 else torch.matmul(other, delta)
            if scores:
                # What all keys of a query share, the softmax does not see.
                moved = moved - moved.mean(dim=-1, keepdim=True)
            squared = moved.square_()
            return _per_head(squared.sum(dim=(-2, -1), keepdim=True)) if grouped else squared.sum()

        return error


def _per_head(values: Tensor) -> Tensor:
    """(..., heads, 1, 1) summed to (heads, 1, 1)."""
    return values.reshape(-1, *values.shape[-3:]).sum(0)


def _linear_error(x: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """||(x' - x) W^T||^2, by the Gram matrix of W where that is the smaller product."""
    if weight.shape[0] <= weight.shape[1]:
        transposed = weight.t().contiguous()
        return lambda replaced: torch.matmul(replaced - x, transposed).square_().sum()
    gram = weight.t() @ weight

    def error(replaced: Tensor) -> Tensor:
        delta = replaced - x
        return (torch.matmul(delta, gram) * delta).sum()

    return error


def take_sample(graph: QuantGraph, site: Site, values: tuple[Tensor, ...], weight: Tensor | None) -> SiteSample:
    """Sample the operands of a site; deterministic.

    values: the operands over all calibration images, as the site's node gets them.
    """
    nodes = site_inputs(graph, site)
    if site.kind == "linear":
        inputs: tuple[Tensor, ...] = (some_rows(values[0]),)
    elif site.kind == "matmul":
        inputs = _some_products(values[0], values[1])
    else:
        inputs = tuple(_some_images(v) for v in values)
    heads = _has_heads(site, nodes, values)
    return SiteSample(
        site,
        inputs,
        tuple((v.min(), v.max()) for v in values),
        tuple(_head_bounds(v) for v in values) if heads else None,
        None if weight is None or site.kind != "linear" else weight,
        tuple(source_kind(n) for n in nodes),
    )


def _has_heads(site: Site, nodes: list[Node], values: tuple[Tensor, ...]) -> bool:
    """Whether dimension -3 is a fixed number of heads and not part of a folded batch."""
    if site.kind != "matmul" or any(v.dim() < 4 for v in values):
        return False
    sizes = [n.meta["val"].shape[-3] for n in nodes]
    return all(isinstance(size, int) for size in sizes) and sizes[0] == sizes[1] and sizes[0] > 1


def _head_bounds(value: Tensor) -> Bounds:
    per_head = value.movedim(-3, 0).flatten(1)
    return per_head.amin(1).view(-1, 1, 1), per_head.amax(1).view(-1, 1, 1)


def few_images(images: Tensor) -> Tensor:
    """The first of some images (N, C, H, W), two at least, that have no more than FEW_PIXELS."""
    return images[: max(2, FEW_PIXELS // images[0, 0].numel())]


def _picks(total: int, count: int) -> Tensor:
    # A fixed generator and not a stride: a stride that divides the number of tokens would see one place only.
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values


def some_rows(value: Tensor, count: int = ROWS) -> Tensor:
    """Up to `count` vectors of the last dimension, float32; the same ones at every call."""
    rows = value.reshape(-1, value.shape[-1])
    return rows[_picks(len(rows), count).to(rows.device)].float()


def some_values(value: Tensor) -> Tensor:
    """Up to ELEMENTS values of a tensor with its least and its largest, (N,) float32; the same ones at every call."""
    flat = value.reshape(-1)
    picked = flat[_picks(len(flat), ELEMENTS).to(flat.device)]
    return torch.cat([picked, flat.amin()[None], flat.amax()[None]]).float()


def _some_images(value: Tensor) -> Tensor:
    if value.dim() < 2:
        return value.float()
    each = max(1, math.prod(value.shape[1:]))
    return value[_picks(len(value), max(1, ELEMENTS // each)).to(value.device)].float()


def _some_products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same leading indices of both operands; all of them where one is repeated for the other, as a matrix is."""
    if a.dim() != b.dim() or len(a) != len(b) or a.shape[:-3] != b.shape[:-3]:
        return a.float(), b.float()
    each = max(math.prod(a.shape[1:]), math.prod(b.shape[1:]), a[0].numel() // a.shape[-1] * b.shape[-1])
    picks = _picks(len(a), max(2, ELEMENTS // each)).to(a.device)
    rows = _picks(a.shape[-2], max(1, PRODUCT_ELEMENTS * a.shape[-2] // (len(picks) * each))).to(a.device)
    return a[picks].index_select(-2, rows).float(), b[picks].float()
