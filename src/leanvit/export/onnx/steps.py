"""A graph that is written as calls of onnxscript functions, with networks that are lowered elsewhere between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxscript import OnnxFunction

PART = "leanvit.part"
"""Domain of the operations that stand for networks until these are put in their place."""

STEP = "leanvit.step"
"""Key of a step's path in the metadata of its operations."""

NAMES = "glue"
"""What names of values and constants begin with that are in no part."""


@dataclass(frozen=True)
class Steps:
    """A graph while it is written. parts: onnx.ModelProto by name, their outputs called `part.output`."""

    graph: ir.Graph
    parts: Mapping[str, Any]
    functions: dict[tuple[str, str, str], ir.Function] = field(default_factory=dict)

    def part(self, name: str, value: ir.Value) -> dict[str, ir.Value]:
        """Run a part on its input; returns its outputs by name, without that of the part."""
        import onnx_ir as ir

        value.name = self.parts[name].graph.input[0].name
        outputs = {out.name.removeprefix(f"{name}."): ir.from_proto(out) for out in self.parts[name].graph.output}
        for output in outputs.values():
            # How many rows there are is another number than that of images, whatever both were called when lowered.
            output.shape = None if output.shape is None else ir.Shape([f"{name}_rows", *output.shape[1:]])
        self.graph.append(ir.node(name, [value], domain=PART, outputs=list(outputs.values())))
        return outputs

    def call(
        self, path: str, function: OnnxFunction[Any, Any], *inputs: ir.Value, returns: str, **attributes: Any
    ) -> Any:
        """Run a function on values; returns its value or values.

        path: of the step, which names values. returns: names of what the function returns, with spaces in between.
        """
        for each in (function, *function.function_ir.get_called_functions().values()):
            self.functions[each.function_ir.identifier()] = each.function_ir
        own = function.function_ir
        found = self._add(path, own.name, inputs, returns.split(), attributes, own.domain)
        return found if len(found) > 1 else found[0]

    def op(self, path: str, kind: str, *inputs: ir.Value, returns: str, **attributes: Any) -> ir.Value:
        """Run one operation of ONNX that has one output."""
        return self._add(path, kind, inputs, [returns], attributes)[0]

    def stored(self, name: str, value: NDArray[Any] | Sequence[float]) -> ir.Value:
        """A constant: an array, or numbers as float32."""
        import onnx_ir as ir

        array = value if isinstance(value, np.ndarray) else np.array(value, np.float32)
        constant = ir.val(name, const_value=ir.tensor(array, name=name))
        self.graph.register_initializer(constant)
        return constant

    def _add(
        self, path: str, kind: str, inputs: Sequence[ir.Value], names: list[str], attributes: Any, domain: str = ""
    ) -> Sequence[ir.Value]:
        import onnx_ir as ir

        outputs = [ir.Value(name=f"{path}.{name}") for name in names]
        node = ir.node(kind, inputs, attributes, domain=domain, outputs=outputs, metadata_props={STEP: path})
        self.graph.append(node)
        return node.outputs

    def written(self, ir_version: int) -> Any:
        """The onnx.GraphProto: functions as their operations, equal constants and equal values once, all named.

        Operations of the domain PART are still in it.
        """
        import onnx_ir as ir
        from onnx_ir.passes import common
        from onnxscript.optimizer import fold_constants

        self.graph.opset_imports[PART] = 1
        model = ir.Model(self.graph, ir_version=ir_version, functions=list(self.functions.values()))
        common.InlinePass()(model)
        # Twice: a size is known once the shape is that was computed from constants.
        for _ in range(2):
            common.ShapeInferencePass(strict_mode=False)(model)
            fold_constants(model)
        for then in (
            common.RemoveUnusedNodesPass(),
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            common.DeduplicateInitializersPass(),
            common.CommonSubexpressionEliminationPass(),
        ):
            then(model)
        _name(model.graph)
        common.NameFixPass()(model)
        return ir.to_proto(model.graph)


def _name(graph: ir.Graph) -> None:
    """Call constants and values after their step and variable, `glue.proposals.0.sides`; others have names."""
    of_parts = [value for node in graph if node.domain == PART for value in (*node.inputs, *node.outputs)]
    kept = {*graph.outputs, *of_parts}
    for constant in list(graph.initializers.values()):
        constant.name = f"{NAMES}.{constant.name}"
    for node in graph:
        path = node.metadata_props.get(STEP, "")
        for value in node.outputs:
            if value not in kept and value.name:
                value.name = f"{NAMES}.{path}.{value.name.removeprefix(f'{path}.')}"
        node.name = node.outputs[0].name
