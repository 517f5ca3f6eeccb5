"""One ONNX graph of a detector: its lowered networks, joined by what torchvision computes between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from leanvit.errors import ExportError, require
from leanvit.export.onnx.detection_glue import (
    Decoding,
    Detections,
    Glue,
    Level,
    Pooling,
    bring_back,
    detect,
    flat_objectness,
    masks,
    pool,
    propose,
)
from leanvit.export.onnx.storage import opset_of, short_names, without_metadata
from leanvit.tasks.detect import BOX, LEVELS, MASK, PART_OUTPUTS, PYRAMID, Detector
from leanvit.tasks.features import STRIDES

IMAGES = "images"
CELLS = "cells"
MASK_SIDE = 28
SMALLEST_DETECTION = 1e-2
"""Side in pixels below which RoIHeads.postprocess_detections removes a box; a literal there."""


def assemble(parts: dict[str, Any], detector: Detector, size: tuple[int, int]) -> Any:
    """Join a detector's lowered networks into one onnx.ModelProto (of the opset of its parts, dynamic batch).

    parts: an onnx.ModelProto for each of `detector.parts()`, with the outputs of PART_OUTPUTS: "pyramid" takes
    `images` (batch, H, W, 3) uint8 and returns `map_i` (B, C, h, w), `objectness_i` (B, A, h, w) and `deltas_i`
    (B, 4 A, h, w); "box" takes `cells` (R, C, 7, 7) and returns `class_logits` (R, K + 1) and `box_deltas`
    (R, 4 (K + 1)); "mask" takes `cells` (R, C, 14, 14) and returns `mask_logits` (R, K + 1, 28, 28).
    size: (height, width) of the input in pixels. Nodes are named where those of the parts are.
    Outputs, with D of `detector.config.detections` rows: `boxes` (B, D, 4) float32 in pixels of the input, `scores`
    (B, D) float32 descending and 0 where there is no more, `labels` (B, D) int64 from 0, `masks` (B, D, 28, 28)
    float32 in 0 to 1 where there is a mask part, and `objectness` (B, N) float32: the logits of all anchors.
    Raises ExportError where a part is missing, of another opset or of another interface, MissingDependencyError
    without the onnx extra.
    """
    onnx = require("onnx")
    _check_parts(parts, detector, size)
    renamed = {
        name: onnx.compose.add_prefix(part, f"{name}.", rename_inputs=name != PYRAMID) for name, part in parts.items()
    }
    joined = _Joined(Glue(), renamed)
    anchors = _anchors(detector, size)
    _fill(joined, detector, size, anchors)
    graph = onnx.helper.make_graph(
        joined.glue.nodes,
        "detector",
        [onnx.helper.make_tensor_value_info(IMAGES, onnx.TensorProto.UINT8, ["batch", *size, 3])],
        _outputs(onnx, detector, sum(map(len, anchors))),
        [*(tensor for part in renamed.values() for tensor in part.graph.initializer), *joined.glue.constants.values()],
    )
    opsets = {opset.domain: opset.version for part in renamed.values() for opset in part.opset_import}
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        functions=[function for part in renamed.values() for function in part.functions],
        ir_version=max(part.ir_version for part in renamed.values()),
        producer_name="leanvit",
    )
    without_metadata(model)
    if not any(node.name for part in parts.values() for node in part.graph.node):
        return short_names(model)
    for node in (node for node in model.graph.node if not node.name):
        node.name = node.output[0]
    return model


@dataclass
class _Joined:
    """The graph while it is written. parts: with their values named apart."""

    glue: Glue
    parts: dict[str, Any]

    def run(self, name: str) -> list[str]:
        """Add a part's nodes; returns its outputs in the order of PART_OUTPUTS."""
        self.glue.nodes.extend(self.parts[name].graph.node)
        return [f"{name}.{output}" for output in PART_OUTPUTS[name]]


def _fill(joined: _Joined, detector: Detector, size: tuple[int, int], anchors: list[NDArray[np.float32]]) -> None:
    """GeneralizedRCNN.forward: pyramid, proposals, box part, detections, mask part."""
    glue, rpn, heads = joined.glue, detector.network.rpn, detector.network.roi_heads
    values = joined.run(PYRAMID)
    maps, objectness, deltas = (values[i : i + len(LEVELS)] for i in range(0, len(values), len(LEVELS)))
    levels = [Level(*each) for each in zip(maps, objectness, deltas, anchors, strict=True)]
    logits = [flat_objectness(glue, level) for level in levels]
    glue.op("Concat", *logits, output="objectness", axis=1)
    before, after = rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"]
    how = _decoding(rpn.box_coder, size, rpn.min_size, rpn.nms_thresh)
    places = propose(glue, levels, logits, how, before=before, after=after)
    order = pool(glue, levels, places, _pooling(heads.box_roi_pool), f"{BOX}.{CELLS}")
    classes = _classes(joined.parts[BOX])
    class_logits, box_deltas = joined.run(BOX)
    found = detect(
        glue,
        bring_back(glue, class_logits, order, places, [classes + 1]),
        bring_back(glue, box_deltas, order, places, [4 * (classes + 1)]),
        places,
        _decoding(heads.box_coder, size, SMALLEST_DETECTION, heads.nms_thresh),
        classes=classes,
        threshold=heads.score_thresh,
        detections=heads.detections_per_img,
    )
    if detector.config.masks:
        _masks(joined, levels, found, detector)


def _masks(joined: _Joined, levels: list[Level], found: Detections, detector: Detector) -> None:
    pooling = _pooling(detector.network.roi_heads.mask_roi_pool)
    order = pool(joined.glue, levels, found.flat(joined.glue), pooling, f"{MASK}.{CELLS}")
    masks(joined.glue, joined.run(MASK)[0], order, found, MASK_SIDE)


def _decoding(coder: Any, size: tuple[int, int], smallest: float, overlap: float) -> Decoding:
    return Decoding(tuple(coder.weights), coder.bbox_xform_clip, size, smallest, overlap)


def _pooling(pooler: Any) -> Pooling:
    """What a MultiScaleRoIAlign does; its mapper is made at its first call, so it is made here again."""
    from torchvision.ops.poolers import initLevelMapper

    finest, coarsest = (int(np.log2(stride)) for stride in (STRIDES[0], STRIDES[-1]))
    mapper = initLevelMapper(finest, coarsest, pooler.canonical_scale, pooler.canonical_level)
    return Pooling(pooler.output_size[0], pooler.sampling_ratio, mapper.s0, mapper.lvl0, mapper.eps)


def _anchors(detector: Detector, size: tuple[int, int]) -> list[NDArray[np.float32]]:
    """Anchors (h w A, 4) of each level, as torchvision's AnchorGenerator returns them for an image of this size."""
    height, width = size
    generator = detector.network.rpn.anchor_generator
    generator.set_cell_anchors(torch.float32, torch.device("cpu"))
    grids = [[height // stride, width // stride] for stride in STRIDES]
    steps = [[torch.tensor(stride), torch.tensor(stride)] for stride in STRIDES]
    return [anchors.numpy() for anchors in generator.grid_anchors(grids, steps)]


def _classes(box: Any) -> int:
    """Classes without the background, from what the box part returns: the detector's own may have been replaced."""
    shapes = [each.type.tensor_type.shape.dim for each in box.graph.output if each.name.endswith("class_logits")]
    classes = int(shapes[0][-1].dim_value) - 1 if shapes[0] else 0
    if classes < 1:
        raise ExportError("part box does not say how many classes it has. Lower it with a static last dimension.")
    return classes


def _outputs(onnx: Any, detector: Detector, anchors: int) -> list[Any]:
    rows = detector.config.detections
    shapes: dict[str, tuple[Any, list[int]]] = {
        "boxes": (onnx.TensorProto.FLOAT, [rows, 4]),
        "scores": (onnx.TensorProto.FLOAT, [rows]),
        "labels": (onnx.TensorProto.INT64, [rows]),
    }
    if detector.config.masks:
        shapes["masks"] = (onnx.TensorProto.FLOAT, [rows, MASK_SIDE, MASK_SIDE])
    shapes["objectness"] = (onnx.TensorProto.FLOAT, [anchors])
    return [onnx.helper.make_tensor_value_info(name, kind, ["batch", *shape]) for name, (kind, shape) in shapes.items()]


def _check_parts(parts: dict[str, Any], detector: Detector, size: tuple[int, int]) -> None:
    wanted = [name for name in PART_OUTPUTS if name != MASK or detector.config.masks]
    if sorted(parts) != sorted(wanted):
        raise ExportError(
            f"parts are {', '.join(sorted(parts)) or 'none'}, expected {', '.join(wanted)}. "
            "Lower what `detector.parts()` gives."
        )
    for name, part in parts.items():
        _check_part(name, part, opset_of(parts[PYRAMID]))
    given = tuple(dim.dim_value for dim in parts[PYRAMID].graph.input[0].type.tensor_type.shape.dim[1:3])
    if given != tuple(size):
        raise ExportError(f"part pyramid takes images of {given}, expected {tuple(size)}. Lower it at this size.")


def _check_part(name: str, part: Any, opset: int) -> None:
    if opset_of(part) != opset:
        raise ExportError(f"part {name} has opset {opset_of(part)}, expected {opset} as {PYRAMID}. Lower it with that.")
    inputs = [each.name for each in part.graph.input]
    outputs = {each.name for each in part.graph.output}
    wanted = IMAGES if name == PYRAMID else CELLS
    if inputs != [wanted] or outputs != set(PART_OUTPUTS[name]):
        raise ExportError(
            f"part {name} has inputs {inputs} and outputs {sorted(outputs)}, expected ['{wanted}'] and "
            f"{sorted(PART_OUTPUTS[name])}. Name them so when it is lowered."
        )
