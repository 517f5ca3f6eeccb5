"""torch.onnx traces a program a second time to decompose its operations, half of the time of an export. A network that
was traced for quantization mostly has none that would be decomposed, and the file comes out the same without it.
It also reads its translations of all operations again at every export, a tenth of the time: once a process is enough.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

aten = torch.ops.aten

KEPT = frozenset(
    {
        aten._assert_tensor_metadata.default, aten.add.Tensor, aten.addcmul.default, aten.cat.default,
        aten.contiguous.default, aten.conv2d.default, aten.div.Tensor, aten.expand.default, aten.gelu.default,
        aten.index.Tensor, aten.layer_norm.default, aten.linear.default, aten.matmul.default, aten.mean.dim,
        aten.mul.Tensor, aten.permute.default, aten.reshape.default, aten.roll.default, aten.select.int,
        aten.silu.default, aten.slice.Tensor, aten.softmax.int, aten.sub.Tensor, aten.sym_size.int,
        aten.transpose.int, aten.unsqueeze.default, aten.view.default, operator.mul,
    }
)  # fmt: skip
"""Operations that torch.onnx translates as they are, or as the same shape operations that it makes of them."""


SAME_FILES = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 14)
"""PyTorch 2.12 writes another file without its second tracing."""


@contextlib.contextmanager
def without_needless_decompositions() -> Iterator[None]:
    """While it lasts, programs of which decomposition would change nothing that a file says are not decomposed."""
    usual = ExportedProgram.run_decompositions

    def run(program: ExportedProgram, *arguments: Any, **keywords: Any) -> ExportedProgram:
        needless = SAME_FILES and _decomposed_by_hand(program)
        return program if needless else usual(program, *arguments, **keywords)

    ExportedProgram.run_decompositions = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = usual  # type: ignore[method-assign]


@contextlib.contextmanager
def with_one_table() -> Iterator[None]:
    """While it lasts, torch.onnx.export takes the table of translations that an earlier export of this process read."""
    # Of torch.onnx's own parts; the table changes only with `custom_translation_table`, which nobody here gives.
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    usual = vars(ONNXRegistry)["from_torchlib"]
    once = functools.partial(_read_once, ONNXRegistry.from_torchlib)
    ONNXRegistry.from_torchlib = staticmethod(once)  # type: ignore[method-assign]
    try:
        yield
    finally:
        ONNXRegistry.from_torchlib = usual  # type: ignore[method-assign]


@functools.cache
def _read_once(read: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    return read(*arguments, **keywords)


def _decomposed_by_hand(program: ExportedProgram) -> bool:
    """Whether a program is as decomposition leaves it, once casts and turned subtractions are written out, in place."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    if not all(_is_known(node) for node in nodes):
        return False
    for node in nodes:
        if node.target is aten.to.dtype:
            node.kwargs, node.args = {"dtype": node.args[1]}, node.args[:1]
            node.target = aten._to_copy.default
        elif node.target is aten.rsub.Scalar:
            node.args, node.target = (node.args[1], node.args[0]), aten.sub.Tensor
    program.graph_module.recompile()
    return True


def _is_known(node: Node) -> bool:
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and not node.kwargs and _value(node).dtype != node.args[1]
    if node.target is aten.rsub.Scalar:
        return len(node.args) == 2 and not node.kwargs
    if node.target is aten.flatten.using_ints:
        # Of a batch that is flattened as well the size is computed.
        start, end = node.args[1] if len(node.args) > 1 else 0, node.args[2] if len(node.args) > 2 else -1
        shape = _value(node).shape
        dims = range(len(shape))[int(start) : int(end) % len(shape) + 1]  # type: ignore[arg-type]
        return all(isinstance(shape[i], int) for i in dims)
    return node.target in KEPT or str(node.target).startswith("onnx_symbolic.")


def _value(node: Node) -> torch.Tensor:
    """The example value of what a node reads."""
    source = node.args[0]
    value: torch.Tensor = source.meta["val"] if isinstance(source, Node) else torch.zeros(0)
    return value
