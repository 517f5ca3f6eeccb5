"""Seeded bugs, each with the check that must notice it: edits of a graph, of calibration images, of bundle.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from leanvit.config import FASHION_MNIST_CLASSES, IMAGENET_MEAN, IMAGENET_STD, Preprocess
from leanvit.data.loader import to_input
from leanvit.runtime.bundle import Manifest

# ------------------------------------------------------------------------------------------ graphs


FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def initializers(proto: onnx.ModelProto, *shape: int) -> list[tuple[TensorProto, np.ndarray]]:
    """Float constants of one shape, in either precision, and copies of their values."""
    arrays = [(t, numpy_helper.to_array(t).copy()) for t in proto.graph.initializer if t.data_type in FLOATS]
    return [(t, a) for t, a in arrays if a.shape == shape]


def put(tensor: TensorProto, values: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def constant(proto: onnx.ModelProto, values: np.ndarray) -> str:
    name = f"bug_{len(proto.graph.initializer)}"
    proto.graph.initializer.append(numpy_helper.from_array(values, name))
    return name


def insert_after(proto: onnx.ModelProto, value: str, kind: str, *inputs: str, **attributes: Any) -> None:
    """Put a node between `value` and all that read it; a graph output keeps its name."""
    graph = proto.graph
    producer = next((i for i, node in enumerate(graph.node) if value in node.output), -1)
    if value in [output.name for output in graph.output]:
        graph.node[producer].output[:] = ["bug_source"]
        graph.node.append(helper.make_node(kind, ["bug_source", *inputs], [value], **attributes))
        return
    for node in graph.node:
        node.input[:] = ["bug_result" if name == value else name for name in node.input]
    graph.node.insert(producer + 1, helper.make_node(kind, [value, *inputs], ["bug_result"], **attributes))


def subtracted_mean(proto: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in proto.graph.node if node.op_type == "Sub")


def wrong_mean(proto: onnx.ModelProto) -> None:
    subtracted_mean(proto).input[1] = constant(proto, np.float32(0.5))


def wrong_std(proto: onnx.ModelProto) -> None:
    centred = subtracted_mean(proto).output[0]
    next(node for node in proto.graph.node if centred in node.input).input[1] = constant(proto, np.float32(0.5))


def bgr(proto: onnx.ModelProto) -> None:
    insert_after(proto, "images", "Gather", constant(proto, np.array([2, 1, 0], np.int64)), axis=3)


def transposed_image(proto: onnx.ModelProto) -> None:
    insert_after(proto, "images", "Transpose", perm=[0, 2, 1, 3])


def scaled_twice(proto: onnx.ModelProto) -> None:
    constants = {tensor.name for tensor in proto.graph.initializer}
    cast = next(node for node in proto.graph.node if node.op_type == "Cast" and node.input[0] not in constants)
    insert_after(proto, cast.output[0], "Div", constant(proto, np.float32(255)))


def rolled_classes(proto: onnx.ModelProto) -> None:
    insert_after(proto, "logits", "Gather", constant(proto, np.roll(np.arange(10), 1)), axis=1)


def nan_weight(proto: onnx.ModelProto) -> None:
    tensor = [t for t in proto.graph.initializer if t.data_type in FLOATS and np.prod(t.dims) >= 96][-1]
    values = numpy_helper.to_array(tensor).copy()
    values.flat[5] = np.nan
    put(tensor, values)


def swapped_q_and_k(proto: onnx.ModelProto) -> None:
    """k q^T is the transpose of q k^T."""
    attention = next(node for node in proto.graph.node if node.op_type == "Attention")
    attention.input[0], attention.input[1] = attention.input[1], attention.input[0]


def no_class_token(proto: onnx.ModelProto) -> None:
    (tensor, values), *_ = initializers(proto, 1, 1, 96)
    put(tensor, np.zeros_like(values))


def first_patch_instead_of_class_token(proto: onnx.ModelProto) -> None:
    gather = [node for node in proto.graph.node if node.op_type == "Gather"][-1]
    gather.input[1] = constant(proto, np.int64(1))


def transposed_weight(proto: onnx.ModelProto) -> None:
    tensor, values = initializers(proto, 96, 96)[0]
    put(tensor, values.T.copy())


def gelu_by_tanh(proto: onnx.ModelProto) -> None:
    for node in proto.graph.node:
        if node.op_type == "Gelu":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("approximate", "tanh"))


def tokens_count_once(proto: onnx.ModelProto) -> None:
    """A merged token weighs in attention like any other: softmax(q k) instead of softmax(q k + log size)."""
    sizes = [node.output[0] for node in proto.graph.node if node.op_type == "Log"]
    if not sizes:
        raise LookupError("no token has a size in this graph")
    for name in sizes:
        insert_after(proto, name, "Mul", constant(proto, np.float32(0)))


def softmax_inside(proto: onnx.ModelProto) -> None:
    insert_after(proto, "logits", "Softmax", axis=1)


def statistics_of_the_batch(proto: onnx.ModelProto) -> None:
    """A norm that stays in training mode: every image changes the others' logits."""
    insert_after(proto, "logits", "Sub", "bug_mean")
    proto.graph.node.insert(
        len(proto.graph.node) - 1,
        helper.make_node("ReduceMean", ["bug_source", constant(proto, np.array([0]))], ["bug_mean"], keepdims=1),
    )


def dropout_left_on(proto: onnx.ModelProto) -> None:
    ratio, training = constant(proto, np.float32(0.1)), constant(proto, np.array(True))
    normalised = [node for node in proto.graph.node if node.op_type == "LayerNormalization"][-1]
    insert_after(proto, normalised.output[0], "Dropout", ratio, training)


def fixed_batch(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def another_opset(proto: onnx.ModelProto) -> None:
    next(o for o in proto.opset_import if not o.domain).version = 24


def activation_scales(proto: onnx.ModelProto) -> dict[str, TensorProto]:
    used = {node.input[1] for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    return {t.name: t for t in proto.graph.initializer if t.name in used}


def stale_scales(proto: onnx.ModelProto) -> None:
    """Those of a calibration on images of less contrast."""
    for tensor in activation_scales(proto).values():
        put(tensor, numpy_helper.to_array(tensor) * np.float32(0.6))


def one_stale_scale(proto: onnx.ModelProto) -> None:
    tensor = list(activation_scales(proto).values())[2]
    put(tensor, numpy_helper.to_array(tensor) * np.float32(0.6))


def one_scale_for_all_channels(proto: onnx.ModelProto) -> None:
    """Vectors are stored as one, which a Split cuts apart."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    split = next(node for node in proto.graph.node if node.op_type == "Split" and node.input[1] in constants)
    cast = next(node for node in proto.graph.node if split.input[0] in node.output)
    values = numpy_helper.to_array(constants[cast.input[0]]).copy()
    sizes = numpy_helper.to_array(constants[split.input[1]])
    scales = {node.input[3] for node in proto.graph.node if node.op_type == "MatMulIntegerToFloat"}
    index = next(i for i, name in enumerate(split.output) if name in scales and sizes[i] == 192)
    part = slice(sum(sizes[:index]), sum(sizes[: index + 1]))
    values[part] = values[part].mean()
    put(constants[cast.input[0]], values)


GOLDEN = "golden images at batch 1"
EXPORTER_BUGS: list[tuple[Callable[[onnx.ModelProto], None], str, str]] = [
    *((bug, kind, GOLDEN) for bug in (wrong_mean, wrong_std, bgr, scaled_twice) for kind in ("float", "w8a8")),
    *((bug, kind, GOLDEN) for bug in (transposed_image, rolled_classes, softmax_inside) for kind in ("float", "w8a8")),
    *(
        (bug, kind, GOLDEN)
        for bug in (no_class_token, first_patch_instead_of_class_token)
        for kind in ("float", "w8a8")
    ),
    *((swapped_q_and_k, kind, GOLDEN) for kind in ("float", "w8a8")),
    *((bug, "float", GOLDEN) for bug in (transposed_weight, gelu_by_tanh, statistics_of_the_batch)),
    *((bug, "w8a8", GOLDEN) for bug in (stale_scales, one_stale_scale, one_scale_for_all_channels)),
    (nan_weight, "float", "finite weights"),
    (nan_weight, "w8a8", "finite weights"),
    (dropout_left_on, "float", "deterministic"),
    (fixed_batch, "float", "input"),
    (another_opset, "float", "opset"),
]


# ------------------------------------------------------------------------------------------ calibration images


def normalised_otherwise(pixels: torch.Tensor, **changes: Any) -> torch.Tensor:
    return to_input(pixels, Preprocess(input_size=(28, 28), **changes))


def one_pixel_far_out(pixels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[17, 1, 9, 9] = 40.0
    return x


def noise(pixels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def noise_of_grey_levels(pixels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return normalised_otherwise(torch.from_numpy(np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)))


CALIBRATION_BUGS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "one pixel at 40": (one_pixel_far_out, "calibration range"),
    "noise": (noise, "calibration content"),
    "noise of 8 bits": (noise_of_grey_levels, "calibration content"),
    "a fifth noise": (lambda p, x: torch.cat([noise(p, x)[:13], x[13:]]), "calibration content"),
    "scaled twice": (lambda p, x: normalised_otherwise(p.float() / 255), "calibration range"),
    "not normalised": (lambda p, x: p.permute(0, 3, 1, 2).float() / 255, "calibration normalisation"),
    "mean and std 0.5": (
        lambda p, x: normalised_otherwise(p, mean=(0.5,) * 3, std=(0.5,) * 3), "calibration normalisation",
    ),
    "statistics in BGR order": (
        lambda p, x: normalised_otherwise(p, mean=IMAGENET_MEAN[::-1], std=IMAGENET_STD[::-1]),
        "calibration normalisation",
    ),
    "blank": (lambda p, x: normalised_otherwise(torch.zeros_like(p)), "calibration range"),
    "four images": (lambda p, x: x[:4], "calibration images"),
    "one image again and again": (lambda p, x: x[:1].repeat(64, 1, 1, 1), "calibration images"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------ manifests


MANIFEST_BUGS: dict[str, tuple[Callable[[Manifest], Manifest], str]] = {
    "mean": (lambda m: preprocessed(m, mean=(0.5,) * 3), "preprocessing"),
    "std": (lambda m: preprocessed(m, std=(0.5,) * 3), "preprocessing"),
    "filter": (lambda m: preprocessed(m, interpolation="bilinear"), "prepared pixels"),
    "sharper filter": (lambda m: preprocessed(m, interpolation="lanczos"), "prepared pixels"),
    "squashed": (lambda m: preprocessed(m, crop_mode="squash"), "prepared pixels"),
    "crop": (lambda m: preprocessed(m, crop_pct=0.875), "prepared pixels"),
    "size": (lambda m: preprocessed(m, input_size=(32, 32)), "prepared pixels"),
    "labels sorted": (lambda m: dataclasses.replace(m, labels=m.labels[::-1]), "label order"),
    "labels lost": (lambda m: dataclasses.replace(m, labels=m.labels[:9]), "golden file"),
    "labels of another data set": (lambda m: dataclasses.replace(m, labels=FASHION_MNIST_CLASSES), "label order"),
    "channels": (lambda m: dataclasses.replace(m, input={**m.input, "channels": "BGR"}), "input"),
    "layout": (lambda m: dataclasses.replace(m, input={**m.input, "layout": "NCHW"}), "input"),
    "opset": (lambda m: dataclasses.replace(m, opset=17), "opset"),
}


def preprocessed(manifest: Manifest, **changes: Any) -> Manifest:
    return dataclasses.replace(manifest, preprocess=dataclasses.replace(manifest.preprocess, **changes))


# ------------------------------------------------------------------------------------------ files


def changed(data: bytes, generator: np.random.Generator) -> bytes:
    """One byte at a random place flipped in one bit, replaced, inserted or deleted, or all that follows cut off."""
    kind, at = generator.choice(["flip", "replace", "insert", "delete", "truncate"]), int(generator.integers(len(data)))
    byte = bytes([int(generator.integers(256))])
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ 1 << int(generator.integers(8))]) + data[at + 1 :]
        case "replace":
            return data[:at] + bytes([(data[at] + 1 + byte[0] % 255) % 256]) + data[at + 1 :]
        case "insert":
            return data[:at] + byte + data[at:]
        case "delete":
            return data[:at] + data[at + 1 :]
        case _:
            return data[:at]
