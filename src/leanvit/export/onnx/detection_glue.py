"""What stands between a detector's networks: proposals, pooling, detections, masks, as functions of ONNX operations.

Each follows one of torchvision 0.29 (RegionProposalNetwork, MultiScaleRoIAlign, RoIHeads at inference) with fixed rows
for each image in place of lists: a place without a box has the score EMPTY. Non-maximum suppression runs level by level
and class by class, as torchvision's own does for many boxes; the offsets that it adds to few boxes return the same
boxes, up to their rounding.

onnxscript reads these functions as operations of a graph (leanvit.export.onnx.detection puts them there); called on
NumPy arrays they compute. B is the batch, N are boxes, R places for boxes of one image; boxes are corners in pixels.
Parameters that are int or float are attributes.
"""

from __future__ import annotations

from math import log, log2
from typing import TYPE_CHECKING, Any

from onnx import TensorProto, helper
from onnxscript import BOOL, FLOAT, INT64, script
from onnxscript import opset21 as op

from leanvit.tasks.features import STRIDES

if TYPE_CHECKING:
    Floats = Any
    Ints = Any
    Bools = Any
else:
    # Of any shape: FLOAT alone would be one number.
    Floats, Ints, Bools = FLOAT[...], INT64[...], BOOL[...]

EMPTY = -1e30
"""Score of a place without a box."""

FLOOR = -1e29
"""Scores of boxes are above."""

ALL_EMPTY = helper.make_tensor("all_empty", TensorProto.FLOAT, [1], [EMPTY])
ALL_ZERO = helper.make_tensor("all_zero", TensorProto.FLOAT, [1], [0.0])
LOG_OF_2 = log(2.0)
FINEST = log2(STRIDES[0])
COARSEST = log2(STRIDES[-1])
"""Levels are counted by the logarithm of their stride, as LevelMapper does."""


@script()
def sides_of(boxes: Floats) -> Floats:
    """Width and height (..., 2) of boxes (..., 4)."""
    low, high = op.Split(boxes, axis=-1, num_outputs=2)
    return high - low


@script()
def large_enough(boxes: Floats, smallest: float) -> Bools:
    """remove_small_boxes: whether (...) both sides of boxes (..., 4) have the smallest size."""
    return op.ReduceMin(sides_of(boxes), [-1], keepdims=0) >= smallest


@script()
def decode(deltas: Floats, boxes: Floats, weights: Floats, corner: Floats, growth_limit: float) -> Floats:
    """BoxCoder.decode_single and clip_boxes_to_image: deltas (..., 4) from boxes (..., 4) to boxes in the image.

    weights: (4,) of the deltas x, y, w, h. corner: (4,) width, height, width, height of the image in pixels.
    growth_limit: of the logarithm of a side's growth.
    """
    low, high = op.Split(boxes, axis=-1, num_outputs=2)
    sides = high - low
    middle = low + sides * 0.5
    shift, growth = op.Split(deltas / weights, axis=-1, num_outputs=2)
    middle = shift * sides + middle
    sides = op.Exp(op.Min(growth, growth_limit)) * sides
    half = sides * 0.5
    found = op.Concat(middle - half, middle + half, axis=-1)
    return op.Min(op.Max(found, 0.0), corner)


@script()
def suppress(boxes: Floats, scores: Floats, overlap: float, limit: int) -> Floats:
    """torchvision.ops.nms in each group alone: scores (G, N) of boxes (G, N, 4), those of removed ones EMPTY.

    overlap: IoU above which the lower score goes. limit: most boxes that a group keeps; lower scores could not come
    into an output of so many rows.
    """
    chosen = op.NonMaxSuppression(boxes, op.Unsqueeze(scores, [1]), limit, overlap, FLOOR)
    places = op.Gather(chosen, [0, 2], axis=1)
    nothing = op.ConstantOfShape(op.Shape(scores), value=ALL_EMPTY)
    return op.ScatterND(nothing, places, op.GatherND(scores, places))


@script()
def rows_of(values: Floats, index: Ints) -> Floats:
    """values (B, N, ...) at index (B, M): (B, M, ...)."""
    return op.GatherND(values, op.Unsqueeze(index, [-1]), batch_dims=1)


@script()
def flat_objectness(objectness: Floats) -> Floats:
    """permute_and_flatten of a level's objectness logits (B, A, h, w): (B, h w A)."""
    return op.Flatten(op.Transpose(objectness, perm=[0, 2, 3, 1]), axis=1)


@script()
def candidates(
    logits: Floats,
    deltas: Floats,
    anchors: Floats,
    weights: Floats,
    corner: Floats,
    growth_limit: float,
    smallest: float,
    overlap: float,
    count: int,
    limit: int,
) -> tuple[Floats, Floats]:
    """RegionProposalNetwork.filter_proposals for one level: boxes (B, n, 4) and logits (B, n), EMPTY where removed.

    logits: (B, h w A), see `flat_objectness`. deltas: (B, 4 A, h, w). anchors: (h w A, 4). count: n, at most h w A.
    The order inside a level is that of the logits, also for torchvision, whose sigmoid keeps the order of equal ones.
    """
    best, index = op.TopK(logits, op.Reshape(count, [-1]), axis=1)
    # (B, 4 A, h, w) to (B, h w A, 4): the anchors of a pixel lie side by side.
    all_deltas = op.Reshape(op.Transpose(deltas, perm=[0, 2, 3, 1]), op.Concat([-1], op.Shape(anchors), axis=0))
    boxes = decode(
        rows_of(all_deltas, index), op.Gather(anchors, index, axis=0), weights, corner, growth_limit=growth_limit
    )
    large = op.Where(large_enough(boxes, smallest=smallest), best, EMPTY)
    return boxes, suppress(boxes, large, overlap=overlap, limit=limit)


@script()
def probability(logits: Floats) -> Floats:
    """Sigmoid, rounded as torch rounds it: levels compete by it, and large logits become equal.

    ONNX Runtime's own Sigmoid errs by up to 1.4e-7 (measured for logits of -18 to -6), too much for the small
    probabilities of most anchors.
    """
    return op.Reciprocal(op.Exp(op.Neg(op.Max(logits, -80.0))) + 1.0)


@script()
def proposals(boxes: Floats, scores: Floats, count: int) -> tuple[Floats, Bools]:
    """RegionProposalNetwork.filter_proposals for all levels: the best of boxes (B, N, 4) by scores (B, N).

    Returns boxes (B, count, 4), and whether (B, count) there is one.
    """
    competing = op.Where(scores > FLOOR, probability(scores), EMPTY)
    best, index = op.TopK(competing, op.Reshape(count, [-1]), axis=1)
    return rows_of(boxes, index), best > FLOOR


@script()
def level_of(boxes: Floats, side: float, level: float, eps: float) -> Floats:
    """LevelMapper: 0.0, 1.0, ... (N,) for boxes (N, 4).

    side: of a box in pixels that belongs to a level (2 is stride 4). eps: added before rounding down.
    """
    sides = op.Sqrt(op.ReduceProd(sides_of(boxes), [-1], keepdims=0))
    octaves = op.Log(sides / side) / LOG_OF_2
    return op.Clip(op.Floor(octaves + level + eps), FINEST, COARSEST) - FINEST


@script()
def from_level(
    features: Floats,
    boxes: Floats,
    images: Ints,
    levels: Floats,
    number: float,
    scale: float,
    cells: int,
    samples: int,
) -> tuple[Floats, Ints]:
    """RoIAlign of those boxes (N, 4) whose level (N,) is `number`, in the map (B, C, h, w) of that level.

    images: (N,) whose map. scale: pixels of the map for one of the image. cells: along a side of the output.
    samples: a cell and axis.
    Returns cells (n, C, cells, cells), and which boxes (n,) they are of.
    """
    order = op.Squeeze(op.NonZero(levels == number), [0])
    pooled = op.RoiAlign(
        features,
        op.Gather(boxes, order, axis=0),
        op.Gather(images, order, axis=0),
        mode="avg",
        output_height=cells,
        output_width=cells,
        sampling_ratio=samples,
        spatial_scale=scale,
        coordinate_transformation_mode="output_half_pixel",
    )
    return pooled, order


@script()
def places_in_use(boxes: Floats, used: Bools, side: float, level: float, eps: float) -> tuple[Floats, Ints, Floats]:
    """What `from_level` reads of all images' places: boxes (B R, 4), their images (B R,) and levels (B R,).

    boxes: (B, R, 4). used: (B, R). side, level, eps: see `level_of`. A place that is not in use has no level. There is
    always one in use, as not every kernel takes an empty batch.
    """
    flat = op.Reshape(boxes, [-1, 4])
    flat_used = op.Reshape(used, [-1])
    numbers = op.Range(0, op.Squeeze(op.Shape(flat_used), [0]), 1)
    levels = op.Where(op.Or(flat_used, numbers == 0), level_of(flat, side=side, level=level, eps=eps), -1.0)
    return flat, numbers / op.Squeeze(op.Shape(used, start=1), [0]), levels


@script()
def bring_back(values: Floats, order: Ints, used: Bools) -> Floats:
    """values (n, ...) of pooled places, each at its place: (B, R, ...), zero where there is none.

    order: (n,) the places. used: (B, R).
    """
    shape = op.Shape(values, start=1)
    nothing = op.ConstantOfShape(op.Concat(op.Shape(op.Reshape(used, [-1])), shape, axis=0), value=ALL_ZERO)
    flat = op.ScatterND(nothing, op.Unsqueeze(order, [1]), values)
    return op.Reshape(flat, op.Concat([-1], op.Shape(used, start=1), shape, axis=0))


@script()
def by_class(values: Floats) -> Floats:
    """(B, K, R, ...) as groups of one image and class: (B K, R, ...)."""
    return op.Reshape(values, op.Concat([-1], op.Shape(values, start=2), axis=0))


@script()
def boxes_of_classes(
    logits: Floats,
    deltas: Floats,
    places: Floats,
    used: Bools,
    weights: Floats,
    corner: Floats,
    growth_limit: float,
    smallest: float,
    overlap: float,
    threshold: float,
    classes: int,
    limit: int,
) -> tuple[Floats, Floats]:
    """RoIHeads.postprocess_detections up to its choice: boxes (B, R K, 4), scores (B, R K), EMPTY where removed.

    logits: (B, R, K + 1), the first of the background. deltas: (B, R, 4 (K + 1)). places: (B, R, 4). used: (B, R).
    classes: K. threshold: score below which a box goes.
    """
    end = op.Reshape(classes + 1, [1])
    scores = op.Slice(op.Softmax(logits, axis=-1), [1], end, [2])
    by_deltas = op.Reshape(deltas, op.Concat([0, 0], end, [4], axis=0))
    own_deltas = op.Slice(by_deltas, [1], end, [2])
    boxes = decode(own_deltas, op.Unsqueeze(places, [2]), weights, corner, growth_limit=growth_limit)
    good = op.And(scores > threshold, large_enough(boxes, smallest=smallest))
    good = op.And(good, op.Unsqueeze(used, [2]))
    class_scores = op.Transpose(op.Where(good, scores, EMPTY), perm=[0, 2, 1])
    kept = suppress(
        by_class(op.Transpose(boxes, perm=[0, 2, 1, 3])), by_class(class_scores), overlap=overlap, limit=limit
    )
    kept = op.Reshape(kept, op.Concat([-1], op.Shape(class_scores, start=1), axis=0))
    return op.Reshape(boxes, [0, -1, 4]), op.Flatten(op.Transpose(kept, perm=[0, 2, 1]), axis=1)


@script()
def best_boxes(boxes: Floats, scores: Floats, classes: int, count: int) -> tuple[Floats, Floats, Ints, Bools]:
    """RoIHeads.postprocess_detections, its choice: the best of boxes (B, R K, 4) by scores (B, at least count).

    classes: K. Returns boxes (B, count, 4), scores (B, count) and labels (B, count) from 0, all of them 0 where used
    (B, count) is not.
    """
    best, index = op.TopK(scores, op.Reshape(count, [-1]), axis=1)
    index = op.Min(index, op.Shape(boxes, start=1, end=2) - 1)
    used = best > FLOOR
    found = op.Where(op.Unsqueeze(used, [-1]), rows_of(boxes, index), 0.0)
    return found, op.Where(used, best, 0.0), op.Where(used, op.Mod(index, classes), 0), used


@script()
def masks_of(logits: Floats, order: Ints, labels: Ints, used: Bools) -> Floats:
    """maskrcnn_inference: masks (B, R, side, side), each its label's channel after a sigmoid, 0 where not used.

    logits: (n, K + 1, side, side) of the places in `order` (n,). labels, used: (B, R).
    """
    channel = op.Gather(op.Reshape(labels, [-1]), order, axis=0) + 1
    chosen = op.Sigmoid(op.GatherND(logits, op.Unsqueeze(channel, [1]), batch_dims=1))
    return op.Where(op.Unsqueeze(used, [2, 3]), bring_back(chosen, order, used), 0.0)
