"""What stands between a detector's networks, as standard ONNX operations: proposals, pooling, detections, masks.

Each function follows one of torchvision 0.29 (RegionProposalNetwork, MultiScaleRoIAlign, RoIHeads at inference) with
fixed rows for each image in place of lists: a place without a box has the score EMPTY. Non-maximum suppression runs
level by level and class by class, as torchvision's own does for many boxes; the offsets that it adds to few boxes
return the same boxes, up to their rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.tasks.features import STRIDES

EMPTY = -1e30
"""Score of a place without a box."""

FLOOR = -1e29
"""Scores of boxes are above."""

Value = str
"""Name of a tensor in the graph."""

Input = Value | float | list[int] | NDArray[Any]
"""A tensor of the graph, or a constant: int as int64, float as float32, both without dimensions."""


@dataclass
class Glue:
    """Nodes and constants of a graph, in the order in which they run."""

    nodes: list[Any] = field(default_factory=list)
    constants: dict[tuple[str, tuple[int, ...], bytes], Any] = field(default_factory=dict)
    values: int = 0

    def op(self, kind: str, *inputs: Input, output: Value = "", **attributes: Any) -> Value:
        """Add an operation of one output; returns its name, `output` where it is given."""
        return self._node(kind, inputs, [output or self._name()], attributes)[0]

    def pair(self, kind: str, *inputs: Input, **attributes: Any) -> tuple[Value, Value]:
        """Add an operation of two outputs."""
        first, second = self._node(kind, inputs, [self._name(), self._name()], attributes)
        return first, second

    def filled(self, shape: Value, number: float) -> Value:
        """A float32 tensor of one number. shape: name of an int64 vector."""
        from onnx import numpy_helper

        return self.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([number], np.float32)))

    def constant(self, value: float | list[int] | NDArray[Any]) -> Value:
        """Name of a constant; equal ones are stored once."""
        from onnx import numpy_helper

        whole = isinstance(value, int | list)
        array = value if isinstance(value, np.ndarray) else np.array(value, np.int64 if whole else np.float32)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"glue.{len(self.constants)}")
        return str(self.constants[key].name)

    def _name(self) -> Value:
        self.values += 1
        return f"glue.v{self.values}"

    def _node(self, kind: str, inputs: tuple[Input, ...], outputs: list[Value], attributes: Any) -> list[Value]:
        from onnx import helper

        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        self.nodes.append(helper.make_node(kind, names, outputs, **attributes))
        return outputs


@dataclass(frozen=True)
class Level:
    """One level of the pyramid: names of its map (B, C, h, w), objectness (B, A, h, w) and deltas (B, 4 A, h, w).

    anchors: (h w A, 4) float32 corners in pixels.
    """

    map: Value
    objectness: Value
    deltas: Value
    anchors: NDArray[np.float32]


@dataclass(frozen=True)
class Decoding:
    """torchvision's BoxCoder and the checks after it.

    weights: of the deltas x, y, w, h. limit: of the logarithm of a side's growth. size: (height, width) of the input
    in pixels. smallest: side in pixels below which a box is removed. overlap: IoU above which the lower score goes.
    """

    weights: tuple[float, float, float, float]
    limit: float
    size: tuple[int, int]
    smallest: float
    overlap: float


@dataclass(frozen=True)
class Pooling:
    """torchvision's MultiScaleRoIAlign and LevelMapper.

    cells: along a side of the output. samples: a cell and axis. scale, level: side in pixels that belongs to a level
    (2 is stride 4). eps: added before rounding down.
    """

    cells: int
    samples: int
    scale: float
    level: float
    eps: float


@dataclass(frozen=True)
class Boxes:
    """Names of `rows` places for each image: boxes (B rows, 4) in pixels, used (B rows,) bool where there is one."""

    boxes: Value
    used: Value
    rows: int


@dataclass(frozen=True)
class Detections:
    """Names of the final outputs: boxes (B, rows, 4) in pixels, labels (B, rows) from 0, used (B, rows) bool."""

    boxes: Value
    labels: Value
    used: Value
    rows: int

    def flat(self, glue: Glue) -> Boxes:
        """All images' boxes in one list."""
        return Boxes(glue.op("Reshape", self.boxes, [-1, 4]), glue.op("Reshape", self.used, [-1]), self.rows)


def decode(glue: Glue, deltas: Value, boxes: Value, how: Decoding) -> Value:
    """BoxCoder.decode_single and clip_boxes_to_image: deltas (..., 4) from boxes (..., 4) to boxes in the image."""
    low, high = glue.pair("Split", boxes, axis=-1, num_outputs=2)
    sides = glue.op("Sub", high, low)
    middle = glue.op("Add", low, glue.op("Mul", sides, 0.5))
    weighted = glue.op("Div", deltas, np.array(how.weights, np.float32))
    shift, growth = glue.pair("Split", weighted, axis=-1, num_outputs=2)
    middle = glue.op("Add", glue.op("Mul", shift, sides), middle)
    sides = glue.op("Mul", glue.op("Exp", glue.op("Min", growth, how.limit)), sides)
    half = glue.op("Mul", sides, 0.5)
    found = glue.op("Concat", glue.op("Sub", middle, half), glue.op("Add", middle, half), axis=-1)
    height, width = how.size
    corner = np.array([width, height, width, height], np.float32)
    return glue.op("Min", glue.op("Max", found, 0.0), corner)


def sides_of(glue: Glue, boxes: Value) -> Value:
    """Width and height (..., 2) of boxes (..., 4)."""
    low, high = glue.pair("Split", boxes, axis=-1, num_outputs=2)
    return glue.op("Sub", high, low)


def large_enough(glue: Glue, boxes: Value, how: Decoding) -> Value:
    """remove_small_boxes: whether (...) both sides of boxes (..., 4) have the smallest size."""
    side = glue.op("ReduceMin", sides_of(glue, boxes), [-1], keepdims=0)
    return glue.op("GreaterOrEqual", side, how.smallest)


def suppress(glue: Glue, boxes: Value, scores: Value, overlap: float, limit: int) -> Value:
    """torchvision.ops.nms in each group alone: boxes (G, N, 4), scores (G, N); removed ones become EMPTY.

    limit: most boxes that a group keeps; lower scores could not come into an output of so many rows.
    """
    lists = glue.op("Unsqueeze", scores, [1])
    chosen = glue.op("NonMaxSuppression", boxes, lists, limit, overlap, FLOOR)
    places = glue.op("Gather", chosen, [0, 2], axis=1)
    nothing = glue.filled(glue.op("Shape", scores), EMPTY)
    return glue.op("ScatterND", nothing, places, glue.op("GatherND", scores, places))


def rows_of(glue: Glue, values: Value, index: Value) -> Value:
    """values (B, N, ...) at index (B, M): (B, M, ...)."""
    return glue.op("GatherND", values, glue.op("Unsqueeze", index, [-1]), batch_dims=1)


def flat_objectness(glue: Glue, level: Level) -> Value:
    """permute_and_flatten of a level's objectness logits: (B, h w A)."""
    return glue.op("Reshape", glue.op("Transpose", level.objectness, perm=[0, 2, 3, 1]), [-1, len(level.anchors)])


def candidates(glue: Glue, level: Level, logits: Value, how: Decoding, before: int, after: int) -> tuple[Value, Value]:
    """RegionProposalNetwork.filter_proposals for one level: boxes (B, n, 4) and logits (B, n), EMPTY where removed.

    The order inside a level is that of the logits, also for torchvision, whose sigmoid keeps the order of equal ones.
    """
    count = min(before, len(level.anchors))
    best, index = glue.pair("TopK", logits, [count], axis=1)
    deltas = glue.op("Reshape", glue.op("Transpose", level.deltas, perm=[0, 2, 3, 1]), [-1, len(level.anchors), 4])
    anchors = glue.op("Gather", level.anchors, index, axis=0)
    boxes = decode(glue, rows_of(glue, deltas, index), anchors, how)
    best = glue.op("Where", large_enough(glue, boxes, how), best, EMPTY)
    return boxes, suppress(glue, boxes, best, how.overlap, min(count, after))


def probability(glue: Glue, logits: Value) -> Value:
    """Sigmoid, rounded as torch rounds it: levels compete by it, and large logits become equal.

    ONNX Runtime's own Sigmoid errs by up to 1.4e-7 (measured for logits of -18 to -6), too much for the small
    probabilities of most anchors.
    """
    powers = glue.op("Exp", glue.op("Neg", glue.op("Max", logits, -80.0)))
    return glue.op("Reciprocal", glue.op("Add", powers, 1.0))


def propose(glue: Glue, levels: list[Level], logits: list[Value], how: Decoding, *, before: int, after: int) -> Boxes:
    """RegionProposalNetwork.forward: the best boxes of all levels, `after` of each image or all candidates if fewer.

    logits: `flat_objectness` of each level. before: candidates of a level that are looked at.
    """
    found = [candidates(glue, level, each, how, before, after) for level, each in zip(levels, logits, strict=True)]
    rows = min(after, sum(min(before, len(level.anchors)) for level in levels))
    boxes = glue.op("Concat", *(boxes for boxes, _ in found), axis=1)
    scores = glue.op("Concat", *(scores for _, scores in found), axis=1)
    kept = glue.op("Greater", scores, FLOOR)
    best, index = glue.pair("TopK", glue.op("Where", kept, probability(glue, scores), EMPTY), [rows], axis=1)
    boxes = glue.op("Reshape", rows_of(glue, boxes, index), [-1, 4])
    return Boxes(boxes, glue.op("Reshape", glue.op("Greater", best, FLOOR), [-1]), rows)


def level_of(glue: Glue, boxes: Value, how: Pooling) -> Value:
    """LevelMapper: 0.0, 1.0, ... (R,) for boxes (R, 4)."""
    side = glue.op("Sqrt", glue.op("ReduceProd", sides_of(glue, boxes), [-1], keepdims=0))
    octaves = glue.op("Div", glue.op("Log", glue.op("Div", side, float(how.scale))), float(np.log(2)))
    level = glue.op("Floor", glue.op("Add", glue.op("Add", octaves, float(how.level)), how.eps))
    finest = float(np.log2(STRIDES[0]))
    coarsest = float(np.log2(STRIDES[-1]))
    return glue.op("Sub", glue.op("Clip", level, finest, coarsest), finest)


def pool(glue: Glue, levels: list[Level], places: Boxes, how: Pooling, output: Value) -> Value:
    """MultiScaleRoIAlign of the places in use, each from its own level alone; cells (n, C, c, c) are `output`.

    Returns the place (n,) of each of them: they stay in the order of levels, as what is made of them is smaller
    and cheaper to bring back. There is always one, as not every kernel takes an empty batch.
    """
    count = glue.op("Squeeze", glue.op("Shape", places.used), [0])
    first = glue.op("Equal", glue.op("Range", 0, count, 1), 0)
    used = glue.op("Or", places.used, first)
    index = glue.op("Where", used, level_of(glue, places.boxes, how), -1.0)
    orders, cells = [], []
    for number, (level, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        order = glue.op("Squeeze", glue.op("NonZero", glue.op("Equal", index, float(number))), [0])
        boxes = glue.op("Gather", places.boxes, order, axis=0)
        image = glue.op("Div", order, places.rows)
        options: dict[str, Any] = {"output_height": how.cells, "output_width": how.cells, "mode": "avg"}
        options |= {"sampling_ratio": how.samples, "coordinate_transformation_mode": "output_half_pixel"}
        cells.append(glue.op("RoiAlign", level.map, boxes, image, spatial_scale=1.0 / stride, **options))
        orders.append(order)
    glue.op("Concat", *cells, output=output, axis=0)
    return glue.op("Concat", *orders, axis=0)


def bring_back(glue: Glue, values: Value, order: Value, places: Boxes, shape: list[int]) -> Value:
    """values (n, *shape) of the pooled places, each at its place: (B rows, *shape), zero where there is none."""
    full = glue.op("Concat", glue.op("Shape", places.used), shape, axis=0)
    return glue.op("ScatterND", glue.filled(full, 0.0), glue.op("Unsqueeze", order, [1]), values)


def by_class(glue: Glue, values: Value, rows: int, classes: int, shape: list[int]) -> Value:
    """(B rows, classes, *shape) as groups of one image and class: (B classes, rows, *shape)."""
    grid = glue.op("Reshape", values, [-1, rows, classes, *shape])
    order = [0, 2, 1, *range(3, 3 + len(shape))]
    return glue.op("Reshape", glue.op("Transpose", grid, perm=order), [-1, rows, *shape])


def detect(
    glue: Glue,
    logits: Value,
    deltas: Value,
    places: Boxes,
    how: Decoding,
    *,
    classes: int,
    threshold: float,
    detections: int,
) -> Detections:
    """RoIHeads.postprocess_detections: outputs `boxes`, `scores`, `labels` with `detections` rows for each image.

    logits: (B rows, classes + 1). deltas: (B rows, 4 (classes + 1)).
    """
    scores = glue.op("Slice", glue.op("Softmax", logits, axis=-1), [1], [classes + 1], [1])
    deltas = glue.op("Slice", glue.op("Reshape", deltas, [-1, classes + 1, 4]), [1], [classes + 1], [1])
    boxes = decode(glue, deltas, glue.op("Unsqueeze", places.boxes, [1]), how)
    good = glue.op("And", glue.op("Greater", scores, threshold), large_enough(glue, boxes, how))
    good = glue.op("And", good, glue.op("Unsqueeze", places.used, [1]))
    scores = glue.op("Where", good, scores, EMPTY)
    kept = suppress(
        glue,
        by_class(glue, boxes, places.rows, classes, [4]),
        by_class(glue, scores, places.rows, classes, []),
        how.overlap,
        min(detections, places.rows),
    )
    kept = glue.op("Transpose", glue.op("Reshape", kept, [-1, classes, places.rows]), perm=[0, 2, 1])
    return _best(glue, boxes, kept, classes, places.rows * classes, detections)


def _best(glue: Glue, boxes: Value, kept: Value, classes: int, total: int, detections: int) -> Detections:
    """The best of `total` boxes of each image. boxes: (B rows, classes, 4). kept: scores (B, rows, classes)."""
    kept = glue.op("Reshape", kept, [-1, total])
    if total < detections:
        kept = glue.op("Pad", kept, [0, 0, 0, detections - total], EMPTY)
    best, index = glue.pair("TopK", kept, [detections], axis=1)
    index = glue.op("Min", index, total - 1)
    used = glue.op("Greater", best, FLOOR)
    found = rows_of(glue, glue.op("Reshape", boxes, [-1, total, 4]), index)
    glue.op("Where", used, best, 0.0, output="scores")
    return Detections(
        glue.op("Where", glue.op("Unsqueeze", used, [-1]), found, 0.0, output="boxes"),
        glue.op("Where", used, glue.op("Mod", index, classes), 0, output="labels"),
        used,
        detections,
    )


def masks(glue: Glue, logits: Value, order: Value, found: Detections, side: int) -> None:
    """maskrcnn_inference: output `masks` (B, rows, side, side), each its label's channel after a sigmoid.

    logits: (n, classes + 1, side, side) of the places in `order` (n,).
    """
    places = found.flat(glue)
    labels = glue.op("Gather", glue.op("Reshape", found.labels, [-1]), order, axis=0)
    channel = glue.op("Unsqueeze", glue.op("Add", labels, 1), [1])
    chosen = glue.op("Sigmoid", glue.op("GatherND", logits, channel, batch_dims=1))
    back = glue.op("Reshape", bring_back(glue, chosen, order, places, [side, side]), [-1, found.rows, side, side])
    glue.op("Where", glue.op("Unsqueeze", found.used, [2, 3]), back, 0.0, output="masks")
