"""Attention as one operation of ONNX where its products are float: ONNX Runtime then moves heads while it multiplies.

The pattern is what every vision transformer has after its three linears: queries, keys and values are split into
heads, queries @ keys, softmax, @ values, heads joined. One with quantizers in between, or whose logits something else
reads (ReViT carries them on), stays as it is. The bias of the keys is left out: it adds the same number to every
logit of a query, which the softmax takes away again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from leanvit.export.onnx.matching import constant, made, maker_of, only_reader, sizes

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

OPSET = 23
"""The first with Attention; every other operation of ours is that of opset 21."""

SPLIT = [0, 2, 1, 3]
"""(B, N, heads, depth) to (B, heads, N, depth), and back."""

SPLIT_TRANSPOSED = [0, 2, 3, 1]
"""(B, N, heads, depth) to (B, heads, depth, N)."""


@dataclass(frozen=True)
class _Heads:
    """A value of shape (B, N, heads * depth), or one that such a reshape returns, that is split into heads."""

    value: ir.Value
    tokens: int
    heads: int
    depth: int


@dataclass(frozen=True)
class _Attention:
    """What one fused operation reads, and the reshape whose output it returns: the one that joins heads."""

    queries: _Heads
    keys: _Heads
    values: _Heads
    mask: ir.Value | None
    scale: float
    end: ir.Node


def fuse_attention(model: ir.Model) -> ir.Model:
    """Make a model of opset 21 one of opset 23, its float attention the operation Attention, in place.

    Values that no operation reads any more are dropped with what made them. Returns the model.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    graph = model.graph
    for match in [match for node in graph if node.op_type == "Softmax" and (match := _attention(node))]:
        _write(match, graph)
    RemoveUnusedNodesPass()(model)
    graph.opset_imports[""] = OPSET
    return model


def _attention(softmax: ir.Node) -> _Attention | None:
    """The attention around a softmax; None where it is no such pattern."""
    logits, mask = _without_mask(softmax.inputs[0])
    logits, scale = _without_scale(logits)
    scores, mixed = made(logits, "MatMul"), only_reader(softmax.outputs[0], "MatMul")
    if softmax.attributes.get_int("axis", -1) not in (-1, 3) or scores is None or mixed is None:
        return None
    queries, of_queries = _without_scale(scores.inputs[0])
    keys, of_keys = _without_scale(scores.inputs[1])
    q, k, v = _heads(queries, SPLIT), _heads(keys, SPLIT_TRANSPOSED), _heads(mixed.inputs[1], SPLIT)
    moved = only_reader(mixed.outputs[0], "Transpose")
    end = only_reader(moved.outputs[0], "Reshape") if moved is not None else None
    if q is None or k is None or v is None or not q.heads == k.heads == v.heads:
        return None
    if moved is None or end is None or _order(moved) != SPLIT or not np.all(_target(end)):
        return None
    if mask is not None and (sizes(mask) or ())[-2:] != (q.tokens, k.tokens):
        return None
    return _Attention(q, _without_bias(k), v, mask, scale * of_queries * of_keys, end)


def _order(transposition: ir.Node) -> list[int]:
    return list(transposition.attributes.get_ints("perm", ()))


def _target(reshape: ir.Node) -> NDArray[Any]:
    """The constant shape of a reshape, [0] where it is computed."""
    found = constant(reshape.inputs[1])
    return np.zeros(1, np.int64) if found is None else found


def _without_bias(keys: _Heads) -> _Heads:
    """Keys before one constant a channel is added to them."""
    added = made(keys.value, "Add")
    for one, other in () if added is None else (added.inputs, added.inputs[::-1]):
        if one is not None and constant(other) is not None and sizes(other) == (keys.heads * keys.depth,):
            return replace(keys, value=one)
    return keys


def _without_mask(logits: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """Logits before a sum, and what is added to them; None where nothing is."""
    added = made(logits, "Add")
    for one, other in () if added is None else (added.inputs, added.inputs[::-1]):
        if made(_without_scale(one)[0], "MatMul") and 2 <= len(sizes(other) or ()) <= 4:
            return one, other
    return logits, None


def _without_scale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """A value before it is multiplied with or divided by one number, and the factor."""
    node = made(value, "Mul") or made(value, "Div")
    number = constant(node.inputs[1]) if node is not None else None
    if node is None or number is None or number.ndim:
        return value, 1.0
    return node.inputs[0], float(number) if node.op_type == "Mul" else 1 / float(number)


def _heads(value: ir.Value | None, perm: list[int]) -> _Heads | None:
    moved = maker_of(value, "Transpose")
    shaped = maker_of(moved.inputs[0], "Reshape") if moved is not None and _order(moved) == perm else None
    if shaped is None or shaped.inputs[0] is None:
        return None
    target = _target(shaped)
    if target.size != 4 or np.any(target[1:] < 1):
        return None
    return _Heads(shaped.inputs[0], *(int(size) for size in target[1:]))


def _write(match: _Attention, graph: ir.Graph) -> None:
    """Put the operation in the place of the end, with reshapes where values around it have other dimensions."""
    import onnx_ir as ir

    result = match.end.outputs[0]
    nodes: list[ir.Node] = []

    def op(op_type: str, inputs: list[ir.Value | None], name: str, **options: Any) -> ir.Value:
        nodes.append(ir.node(op_type, inputs, options, outputs=[ir.Value(name=f"{result.name}{name}")]))
        return nodes[-1].outputs[0]

    inputs: list[ir.Value | None] = []
    for name, part in (("queries", match.queries), ("keys", match.keys), ("values", match.values)):
        shape = (part.tokens, part.heads * part.depth)
        source = part.value
        if (sizes(source) or ())[1:] != shape:
            source = op("Reshape", [source, _shape(graph, [-1, *shape])], f"_{name}")
        inputs.append(source)
    whole = [-1, match.queries.tokens, match.values.heads * match.values.depth]
    inputs += [match.mask] if match.mask is not None else []
    options = {"kv_num_heads": match.keys.heads, "q_num_heads": match.queries.heads, "scale": match.scale}
    joined = op("Attention", inputs, "_joined", **options)
    if _target(match.end).tolist() != whole:
        joined = op("Reshape", [joined, match.end.inputs[1]], "_end")
    ir.convenience.replace_nodes_and_values(graph, match.end, [match.end], nodes, [result], [joined])


def _shape(graph: ir.Graph, wanted: list[int]) -> ir.Value:
    """A constant with these sizes."""
    import onnx_ir as ir

    name = "shape_" + "_".join(str(size) for size in wanted)
    if name not in graph.initializers:
        stored = ir.tensor(np.array(wanted, np.int64), name=name)
        graph.register_initializer(ir.val(name, const_value=stored))
    return graph.initializers[name]
