"""Attention as one operation of ONNX where its products are float: ONNX Runtime then moves heads while it multiplies.

The pattern is what every vision transformer has after its three linears: queries, keys and values are split into
heads, queries @ keys, softmax, @ values, heads joined. One with quantizers in between, or whose logits something else
reads (ReViT carries them on), stays as it is. The bias of the keys is left out: it adds the same number to every
logit of a query, which the softmax takes away again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from leanvit.export.onnx.graph_view import GraphView, attribute, rewrite

OPSET = 23
"""The first with Attention; every other operation of ours is that of opset 21."""

SPLIT = [0, 2, 1, 3]
"""(B, N, heads, depth) to (B, heads, N, depth), and back."""

SPLIT_TRANSPOSED = [0, 2, 3, 1]
"""(B, N, heads, depth) to (B, heads, depth, N)."""


@dataclass(frozen=True)
class _Heads:
    """A value of shape (B, N, heads * depth), or one that such a reshape returns, that is split into heads."""

    value: str
    tokens: int
    heads: int
    depth: int


@dataclass(frozen=True)
class _Attention:
    """What one fused operation reads, and the reshape whose output it returns: the one that joins heads."""

    queries: _Heads
    keys: _Heads
    values: _Heads
    mask: str
    scale: float
    end: Any


def fuse_attention(proto: Any) -> Any:
    """Make an onnx.ModelProto of opset 21 one of opset 23, its float attention the operation Attention, in place.

    Values that no operation reads any more are dropped with what made them. Returns the model.
    """
    graph = _Graph(proto.graph)
    found = [match for node in proto.graph.node if node.op_type == "Softmax" if (match := graph.attention(node))]
    rewrite(proto.graph, {match.end.output[0]: _written(match, graph) for match in found})
    next(entry for entry in proto.opset_import if not entry.domain).version = OPSET
    return proto


class _Graph(GraphView):
    """Finds attention."""

    def attention(self, softmax: Any) -> _Attention | None:
        """The attention around a softmax; None where it is no such pattern."""
        logits, mask = self._without_mask(softmax.input[0])
        logits, scale = self._without_scale(logits)
        scores, mixed = self.made(logits, "MatMul"), self.only_reader(softmax.output[0], "MatMul")
        if attribute(softmax, "axis", -1) not in (-1, 3) or scores is None or mixed is None:
            return None
        queries, of_queries = self._without_scale(scores.input[0])
        keys, of_keys = self._without_scale(scores.input[1])
        q, k, v = self._heads(queries, SPLIT), self._heads(keys, SPLIT_TRANSPOSED), self._heads(mixed.input[1], SPLIT)
        moved = self.only_reader(mixed.output[0], "Transpose")
        end = self.only_reader(moved.output[0], "Reshape") if moved is not None else None
        if q is None or k is None or v is None or not q.heads == k.heads == v.heads:
            return None
        if end is None or attribute(moved, "perm") != SPLIT or not np.all(self.constants.get(end.input[1], 0)):
            return None
        if mask and self.shapes[mask][-2:] != (q.tokens, k.tokens):
            return None
        return _Attention(q, self._without_bias(k), v, mask, scale * of_queries * of_keys, end)

    def _without_bias(self, keys: _Heads) -> _Heads:
        """Keys before one constant a channel is added to them."""
        added = self.made(keys.value, "Add")
        for one, other in () if added is None else (added.input, added.input[::-1]):
            if other in self.constants and self.shapes[other] == (keys.heads * keys.depth,):
                return replace(keys, value=one)
        return keys

    def _without_mask(self, logits: str) -> tuple[str, str]:
        """Logits before a sum, and what is added to them; '' where nothing is."""
        added = self.made(logits, "Add")
        for one, other in () if added is None else (added.input, added.input[::-1]):
            if self.made(self._without_scale(one)[0], "MatMul") and 2 <= len(self.shapes.get(other, ())) <= 4:
                return one, other
        return logits, ""

    def _without_scale(self, name: str) -> tuple[str, float]:
        """A value before it is multiplied with or divided by one number, and the factor."""
        node = self.made(name, "Mul") or self.made(name, "Div")
        number = self.constants.get(node.input[1]) if node is not None else None
        if node is None or number is None or number.ndim:
            return name, 1.0
        return node.input[0], float(number) if node.op_type == "Mul" else 1 / float(number)

    def _heads(self, name: str, perm: list[int]) -> _Heads | None:
        moved = self.maker_of(name, "Transpose")
        if moved is None or attribute(moved, "perm") != perm:
            return None
        shaped = self.maker_of(moved.input[0], "Reshape")
        target = self.constants.get(shaped.input[1]) if shaped is not None else None
        if shaped is None or target is None or target.size != 4 or np.any(target[1:] < 1):
            return None
        return _Heads(shaped.input[0], *(int(size) for size in target[1:]))


def _written(match: _Attention, graph: _Graph) -> list[Any]:
    """The operation, with reshapes where the values before or after it have other dimensions."""
    from onnx import helper

    nodes: list[Any] = []
    inputs = []
    result = match.end.output[0]
    for name, part in (("queries", match.queries), ("keys", match.keys), ("values", match.values)):
        shape = (part.tokens, part.heads * part.depth)
        source = part.value
        if graph.shapes.get(source, ())[1:] != shape:
            source = f"{result}_{name}"
            nodes.append(helper.make_node("Reshape", [part.value, _shape(graph.graph, [-1, *shape])], [source]))
        inputs.append(source)
    whole = [-1, match.queries.tokens, match.values.heads * match.values.depth]
    behind = graph.constants[match.end.input[1]].tolist() != whole
    output = f"{result}_joined" if behind else result
    options = {"q_num_heads": match.queries.heads, "kv_num_heads": match.keys.heads, "scale": match.scale}
    nodes.append(helper.make_node("Attention", [*inputs, *filter(None, [match.mask])], [output], **options))
    if behind:
        nodes.append(helper.make_node("Reshape", [output, match.end.input[1]], [result]))
    return nodes


def _shape(graph: Any, sizes: list[int]) -> str:
    """Name of a constant with these sizes."""
    from onnx import numpy_helper

    name = "shape_" + "_".join(str(size) for size in sizes)
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array(sizes, np.int64), name))
    return name
