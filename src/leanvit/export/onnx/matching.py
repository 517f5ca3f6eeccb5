"""What a rewrite asks about a value of an ONNX graph: which node makes it, which alone reads it, what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray


def maker_of(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value, if it is of this type; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def made(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes a value which is read once, if it is of this type; else None."""
    return maker_of(value, op_type) if value is not None and _is_read_once(value) else None


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node that alone reads a value, as its first input, if it is of this type; else None."""
    if not _is_read_once(value) or not value.uses():
        return None
    (use,) = value.uses()
    return use.node if use.node.op_type == op_type and use.idx == 0 else None


def _is_read_once(value: ir.Value) -> bool:
    """Whether a value has one reader; the graph's own outputs count as such."""
    return len(value.uses()) + value.is_graph_output() == 1


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """A constant's array, None of what is computed or read."""
    stored = value.const_value if value is not None and value.is_initializer() else None
    return stored.numpy() if stored is not None else None


def sizes(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value, 0 where a size is not fixed; None where the model does not say it."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else 0 for size in value.shape)
