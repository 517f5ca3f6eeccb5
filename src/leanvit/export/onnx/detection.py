"""One ONNX graph of a detector: its lowered networks, joined by what torchvision computes between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from leanvit.errors import ExportError, require
from leanvit.export.onnx.steps import PART, Steps
from leanvit.export.onnx.storage import opset_of, short_names, without_metadata
from leanvit.tasks.detect import BOX, LEVELS, MASK, MASK_SIDE, PART_OUTPUTS, PYRAMID, Detector
from leanvit.tasks.features import STRIDES

if TYPE_CHECKING:
    import onnx_ir as ir

IMAGES = "images"
CELLS = "cells"
SMALLEST_DETECTION = 1e-2
"""Side in pixels below which RoIHeads.postprocess_detections removes a box; a literal there."""

OPSET = 21
"""Of the functions in leanvit.export.onnx.detection_glue: ONNX Runtime has no RoIAlign of a later one."""


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
    require("onnxscript")
    _check_parts(parts, detector, size)
    renamed = {
        name: onnx.compose.add_prefix(part, f"{name}.", rename_inputs=name != PYRAMID) for name, part in parts.items()
    }
    ir_version = max(part.ir_version for part in renamed.values())
    anchors = _anchors(detector, size)
    glue = _between(renamed, detector, size, anchors).written(ir_version)
    nodes = [renamed[node.op_type].graph.node if node.domain == PART else [node] for node in glue.node]
    graph = onnx.helper.make_graph(
        [node for group in nodes for node in group],
        "detector",
        [onnx.helper.make_tensor_value_info(IMAGES, onnx.TensorProto.UINT8, ["batch", *size, 3])],
        _outputs(onnx, detector, sum(map(len, anchors))),
        [*(tensor for part in renamed.values() for tensor in part.graph.initializer), *glue.initializer],
    )
    opsets = {opset.domain: opset.version for part in renamed.values() for opset in part.opset_import}
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid(domain, version) for domain, version in opsets.items()],
        functions=[function for part in renamed.values() for function in part.functions],
        ir_version=ir_version,
        producer_name="leanvit",
    )
    without_metadata(model)
    return model if any(node.name for part in parts.values() for node in part.graph.node) else short_names(model)


@dataclass(frozen=True)
class _Decoding:
    """torchvision's BoxCoder and what is checked after it, as functions of detection_glue read them.

    weights: of the deltas x, y, w, h. corner: width, height, width, height of the input in pixels. limits: of the
    logarithm of a side's growth, of a side in pixels from below, of the IoU from above.
    """

    weights: ir.Value
    corner: ir.Value
    limits: dict[str, float]


@dataclass(frozen=True)
class _Places:
    """`count` places for each image: boxes (B, count, 4) in pixels, used (B, count) bool where there is one."""

    boxes: ir.Value
    used: ir.Value
    count: int


def _between(parts: dict[str, Any], detector: Detector, size: tuple[int, int], anchors: list[NDArray[Any]]) -> Steps:
    """GeneralizedRCNN.forward: pyramid, proposals, box part, detections, mask part."""
    import onnx_ir as ir

    from leanvit.export.onnx import detection_glue

    network = detector.network
    images = ir.val(IMAGES, ir.DataType.UINT8, ["batch", *size, 3])
    steps = Steps(ir.Graph([images], [], nodes=[], opset_imports={"": OPSET}, name="detector"), parts)
    values = steps.part(PYRAMID, images)
    maps, objectness, deltas = ([values[f"{n}_{level}"] for level in LEVELS] for n in ("map", "objectness", "deltas"))
    logits = [
        steps.call(f"proposals.{level}", detection_glue.flat_objectness, value, returns="logits")
        for level, value in zip(LEVELS, objectness, strict=True)
    ]
    places = _propose(steps, detector, size, list(zip(logits, deltas, anchors, strict=True)))
    cells, order = _pool(steps, BOX, maps, places, network.roi_heads.box_roi_pool)
    found, scores, labels = _detect(steps, steps.part(BOX, cells), order, places, detector, size)
    outputs = {"boxes": found.boxes, "scores": scores, "labels": labels}
    if detector.config.masks:
        cells, order = _pool(steps, MASK, maps, found, network.roi_heads.mask_roi_pool)
        (chosen,) = steps.part(MASK, cells).values()
        outputs["masks"] = steps.call(
            "masks", detection_glue.masks_of, chosen, order, labels, found.used, returns="masks"
        )
    outputs["objectness"] = steps.op("proposals", "Concat", *logits, axis=1, returns="logits")
    for name, value in outputs.items():
        value.name = name
        steps.graph.outputs.append(value)
    return steps


def _propose(steps: Steps, detector: Detector, size: tuple[int, int], levels: Sequence[tuple[Any, ...]]) -> _Places:
    """RegionProposalNetwork.forward: the best boxes of all levels, or all candidates if there are fewer.

    levels: logits (B, h w A), deltas (B, 4 A, h, w) and anchors (h w A, 4) of each.
    """
    from leanvit.export.onnx import detection_glue

    rpn = detector.network.rpn
    decoding = _decoding(steps, "proposals", rpn.box_coder, size, rpn.min_size, rpn.nms_thresh)
    before, after = rpn._pre_nms_top_n["testing"], rpn._post_nms_top_n["testing"]
    counts = [min(before, len(anchors)) for _, _, anchors in levels]
    found = [
        steps.call(
            f"proposals.{level}", detection_glue.candidates, logits, deltas, steps.stored(f"anchors_{level}", anchors),
            decoding.weights, decoding.corner, **decoding.limits, count=count, limit=min(count, after),
            returns="boxes kept",
        )
        for level, count, (logits, deltas, anchors) in zip(LEVELS, counts, levels, strict=True)
    ]  # fmt: skip
    rows = min(after, sum(counts))
    boxes, scores = (
        steps.op("proposals", "Concat", *values, axis=1, returns=name)
        for name, values in zip(("candidates", "kept"), zip(*found, strict=True), strict=True)
    )
    best, used = steps.call("proposals", detection_glue.proposals, boxes, scores, count=rows, returns="boxes used")
    return _Places(best, used, rows)


def _pool(steps: Steps, part: str, maps: list[ir.Value], places: _Places, pooler: Any) -> tuple[ir.Value, ir.Value]:
    """MultiScaleRoIAlign of the places in use, each from its own level alone: cells (n, C, c, c) for a part.

    Returns with them the place (n,) of each: they stay in the order of levels, as what is made of them is smaller and
    cheaper to bring back.
    """
    from leanvit.export.onnx import detection_glue

    path = f"{part}.pooled"
    how = {"cells": pooler.output_size[0], "samples": pooler.sampling_ratio}
    chosen = steps.call(
        path, detection_glue.places_in_use, places.boxes, places.used, **_mapping(pooler), returns="boxes images levels"
    )
    found = [
        steps.call(
            f"{path}.{level}", detection_glue.from_level, features, *chosen, number=float(number), scale=1.0 / stride,
            **how, returns="cells order",
        )
        for number, (level, features, stride) in enumerate(zip(LEVELS, maps, STRIDES, strict=True))
    ]  # fmt: skip
    cells, order = zip(*found, strict=True)
    return (
        steps.op(path, "Concat", *cells, axis=0, returns="cells"),
        steps.op(path, "Concat", *order, axis=0, returns="order"),
    )


def _mapping(pooler: Any) -> dict[str, float]:
    """How a MultiScaleRoIAlign finds levels; its mapper is made at its first call, so it is made here again."""
    from torchvision.ops.poolers import initLevelMapper

    finest, coarsest = (int(np.log2(stride)) for stride in (STRIDES[0], STRIDES[-1]))
    mapper = initLevelMapper(finest, coarsest, pooler.canonical_scale, pooler.canonical_level)
    return {"side": float(mapper.s0), "level": float(mapper.lvl0), "eps": mapper.eps}


def _detect(
    steps: Steps,
    returned: dict[str, ir.Value],
    order: ir.Value,
    places: _Places,
    detector: Detector,
    size: tuple[int, int],
) -> tuple[_Places, ir.Value, ir.Value]:
    """RoIHeads.postprocess_detections: boxes, scores and labels of `detections` rows for each image.

    returned: by the box part, for the places in `order` (n,).
    """
    from leanvit.export.onnx import detection_glue

    heads = detector.network.roi_heads
    rows = heads.detections_per_img
    decoding = _decoding(steps, "detections", heads.box_coder, size, SMALLEST_DETECTION, heads.nms_thresh)
    classes = _classes(steps.parts[BOX])
    values = [
        steps.call(f"{BOX}.{name}", detection_glue.bring_back, returned[name], order, places.used, returns="all")
        for name in PART_OUTPUTS[BOX]
    ]
    boxes, scores = steps.call(
        "detections", detection_glue.boxes_of_classes, *values, places.boxes, places.used, decoding.weights,
        decoding.corner, **decoding.limits, threshold=heads.score_thresh, classes=classes,
        limit=min(rows, places.count), returns="boxes kept",
    )  # fmt: skip
    if (missing := rows - places.count * classes) > 0:
        pads = steps.stored("pads", np.array([0, 0, 0, missing]))
        empty = steps.stored("empty", np.array(detection_glue.EMPTY, np.float32))
        scores = steps.op("detections", "Pad", scores, pads, empty, returns="padded")
    found, best, labels, used = steps.call(
        "detections", detection_glue.best_boxes, boxes, scores, classes=classes, count=rows,
        returns="boxes scores labels used",
    )  # fmt: skip
    return _Places(found, used, rows), best, labels


def _decoding(steps: Steps, path: str, coder: Any, size: tuple[int, int], smallest: float, overlap: float) -> _Decoding:
    height, width = size
    return _Decoding(
        steps.stored(f"{path}.weights", coder.weights),
        steps.stored(f"{path}.corner", (width, height, width, height)),
        {"growth_limit": coder.bbox_xform_clip, "smallest": smallest, "overlap": overlap},
    )


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
