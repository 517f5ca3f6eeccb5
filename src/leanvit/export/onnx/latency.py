"""What every product of a model costs in ONNX Runtime on this machine, in float and in 8 bits.

NetAdapt's idea (arXiv 1804.03230): a search of bit-widths by latency reads measured times of single layers. Sites
of one shape share a row, so a ViT has about eight. Each row is two small files, the site as `lower` writes it
in profile fp32 and w8a8, timed in turns at batch 1 in a process without torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit.bench import table_of_times
from leanvit.errors import require
from leanvit.export.onnx.fused_matmul import fuse_products
from leanvit.export.onnx.int8_weights import add_zero_points, name_left_out_inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

    from leanvit.quant.graph import QuantGraph, Site

OPSET = 21
IR_VERSION = 10


def measure_table(model: nn.Module, example: Tensor, *, threads: int = 0, rounds: int = 15) -> dict[str, Any]:
    """Milliseconds an image of every product of `model`, by shape: a latency table for Budget(latency_table=...).

    example: one image (1, 3, H, W) float32 of the size that counts. threads: of ONNX Runtime, 0 for all cores.
    Returns JSON values: version, machine, versions, date, threads, and sites: {key: {float_ms, int8_ms}}.
    Raises ExportError for a model that can't be traced, MissingDependencyError without the onnx extra.
    """
    onnx = require("onnx")
    require("onnx_ir")
    from leanvit.quant.costs import TABLE_VERSION, site_key
    from leanvit.quant.graph import trace

    graph = trace(model, example)
    shapes = _input_shapes(graph, example[:1])
    with tempfile.TemporaryDirectory(prefix="leanvit-table-") as folder:
        pairs: dict[str, tuple[Path, Path]] = {}
        for site in graph.sites.values():
            key = site_key(site)
            if key in pairs:
                continue
            files = (Path(folder) / f"{len(pairs)}-float.onnx", Path(folder) / f"{len(pairs)}-int8.onnx")
            for file, quantized in zip(files, (False, True), strict=True):
                onnx.save(site_model(graph, site, shapes[site.name], quantized=quantized), file)
            pairs[key] = files
        return {"version": TABLE_VERSION, **table_of_times(pairs, threads=threads, rounds=rounds)}


def _input_shapes(graph: QuantGraph, image: Tensor) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what every site reads for one image."""
    from leanvit.quant.graph import site_inputs
    from leanvit.quant.interpret import observe_nodes

    sources = {name: [node.name for node in site_inputs(graph, site)] for name, site in graph.sites.items()}
    found: dict[str, tuple[int, ...]] = {}
    wanted = {source for names in sources.values() for source in names}
    observe_nodes(graph.module, wanted, image, lambda node, value: found.__setitem__(node, tuple(value.shape)))
    return {name: [found[source] for source in names] for name, names in sources.items()}


def site_model(graph: QuantGraph, site: Site, shapes: list[tuple[int, ...]], *, quantized: bool) -> Any:
    """One site as an ONNX model (onnx.ModelProto) with float inputs and random weights.

    shapes: of what the site reads; their first dimension is left open. quantized: inputs as uint8 and the weight
    as int8 per output channel, in the form that profile w8a8 has.
    """
    import numpy as np
    import onnx_ir as ir
    from onnx import TensorProto, helper, numpy_helper

    names = ["x", "y"][: len(shapes)]
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", *s[1:]])
              for n, s in zip(names, shapes, strict=True)]  # fmt: skip
    nodes: list[Any] = []
    constants: dict[str, Any] = {"scale": np.float32(0.02), "zero_point": np.uint8(128)}
    operands = [_through_pair(nodes, name, quantized) for name in names]
    if site.weight:
        operands.append(_weight(nodes, constants, site, quantized))
    if site.kind == "conv2d":
        nodes.append(helper.make_node("Conv", operands, ["output"], **_conv_attributes(graph, site)))
    else:
        bias = site.kind == "linear"
        nodes.append(helper.make_node("MatMul", operands, ["product" if bias else "output"]))
        if bias:
            constants["bias"] = np.zeros(site.weight_shape[0], np.float32)
            nodes.append(helper.make_node("Add", ["product", "bias"], ["output"]))
    used = {name for node in nodes for name in node.input}
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items() if k in used]
    inner = [None] * 3 if site.kind == "conv2d" else [*shapes[0][1:-1], (site.weight_shape or shapes[-1][::-1])[0]]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", *inner])
    body = helper.make_graph(nodes, "site", inputs, [output], initializers)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    # As in `lower`: zero points come after, for what stays in integers and is no operation of ONNX Runtime's own.
    proto = ir.to_proto(fuse_products(ir.from_proto(model), transpose_quantized=False))
    return name_left_out_inputs(add_zero_points(proto))


def _through_pair(nodes: list[Any], name: str, quantized: bool) -> str:
    """An input, through a Q/DQ pair of uint8 where `quantized`."""
    from onnx import helper

    if not quantized:
        return name
    nodes.append(helper.make_node("QuantizeLinear", [name, "scale", "zero_point"], [f"{name}_quantized"]))
    nodes.append(helper.make_node("DequantizeLinear", [f"{name}_quantized", "scale", "zero_point"], [f"{name}_back"]))
    return f"{name}_back"


def _weight(nodes: list[Any], constants: dict[str, Any], site: Site, quantized: bool) -> str:
    """The weight of a site: of a linear as (in, out), which is the layout that runs fast."""
    import numpy as np
    from onnx import helper

    shape = site.weight_shape if site.kind == "conv2d" else site.weight_shape[::-1]
    integers = np.random.default_rng(0).integers(-127, 128, shape, dtype=np.int8)
    if not quantized:
        constants["weight"] = integers.astype(np.float32) * np.float32(0.01)
        return "weight"
    constants["weight_integers"] = integers
    constants["weight_scale"] = np.full(site.weight_shape[0], 0.01, np.float32)
    axis = 0 if site.kind == "conv2d" else 1
    nodes.append(helper.make_node("DequantizeLinear", ["weight_integers", "weight_scale"], ["weight"], axis=axis))
    return "weight"


def _conv_attributes(graph: QuantGraph, site: Site) -> dict[str, Any]:
    from leanvit.quant.graph import conv_options

    node = graph.node(site.node)
    given = node.args[4] if len(node.args) > 4 else None
    if isinstance(given, str):
        return {"auto_pad": "SAME_UPPER" if given == "same" else "VALID"}
    stride, padding, dilation, groups = conv_options(node)
    return {"strides": stride, "pads": (*padding, *padding), "dilations": dilation, "group": groups}
