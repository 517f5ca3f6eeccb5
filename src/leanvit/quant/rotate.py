"""Rotate the residual stream without changing the function, so that what few channels carry is spread over all of them.

Beyond the paper, and exact in float. For x of C channels, any orthogonal Q (C, C) with Q 1 = 1, and LN a LayerNorm
without gain and bias:

    mean(x Q) = x Q 1 / C = mean(x),  |x Q - mean| = |x - mean|     so     LN(x Q) = LN(x) Q

QuaRot and SpinQuant (arXiv 2404.00456, 2405.16406) turn a stream by any Q, for which the LayerNorm has to become an RMS
norm; a Q that keeps the mean lets it be, so the file keeps the operation that runtimes have kernels for. With gain g
and bias b of the norm, what writes the stream (W, c) and what reads the norm (V, d) become

    W' = Q^T W    c' = Q^T c    g' = 1    b' = 0    V' = V diag(g) Q    d' = d + V b

Position embeddings, class token and registers are constants that write; a LayerScale goes into what it scales. Where
channels are put side by side before a norm, as when Swin merges patches, diag(Q, ..., Q) keeps the mean as well. A
stream that anything else reads or writes is left as it is, and the report says why.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from leanvit.quant.graph import QuantGraph, node_argument, set_tensor
from leanvit.quant.sq_b import add_missing_biases
from leanvit.quant.streams import Reader, Stream, find_streams, scale_of
from leanvit.quant.work import Work


def rotate(work: Work) -> None:
    """The pass: turn every residual stream of the float graph that can turn."""
    add_missing_biases(work.graph)
    streams, _ = find_streams(work.graph, work.images[:2])
    for number, stream in enumerate(streams):
        turn_stream(work.graph, stream, mean_keeping_rotation(stream.channels, work.config.seed + number))
    work.notes["rotated"] = [
        {"channels": s.channels, "writers": len(s.writers), "readers": len(s.readers)} for s in streams
    ]


def mean_keeping_rotation(channels: int, seed: int) -> Tensor:
    """An orthogonal matrix (C, C), float64, whose rows and columns sum to 1 and whose entries are of about equal size.

    A Kronecker product of as many regular Hadamard matrices of order 4, (J - 2 I) / 2, as go into C, and of a random
    orthogonal matrix that keeps the mean for what is left; rows and columns are in random order.
    """
    generator = torch.Generator().manual_seed(seed)
    regular = torch.full((4, 4), 0.5, dtype=torch.float64) - torch.eye(4, dtype=torch.float64)
    found, left = torch.ones(1, 1, dtype=torch.float64), channels
    while left % 4 == 0:
        found, left = torch.kron(found, regular), left // 4
    found = torch.kron(found, _random(left, generator))
    rows, columns = (torch.randperm(channels, generator=generator) for _ in range(2))
    return found[rows][:, columns]


def _random(order: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix (n, n), float64, with Q 1 = Q^T 1 = 1."""
    values = torch.randn(order, order, generator=generator, dtype=torch.float64)
    values[:, 0] = 1.0
    basis = torch.linalg.qr(values)[0]
    turn = torch.eye(order, dtype=torch.float64)
    if order > 1:
        random = torch.randn(order - 1, order - 1, generator=generator, dtype=torch.float64)
        turn[1:, 1:] = torch.linalg.qr(random)[0]
    return basis @ turn @ basis.t()


@torch.no_grad()
def turn_stream(graph: QuantGraph, stream: Stream, turn: Tensor) -> None:
    """Turn a stream in place, in float64. turn: (C, C) float64, orthogonal, its rows and columns sum to 1."""
    for product, writer in stream.scales.items():
        scale = scale_of(product, writer)
        factor = _value(graph, scale)
        for parameter in _parameters(writer):
            value = _value(graph, parameter)
            _set(graph, parameter, value * factor.view(-1, *[1] * (value.dim() - 1)))
        _set(graph, scale, torch.ones_like(factor))
    for writer in stream.writers:
        for parameter in _parameters(writer):
            _set(graph, parameter, torch.tensordot(turn.t(), _value(graph, parameter), 1))
    for constant, axis in stream.constants.items():
        _set(graph, constant, (_value(graph, constant).movedim(axis, -1) @ turn).movedim(-1, axis))
    for reader in stream.readers:
        _turn_reader(graph, reader, torch.kron(torch.eye(reader.copies, dtype=turn.dtype), turn))
    for norm in stream.norms:
        for affine, neutral in zip(norm.args[2:4], (1.0, 0.0), strict=False):
            if isinstance(affine, Node):
                _set(graph, affine, torch.full_like(_value(graph, affine), neutral))


def _turn_reader(graph: QuantGraph, reader: Reader, turn: Tensor) -> None:
    """V' = V diag(g) Q and d' = d + V b; of a convolution, which has no norm before it, at all places of its kernel."""
    weight = node_argument(reader.node, 1)
    value = _value(graph, weight)
    if reader.norm is not None:
        gain, shift = [*reader.norm.args[2:4], None, None][:2]
        if isinstance(shift, Node):
            bias = node_argument(reader.node, 2)
            _set(graph, bias, _value(graph, bias) + value @ _value(graph, shift))
        if isinstance(gain, Node):
            value = value * _value(graph, gain)
    _set(graph, weight, torch.tensordot(value, turn, ([1], [0])).movedim(-1, 1))


def _parameters(layer: Node) -> list[Node]:
    """Weight and bias of a linear or convolution; the latter may be missing."""
    return [argument for argument in layer.args[1:3] if isinstance(argument, Node)]


def _value(graph: QuantGraph, node: Node) -> Tensor:
    return graph.parameter(node).detach().double().cpu()


def _set(graph: QuantGraph, node: Node, value: Tensor) -> None:
    set_tensor(graph.module, str(node.target), value.to(graph.parameter(node).device))
