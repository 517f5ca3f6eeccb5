"""Balance the heads of attention without changing the function, so that q, k, v and the output quantize well.

Beyond the paper, and exact in float. Per head, with any invertible M and any vector c:

    q k^T      = (q M) (k M^-T)^T              softmax(q (k - c)^T) = softmax(q k^T)     (q c is the same for all keys)
    A v W^T    = (A (v - c) M) (W M^-T)^T + c W^T,  as the rows of A sum to one

M balances both sides, M^T E[q q^T] M = M^-1 E[k k^T] M^-T = S (the transform of balanced truncation), which
minimises the product of their energies, and is followed by a rotation that spreads S evenly over the
channels, so that one step fits all of them. For v the other side is the weight that reads the output. All of it
goes into the weights of the linears; nothing is computed at run time. Heads whose channels something else reads
too are left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from leanvit.quant.graph import (
    QuantGraph,
    get_tensor,
    node_argument,
    reaches_softmax,
    source_kind,
)
from leanvit.quant.interpret import observe_nodes, run
from leanvit.quant.ops import CHANNEL_PATHS, LINEAR, PRODUCTS
from leanvit.quant.samples import few_images
from leanvit.quant.sq_b import add_missing_biases
from leanvit.quant.work import Work

RIDGE = 1e-3
"""Of the mean diagonal, added to both moments: a channel without energy counts as one with a thousandth of the mean."""


@dataclass(frozen=True)
class Channels:
    """Which channels of a linear are the (heads, head_dim) of a matmul operand, or of a product that it reads.

    transposed: the operand is (..., head_dim, N), as keys are.
    """

    linear: Node
    index: Tensor
    transposed: bool = False


def balance(work: Work) -> None:
    """The pass: balance all heads of the float graph, which get the biases that they lack."""
    add_missing_biases(work.graph)
    work.notes["balanced_heads"] = balance_heads(work.graph, work.images, work.config.seed)


@torch.no_grad()
def balance_heads(graph: QuantGraph, images: Tensor, seed: int = 0) -> dict[str, int]:
    """Balance q with k, and v with the projection, wherever their channels are theirs alone; in place.

    images: (N, 3, H, W) calibration images; the first of large ones are enough. Returns how many of each were balanced:
    {"qk": n, "vo": n}.
    """
    finder = _ChannelFinder(graph, images[:2])
    moments = _second_moments(graph, finder, few_images(images))
    done = {"qk": 0, "vo": 0}
    for node in graph.module.graph.nodes:
        if node.target not in PRODUCTS:
            continue
        if source_kind(node_argument(node, 0)) == "softmax":
            done["vo"] += _balance_value(graph, finder, node, moments, seed)
        else:
            done["qk"] += _balance_scores(graph, finder, node, moments, seed)
    graph.module.recompile()
    return done


def _balance_scores(graph: QuantGraph, finder: _ChannelFinder, node: Node, moments: Moments, seed: int) -> bool:
    q, k = finder.operand(node, 0), finder.operand(node, 1)
    if q is None or k is None or q.index.shape != k.index.shape or not reaches_softmax(node):
        return False
    mean_k, second_k = moments[node.name, 1]
    _, second_q = moments[node.name, 0]
    _add_to_bias(graph, k, -mean_k)
    centred = second_k - mean_k[:, :, None] * mean_k[:, None, :]
    forward, inverse = balancing(second_q, centred, seed)
    _transform_rows(graph, q, forward.transpose(1, 2))
    _transform_rows(graph, k, inverse)
    return True


def _balance_value(graph: QuantGraph, finder: _ChannelFinder, node: Node, moments: Moments, seed: int) -> bool:
    v, out = finder.operand(node, 1), finder.reader(node)
    if v is None or out is None or v.index.shape != out.index.shape:
        return False
    mean, second = moments[node.name, 1]
    weight_path, bias_path = str(node_argument(out.linear, 1).target), str(node_argument(out.linear, 2).target)
    weight = get_tensor(graph.module, weight_path)
    columns = weight.double()[:, out.index].permute(1, 0, 2)
    centred = second - mean[:, :, None] * mean[:, None, :]
    forward, inverse = balancing(centred, columns.transpose(1, 2) @ columns, seed)
    _add_to_bias(graph, v, -mean)
    shift = torch.einsum("hod,hd->o", columns, mean)
    get_tensor(graph.module, bias_path).add_(shift.to(weight.dtype))
    _transform_rows(graph, v, forward.transpose(1, 2))
    weight[:, out.index] = (columns @ inverse.transpose(1, 2)).permute(1, 0, 2).to(weight.dtype)
    return True


def balancing(a: Tensor, b: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """M and its inverse with M^T a M = M^-1 b M^-T, of even diagonal.

    a, b: (heads, D, D) symmetric, positive semi-definite. Returns (heads, D, D) each, float64.
    """
    a, b = _regular(a.double()), _regular(b.double())
    lower = torch.linalg.cholesky(a)
    values, vectors = torch.linalg.eigh(lower.transpose(1, 2) @ b @ lower)
    quarter = values.clamp(min=1e-24).pow(0.25)
    spread = rotation(a.shape[-1], seed).to(a)
    forward = torch.linalg.solve_triangular(lower.transpose(1, 2), vectors * quarter[:, None, :], upper=True) @ spread
    inverse = spread.t() @ ((vectors.transpose(1, 2) @ lower.transpose(1, 2)) / quarter[:, :, None])
    return forward, inverse


def _regular(matrix: Tensor) -> Tensor:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-12)
    return matrix + RIDGE * diagonal[:, None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def rotation(dim: int, seed: int) -> Tensor:
    """An orthogonal matrix whose entries are of about equal size: Hadamard where `dim` is a power of two."""
    generator = torch.Generator().manual_seed(seed)
    if dim & (dim - 1):
        return torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.randint(0, 2, (dim,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix / dim**0.5


def _transform_rows(graph: QuantGraph, channels: Channels, matrix: Tensor) -> None:
    """W, c -> matrix W, matrix c on the rows of each head. matrix: (heads, D, D)."""
    for index in (1, 2):
        tensor = get_tensor(graph.module, str(node_argument(channels.linear, index).target))
        rows = tensor.double()[channels.index]
        mixed = torch.einsum("hed,hd...->he...", matrix, rows)
        tensor[channels.index] = mixed.to(tensor.dtype)


def _add_to_bias(graph: QuantGraph, channels: Channels, value: Tensor) -> None:
    bias = get_tensor(graph.module, str(node_argument(channels.linear, 2).target))
    bias[channels.index] += value.to(bias.dtype)


Moments = dict[tuple[str, int], tuple[Tensor, Tensor]]
"""{(matmul, operand): mean (heads, D) and second moment (heads, D, D)}, in units of the linear's output."""


def _second_moments(graph: QuantGraph, finder: _ChannelFinder, images: Tensor) -> Moments:
    """Moments of the operands of every product, as rows of head_dim, without the constant factor."""
    moments: Moments = {}
    wanted: dict[str, list[tuple[str, int]]] = {}
    for (name, operand), _ in finder.operands.items():
        node = graph.node(name)
        wanted.setdefault(node_argument(node, operand).name, []).append((name, operand))

    def record(name: str, value: Tensor) -> None:
        for key in wanted[name]:
            rows = finder.as_rows(key, value).double()
            flat = rows.movedim(-3, 0).flatten(1, -2)
            moments[key] = flat.mean(1), flat.transpose(1, 2) @ flat / flat.shape[1]

    observe_nodes(graph.module, set(wanted), images, record)
    return moments


class _ChannelFinder:
    """Follow every output channel of every linear through reshapes, by running the graph on channel numbers."""

    def __init__(self, graph: QuantGraph, images: Tensor) -> None:
        self.operands: dict[tuple[str, int], tuple[Channels, Tensor]] = {}
        self.readers: dict[str, Channels] = {}
        sources = [n for n in graph.module.graph.nodes if n.target is LINEAR or n.target in PRODUCTS]
        ends = {source: _terminals(source) for source in sources}
        ones, numbers = (_run_with(graph.module, images, sources, fill) for fill in (_ones, _numbers))
        for source, terminals in ends.items():
            seen = {pair: _channel_map(ones[pair[1]], numbers[pair[1]]) for pair in terminals}
            for (user, operand), index in seen.items():
                others = [m for pair, m in seen.items() if pair != (user, operand)]
                if index is not None and all(m is not None and not _overlap(index, m) for m in others):
                    self._add(source, user, operand, index, ones[operand])

    def _add(self, source: Node, user: Node, operand: Node, index: Tensor, ones: Tensor) -> None:
        if source.target is LINEAR and user.target in PRODUCTS and _is_plain(source):
            for position in (0, 1):
                if user.args[position] is operand and (found := _head_rows(source, index)) is not None:
                    self.operands[user.name, position] = (found, ones.flatten()[0])
        elif source.target in PRODUCTS and user.target is LINEAR and _is_plain(user):
            heads, dim = source.meta["val"].shape[-3], source.meta["val"].shape[-1]
            # Shape (..., channels), the same at every token.
            tokens = index.reshape(-1, index.shape[-1])
            flat = tokens[0]
            same = bool((tokens == flat).all())
            if same and isinstance(heads, int) and len(flat) == heads * dim and _count_distinct(flat) == len(flat):
                # flat[c] is the (head, channel) that stands at input c; turned round, the input of each.
                self.readers[source.name] = Channels(user, flat.argsort().view(heads, dim))

    def operand(self, node: Node, position: int) -> Channels | None:
        """The channels that an operand of a product is made of, None where they aren't its alone."""
        found = self.operands.get((node.name, position))
        return found[0] if found else None

    def reader(self, node: Node) -> Channels | None:
        """The input channels of the one linear that reads a product's output."""
        return self.readers.get(node.name)

    def as_rows(self, key: tuple[str, int], value: Tensor) -> Tensor:
        """An operand as (..., heads, N, head_dim), divided by its constant factor."""
        channels, factor = self.operands[key]
        return (value.transpose(-2, -1) if channels.transposed else value) / factor


def _is_plain(linear: Node) -> bool:
    """Whether weight and bias are parameters that nothing else uses."""
    parameters = [a for a in linear.args[1:3] if isinstance(a, Node)]
    return len(parameters) == 2 and all(p.op == "get_attr" and len(p.users) == 1 for p in parameters)


def _terminals(source: Node) -> list[tuple[Node, Node]]:
    """(user, operand) where a value that is only reshaped or scaled on its way from `source` is read."""
    found = []
    for user in source.users:
        if user.target in CHANNEL_PATHS and user.args[0] is source:
            found += _terminals(user)
        else:
            found.append((user, source))
    return found


def _ones(value: Tensor) -> Tensor:
    return torch.ones_like(value)


def _numbers(value: Tensor) -> Tensor:
    """Channel numbers from 1, in the last dimension, or (head, channel) numbers where there are heads."""
    if value.dim() < 4:
        return torch.arange(1.0, value.shape[-1] + 1).expand_as(value).clone()
    heads, dim = value.shape[-3], value.shape[-1]
    return torch.arange(1.0, heads * dim + 1).view(heads, 1, dim).expand_as(value).clone()


def _run_with(module: GraphModule, images: Tensor, sources: list[Node], fill: Any) -> dict[Node, Tensor]:
    """Operands at the ends of chains, with the output of each source replaced."""
    wanted = {operand for source in sources for _, operand in _terminals(source)}
    overridden = set(sources)
    values: dict[Node, Tensor] = {}

    def step(node: Node, value: Any) -> Any:
        value = fill(value) if node in overridden else value
        if node in wanted and isinstance(value, Tensor):
            values[node] = value.double()
        return value

    run(module, images, step)
    return values


def _channel_map(ones: Tensor | None, numbers: Tensor | None) -> Tensor | None:
    """Channel at each place of an operand, constant over batch; None where anything but reshapes happened."""
    if ones is None or numbers is None or ones.numel() == 0 or not bool((ones == ones.flatten()[0]).all()):
        return None
    factor = ones.flatten()[0]
    if factor == 0 or not factor.isfinite():
        return None
    channel = numbers / factor - 1
    whole = channel.round()
    if not bool(((channel - whole).abs() < 1e-2).all()) or not bool((whole == whole[:1]).all()):
        return None
    return whole[0].long()


def _overlap(a: Tensor, b: Tensor) -> bool:
    return bool(torch.isin(a, b).any())


def _head_rows(source: Node, index: Tensor) -> Channels | None:
    """The channels of a linear that make up an operand (heads, N, head_dim), or (heads, head_dim, N) for keys."""
    if index.dim() < 3:
        return None
    # Shape (windows, heads, N, head_dim) where windows aren't folded into the batch: all alike.
    windows = index.reshape(-1, *index.shape[-3:])
    index = windows[0]
    if not bool((windows == index).all()):
        return None
    for tokens_at in (1, 2):
        first = index.select(tokens_at, 0)
        if bool((index == first.unsqueeze(tokens_at)).all()) and _count_distinct(first) == first.numel():
            return Channels(source, first, transposed=tokens_at == 2)
    return None


def _count_distinct(index: Tensor) -> int:
    return int(torch.unique(index).numel())
