"""Residual streams of a traced graph: tensors whose channels have to turn together, and what writes and reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node, map_arg

from leanvit.quant.graph import QuantGraph, conv_options, module_path
from leanvit.quant.interpret import run
from leanvit.quant.ops import ADD, CARRIES, CONVOLUTIONS, LAYER_NORM, LINEAR, SUMS, Effect, aten, operations

FOLLOWED = (*(target for target in (*CARRIES, *SUMS) if target not in operations(Effect.STACK)), aten.index.Tensor)
"""Operations over which channels may stay where they are, or move together. What they do is tried with numbers."""


CHECK = aten._assert_tensor_metadata.default
"""Reads a tensor for its dtype alone."""


class LeftOut(Exception):
    """Why a stream can't turn."""


@dataclass(frozen=True)
class Reader:
    """A linear behind a norm, or a linear or convolution without one, that reads the channels of a stream's tensor, or
    of `copies` of them side by side."""

    node: Node
    norm: Node | None
    copies: int


@dataclass
class Stream:
    """Tensors that turn together.

    channels: C. places: the axis of the channels, by tensor. writers: linears and convolutions that make them.
    constants: parameters among them, with that axis. scales: products with a LayerScale, each with the writer before.
    merged: tensors made of several of them, side by side. readers: what reads them.
    """

    channels: int
    places: dict[Node, int] = field(default_factory=dict)
    writers: dict[Node, None] = field(default_factory=dict)
    constants: dict[Node, int] = field(default_factory=dict)
    scales: dict[Node, Node] = field(default_factory=dict)
    merged: dict[Node, None] = field(default_factory=dict)
    readers: dict[Reader, None] = field(default_factory=dict)

    @property
    def norms(self) -> list[Node]:
        """The norms that read it."""
        return list(dict.fromkeys(reader.norm for reader in self.readers if reader.norm is not None))


def find_streams(graph: QuantGraph, images: Tensor) -> tuple[list[Stream], list[str]]:
    """The streams that can turn, and one line for each that can't, with the reason.

    images: (2, C, H, W), with which the graph is run once for its shapes.
    """
    finder = _Finder(graph, images)
    found: list[Stream] = []
    left_out: list[str] = []
    seen: set[Node] = set()
    for node in graph.module.graph.nodes:
        source = node.args[0] if node.target is LAYER_NORM else None
        if not isinstance(source, Node) or source in seen:
            continue
        stream = Stream(int(finder.shape(source)[-1]))
        try:
            finder.fill(stream, source)
            found.append(stream)
        except LeftOut as reason:
            left_out.append(f"{module_path(node) or node.name}: {reason}")
        seen |= set(stream.places)
    return found, left_out


class _Finder:
    """Walks a graph with the shapes that it has for some images."""

    def __init__(self, graph: QuantGraph, images: Tensor) -> None:
        self.device = images.device
        self.values: dict[Node, Any] = {}

        def record(node: Node, value: Any) -> Any:
            keeps = node.op == "get_attr" or not isinstance(value, Tensor)
            self.values[node] = value if keeps else value.shape
            return value

        run(graph.module, images, record)
        self.readers_of: dict[str, set[Node]] = {}
        for node in graph.module.graph.nodes:
            if node.op == "get_attr":
                users = {user for user in node.users if user.target is not CHECK}
                self.readers_of.setdefault(str(node.target), set()).update(users)

    def shape(self, node: Node) -> torch.Size:
        """The shape of a tensor; raises LeftOut where it is none."""
        found = self.values[node]
        found = found.shape if isinstance(found, Tensor) else found
        if not isinstance(found, torch.Size):
            raise LeftOut(f"{_where(node)} is no single tensor")
        return found

    def fill(self, stream: Stream, start: Node) -> None:
        """Gather a stream from one of its tensors, with its channels last. Raises LeftOut."""
        todo = [(start, len(self.shape(start)) - 1)]
        while todo:
            node, axis = todo.pop()
            if node in stream.places:
                if stream.places[node] != axis:
                    raise LeftOut(f"{_where(node)} has its channels at two places")
                continue
            if axis < 0 or self.shape(node)[axis] != stream.channels:
                raise LeftOut(f"{_where(node)} has other channels")
            stream.places[node] = axis
            todo += self._sources(stream, node, axis)
            todo += self._users(stream, node, axis)
        self._require_own(stream)

    def _sources(self, stream: Stream, node: Node, axis: int) -> Iterator[tuple[Node, int]]:
        """The tensors of the stream that one of it is made of, each with the axis of its channels."""
        behind = len(self.shape(node)) - axis
        if node.op == "get_attr":
            stream.constants[node] = axis
        elif self._writes(node, axis):
            stream.writers[node] = None
        elif node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
            stream.scales[node] = self._scaled(node, axis)
            stream.writers[stream.scales[node]] = None
        elif node.target in ADD:
            if len(node.all_input_nodes) < 2 or node.kwargs:
                raise LeftOut(f"a number is added at {_where(node)}")
            yield from ((source, len(self.shape(source)) - behind) for source in node.all_input_nodes)
        elif node.target is aten.cat.default:
            yield from ((source, axis) for source in node.all_input_nodes)
        else:
            source = node.args[0] if node.args else None
            if not isinstance(source, Node):
                raise LeftOut(f"{_where(node)} makes it")
            places = [i for i, size in enumerate(self.shape(source)) if size == stream.channels]
            before = next((i for i in places if self._after(node, source, i) == axis), None)
            if before is None:
                raise LeftOut(f"{_where(node)} makes it")
            yield source, before

    def _users(self, stream: Stream, node: Node, axis: int) -> Iterator[tuple[Node, int]]:
        """The tensors of the stream that are made of one of it; notes what reads it otherwise."""
        behind = len(self.shape(node)) - axis
        for user in (user for user in node.users if user.target is not CHECK):
            after, copies = self._carried(user, node, axis) or (None, 1)
            if user.target in ADD:
                yield user, len(self.shape(user)) - behind
            elif user.target is LAYER_NORM and behind == 1:
                stream.readers |= {Reader(reader, user, 1): None for reader in self._behind(user, axis)}
            elif user.target is aten.cat.default and _cat_axis(user, len(self.shape(user))) == axis:
                stream.readers |= dict.fromkeys(self._merged(stream, user, axis))
            elif user.target is aten.cat.default:
                yield user, axis
            elif self._reads(user, node, axis):
                stream.readers[Reader(user, None, 1)] = None
            elif after is not None and copies > 1:
                stream.readers |= dict.fromkeys(self._merged(stream, user, after))
            elif after is not None:
                yield user, after
            else:
                raise LeftOut(f"{_where(user)} reads it")

    def _behind(self, node: Node, axis: int) -> Iterator[Node]:
        """The linears that read a norm's output, over operations that keep its channels together. No convolution: the
        norm's bias would be missing where it pads."""
        if not node.users:
            raise LeftOut(f"nothing reads {_where(node)}")
        for user in node.users:
            after = self._after(user, node, axis)
            if user.target is LINEAR and self._reads(user, node, axis):
                yield user
            elif after is not None:
                yield from self._behind(user, after)
            else:
                raise LeftOut(f"{_where(user)} reads its norm")

    def _merged(self, stream: Stream, node: Node, axis: int) -> Iterator[Reader]:
        """What reads a tensor that holds the channels of several places side by side (Swin merges patches so)."""
        copies = self.shape(node)[axis] // stream.channels
        if copies * stream.channels != self.shape(node)[axis]:
            raise LeftOut(f"{_where(node)} puts other channels beside it")
        for user in node.users:
            if user.target is LAYER_NORM and axis == len(self.shape(node)) - 1:
                yield from (Reader(reader, user, copies) for reader in self._behind(user, axis))
            elif self._reads(user, node, axis):
                yield Reader(user, None, copies)
            elif (after := self._after(user, node, axis)) is not None:
                yield from self._merged(stream, user, after)
            else:
                raise LeftOut(f"{_where(user)} reads it")
        if node.target is aten.cat.default:
            stream.merged[node] = None

    def _writes(self, node: Node, axis: int) -> bool:
        """Whether a linear or convolution makes the channels at this axis of its output."""
        return self._mixes(node, node, axis)

    def _reads(self, user: Node, node: Node, axis: int) -> bool:
        """Whether a linear or convolution reads the channels at this axis of a tensor as its inputs."""
        return user.args[:1] == (node,) and self._mixes(user, node, axis)

    def _mixes(self, layer: Node, tensor: Node, axis: int) -> bool:
        """Whether this axis of a layer's input or output is that of its channels, each made of or used by all."""
        if layer.target is LINEAR:
            return axis == len(self.shape(tensor)) - 1
        return layer.target in CONVOLUTIONS and axis == 1 and conv_options(layer)[3] == 1

    def _scaled(self, node: Node, axis: int) -> Node:
        """What writes the tensor that a LayerScale scales by channel."""
        writer, scale = sorted(node.all_input_nodes, key=lambda source: source.op == "get_attr")[:2]
        if scale.op != "get_attr" or list(scale.users) != [node] or list(writer.users) != [node]:
            raise LeftOut(f"{_where(node)} scales it")
        by_channel = list(self.shape(scale)) == [self.shape(node)[axis], *[1] * (len(self.shape(node)) - axis - 1)]
        if not by_channel or not self._writes(writer, axis):
            raise LeftOut(f"{_where(node)} scales it")
        return writer

    def _carried(self, user: Node, node: Node, axis: int) -> tuple[int, int] | None:
        """The axis that has a tensor's channels after an operation on it, and how many times side by side.

        None where they are not there as they were.
        """
        if user.target not in FOLLOWED or user.args[:1] != (node,):
            return None
        shape = self.shape(node)
        found = user.target(  # type: ignore[operator]
            self._numbers(shape[axis], len(shape) - axis).expand(shape).contiguous(),
            *map_arg(user.args[1:], self.values.__getitem__), **map_arg(user.kwargs, self.values.__getitem__),
        )  # fmt: skip
        for place, size in enumerate(found.shape):
            copies, left = divmod(size, shape[axis])
            if copies and not left:
                # Sums and averages over places give multiples, paddings zeros: both turn with the channels.
                ratio = found / self._numbers(shape[axis], found.dim() - place, copies)
                if torch.allclose(ratio, ratio.narrow(place, 0, 1).expand_as(ratio), rtol=1e-4):
                    return place, copies
        return None

    def _after(self, user: Node, node: Node, axis: int) -> int | None:
        """The axis of the channels after an operation that leaves them as they were, once; else None."""
        place, copies = self._carried(user, node, axis) or (None, 1)
        return place if copies == 1 else None

    def _numbers(self, channels: int, dims: int, copies: int = 1) -> Tensor:
        """1 to C, `copies` times, (copies C, 1, ...) of so many dimensions."""
        numbers = torch.arange(1.0, channels + 1, device=self.device)
        return numbers.repeat(copies).view(-1, *[1] * (dims - 1))

    def _require_own(self, stream: Stream) -> None:
        """Raise LeftOut where nothing is to be won, or a parameter to be changed is read by something else, too."""
        if not stream.norms or not stream.writers:
            raise LeftOut("no linear reads its norm, or none writes it")
        layers = [*stream.writers, *(reader.node for reader in stream.readers)]
        owned: list[Any] = [argument for layer in layers for argument in layer.args[1:3]]
        owned += [argument for norm in stream.norms for argument in norm.args[2:4]]
        owned += [scale_of(product, writer) for product, writer in stream.scales.items()]
        for parameter in dict.fromkeys(owned):
            if parameter is not None and (not isinstance(parameter, Node) or parameter.op != "get_attr"):
                raise LeftOut("a weight of it is computed")
            if parameter is not None and len(self.readers_of[str(parameter.target)]) > 1:
                raise LeftOut(f"{parameter.target} is read by something else, too")
        for source in (source for node in stream.merged for source in node.all_input_nodes):
            if source not in stream.places:
                raise LeftOut(f"{_where(source)} is put beside it")
        for constant in stream.constants:
            if self.readers_of[str(constant.target)] - set(stream.places):
                raise LeftOut(f"{constant.target} is read by something else, too")


def scale_of(product: Node, writer: Node) -> Node:
    """The LayerScale in its product with what it scales."""
    return next(source for source in product.all_input_nodes if source is not writer)


def _cat_axis(node: Node, dims: int) -> int:
    given: Any = node.args[1] if len(node.args) > 1 else 0
    return int(given) % dims


def _where(node: Node) -> str:
    """A node in words, for a reason."""
    operation = str(node.target).removeprefix("aten.").partition(".")[0]
    return f"{operation} in {module_path(node) or 'the network'}"
