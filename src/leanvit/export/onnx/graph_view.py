"""An ONNX graph as its rewrites read it: who makes a value and who reads it."""

from __future__ import annotations

from typing import Any

from leanvit.export.onnx.storage import put


class GraphView:
    """What makes and what reads each value of a graph, as it was when this was made.

    constants: {name: array}. maker: {name: node}. readers: {name: nodes}, None standing for the graph's own outputs.
    shapes: {name: sizes}, 0 where a size is not fixed; of values that the model describes.
    """

    def __init__(self, graph: Any) -> None:
        """graph: an onnx.GraphProto with all its constants as initializers."""
        from onnx import numpy_helper

        self.graph = graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.maker = {name: node for node in graph.node for name in node.output}
        self.readers: dict[str, list[Any]] = {value.name: [None] for value in graph.output}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.shapes: dict[str, tuple[int, ...]] = {
            value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input)
        } | {name: value.shape for name, value in self.constants.items()}

    def maker_of(self, name: str, op_type: str) -> Any:
        """The node that makes a value, if it is of this type; else None."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == op_type else None

    def made(self, name: str, op_type: str) -> Any:
        """The node that makes a value which is read once, if it is of this type; else None."""
        return self.maker_of(name, op_type) if len(self.readers.get(name, [])) == 1 else None

    def only_reader(self, name: str, op_type: str) -> Any:
        """The node that alone reads a value, as its first input, if it is of this type; else None."""
        readers = self.readers.get(name, [])
        node = readers[0] if len(readers) == 1 else None
        return node if node is not None and node.op_type == op_type and node.input[0] == name else None


def attribute(node: Any, name: str, default: Any = None) -> Any:
    """An attribute's value, `default` where the node has none."""
    from onnx import helper

    found = (entry for entry in node.attribute if entry.name == name)
    return next((helper.get_attribute_value(entry) for entry in found), default)


def rewrite(graph: Any, replaced: dict[str, list[Any]]) -> None:
    """Put other nodes in the place of some; those, and constants, that nothing reads any more are left out.

    replaced: {first value that a node returns: the nodes in its place}.
    """
    nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
    read = {value.name for value in graph.output}
    kept = []
    for node in reversed(nodes):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    put(graph.node, kept[::-1])
    put(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in read])
