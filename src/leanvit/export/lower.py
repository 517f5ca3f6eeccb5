"""From a traced graph to ONNX: uint8 images in, logits out, quantizers as Q/DQ pairs that ONNX Runtime fuses.

Layout facts (measured on AVX512-VNNI): unsigned activations with signed per-channel weights are the fast
pair; a linear must be MatMul + Add with its weight stored transposed; a non-overlapping convolution (patch
embedding) is the same product after a reshape.
"""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.config import Preprocess
from leanvit.errors import ConfigError, ExportError, require
from leanvit.quant.graph import CONVOLUTIONS, LINEAR, QuantGraph, node_argument, quantizer_of
from leanvit.quant.quantizers import ActivationQuantizer, WeightQuantizer

OPSET = 21


class OnnxActivation(nn.Module):
    """An activation quantizer as QuantizeLinear and DequantizeLinear on uint8."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        """Copy the parameters of an 8-bit quantizer."""
        super().__init__()
        self.register_buffer("scale", quantizer.scale.clone())
        self.register_buffer("zero_point", quantizer.zero_point.clone())

    def forward(self, x: Tensor) -> Tensor:
        """`x` on the grid of the codes."""
        codes = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (x, self.scale, self.zero_point),
            dtype=torch.uint8,
            shape=x.shape,
            version=OPSET,
        )
        return torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (codes, self.scale, self.zero_point),
            dtype=torch.float32,
            shape=x.shape,
            version=OPSET,
        )


def _dequantize(codes: Tensor, scale: Tensor, axis: int) -> Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale),
        {"axis": axis},
        dtype=torch.float32,
        shape=codes.shape,
        version=OPSET,
    )


class OnnxLinear(nn.Module):
    """A linear whose weight is int8: x (..., in) times (in, out), scaled per output channel, plus bias."""

    codes: Tensor
    scale: Tensor

    def __init__(self, quantizer: WeightQuantizer) -> None:
        """Store the codes as (in, out); a convolution's kernel counts as `in`."""
        super().__init__()
        self.register_buffer("codes", quantizer.codes.flatten(1).t().contiguous())
        self.register_buffer("scale", quantizer.scale.clone())

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., in) to (..., out)."""
        product = torch.matmul(x, _dequantize(self.codes, self.scale, 1))
        return product if bias is None else product + bias


class OnnxPatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, as one product over flattened patches."""

    def __init__(self, quantizer: WeightQuantizer, activation: ActivationQuantizer) -> None:
        """Quantize after the reshape, so that nothing stands between the quantizer and the product."""
        super().__init__()
        self.stride = tuple(quantizer.codes.shape[2:])
        self.activation = OnnxActivation(activation)
        self.linear = OnnxLinear(quantizer)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, out, H / stride, W / stride)."""
        batch, channels, height, width = x.shape
        rows, columns = self.stride
        x = x.reshape(batch, channels, height // rows, rows, width // columns, columns)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, height // rows, width // columns, -1)
        return self.linear(self.activation(x), bias).permute(0, 3, 1, 2)


class OnnxWeight(nn.Module):
    """Any other quantized weight: int8 codes and one scale per output channel."""

    codes: Tensor
    scale: Tensor

    def __init__(self, quantizer: WeightQuantizer) -> None:
        """Copy codes and scales."""
        super().__init__()
        self.register_buffer("codes", quantizer.codes.clone())
        self.register_buffer("scale", quantizer.scale.clone())

    def forward(self) -> Tensor:
        """The dequantized weight."""
        return _dequantize(self.codes, self.scale, 0)


class ImageInput(nn.Module):
    """A network behind its normalisation: uint8 images (B, H, W, 3) in, logits out."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, preprocess: Preprocess) -> None:
        """Put `preprocess` in front of `network`."""
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(preprocess.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocess.std).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, H, W, 3) uint8. Returns logits (B, classes) float32."""
        x = images.permute(0, 3, 1, 2).float() / 255.0
        logits: Tensor = self.network((x - self.mean) / self.std)
        return logits


def lower(graph: QuantGraph, preprocess: Preprocess) -> Any:
    """Write a traced graph, quantized or not, as an ONNX model (onnx.ModelProto, opset 21, dynamic batch).

    Input `images`: (batch, H, W, 3) uint8. Output `logits`: (batch, classes) float32.
    Raises ConfigError for activations below 8 bits, ExportError that names an operation without translation,
    MissingDependencyError without the onnx extra.
    """
    require("onnxscript")
    module = GraphModule(copy.deepcopy(graph.module), copy.deepcopy(graph.module.graph)).eval().cpu()
    _lower_quantizers(module)
    network = ImageInput(module, preprocess).eval()
    example = torch.zeros(2, *preprocess.input_size, 3, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                network,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                verbose=False,
            )
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ExportError(f"torch.onnx can't translate the graph: {lines[0][:300]}. Report the operation.") from error
    if program is None:
        raise ExportError("torch.onnx gave no program. Report this with the model's name.")
    return _without_metadata(program.model_proto)


def _without_metadata(proto: Any) -> Any:
    """Drop the exporter's notes on every node: stack traces with paths of this machine, a third of the file."""
    del proto.graph.value_info[:]
    for item in (
        proto,
        proto.graph,
        *proto.graph.node,
        *proto.graph.initializer,
        *proto.graph.input,
        *proto.graph.output,
    ):
        del item.metadata_props[:]
    return proto


def _lower_quantizers(module: GraphModule) -> None:
    """Swap simulated quantizers for their ONNX forms and products for the layout that runs fast."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (LINEAR, *CONVOLUTIONS):
            continue
        quantizer = quantizer_of(module, node_argument(node, 1))
        if isinstance(quantizer, WeightQuantizer):
            _lower_site(module, node, quantizer)
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        quantizer = quantizer_of(module, node)
        if isinstance(quantizer, ActivationQuantizer):
            _require_8_bits(node.target, quantizer)
            module.set_submodule(node.target, OnnxActivation(quantizer))
        elif isinstance(quantizer, WeightQuantizer):
            module.set_submodule(node.target, OnnxWeight(quantizer))
    module.delete_all_unused_submodules()
    module.recompile()


def _lower_site(module: GraphModule, node: Node, quantizer: WeightQuantizer) -> None:
    source, bias = node_argument(node, 0), (node.args[2] if len(node.args) > 2 else None)
    activation = quantizer_of(module, source)
    name = f"{node_argument(node, 1).target}_onnx"
    if node.target is LINEAR:
        module.add_submodule(name, OnnxLinear(quantizer))
    elif isinstance(activation, ActivationQuantizer) and _is_patch_embedding(node, quantizer):
        _require_8_bits(str(source.target), activation)
        module.add_submodule(name, OnnxPatchEmbedding(quantizer, activation))
        source = node_argument(source, 0)
    else:
        return
    with module.graph.inserting_before(node):
        replacement = module.graph.call_module(name, (source, bias))
    node.replace_all_uses_with(replacement)
    module.graph.erase_node(node)


def _is_patch_embedding(node: Node, quantizer: WeightQuantizer) -> bool:
    """Whether a convolution's windows neither overlap nor leave gaps, without padding or groups."""
    options: list[Any] = [*node.args[3:], *(None,) * 4]
    stride, padding, dilation, groups = options[:4]
    kernel = list(quantizer.codes.shape[2:])
    height, width = node_argument(node, 0).meta["val"].shape[-2:]
    without_padding = padding is None or (not isinstance(padding, str) and not any(padding))
    return (
        list(stride or [1, 1]) == kernel
        and without_padding
        and set(dilation or [1]) == {1}
        and groups in (None, 1)
        and height % kernel[0] == 0
        and width % kernel[1] == 0
    )


def _require_8_bits(name: str, quantizer: ActivationQuantizer) -> None:
    if quantizer.bits != 8:
        raise ConfigError(
            f"{name}: {quantizer.bits}-bit activations have no execution profile yet (issue #5), profile w8a8 "
            "runs 8-bit ones. Quantize with --activation-bits 8; lower plans are simulated only."
        )
