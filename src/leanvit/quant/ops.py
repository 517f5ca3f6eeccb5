"""The one table of operations: what each does to values, to their order, and to memory.

Everything that walks a traced graph asks here. A row says what an operation does; the sets below the table, each with
its question, are read off the rows. An operation without a row is one that no walk may pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch

aten = torch.ops.aten

Target = Callable[..., Any]
"""What a call_function node calls: an operation of aten, or operator.getitem."""


class Effect(Enum):
    """What an operation does to the values of its first operand. Each group has one meaning."""

    NOTHING = auto()
    """The same tensor, at inference."""
    MOVE = auto()
    """Every value once, unchanged; shape, order of axes or places may differ."""
    PICK = auto()
    """Some of the values, unchanged."""
    SPLIT = auto()
    """All values, unchanged, as several tensors; or one of these."""
    REPEAT = auto()
    """Every value, unchanged, some of them several times."""
    CAST = auto()
    """Every value once, rounded to another dtype."""
    PAD = auto()
    """Every value once, unchanged, and new ones (zeros mostly) around them."""
    STACK = auto()
    """The values of several tensors, unchanged, along a new axis."""
    MEAN = auto()
    """Averages: new values, between the least and the largest of the old ones."""
    CLIP = auto()
    """Some of the values, unchanged, or a bound in place of one; monotone, so quantized integers may pass."""
    SUM = auto()
    """Sums: new values, of another range."""
    SCALE = auto()
    """Each value times or divided by another."""
    SHIFT = auto()
    """Each value plus or minus another."""
    BLEND = auto()
    """Each value and others in a weighted sum."""
    MASK = auto()
    """Each value, or a constant in its place."""
    EXPONENTIAL = auto()
    SOFTMAX = auto()
    NORM = auto()
    ACTIVATION = auto()
    """GELU and SiLU: a short negative tail and a long positive one."""
    LINEAR = auto()
    CONVOLUTION = auto()
    """Convolutions that are sites."""
    OTHER_CONVOLUTION = auto()
    """Convolutions that no quantizer supports."""
    PRODUCT = auto()
    """Products of two tensors that are sites."""
    OTHER_PRODUCT = auto()
    """Products that no quantizer supports; the report names them."""
    CHOICE = auto()
    """Which values are the largest: what follows are their places."""


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    in_order: the output holds its values in the input's row-major order: casts, reshapes, arithmetic value by value.
    view: the output always shares the input's memory, so that what overwrites one changes both.
    """

    target: Target
    effect: Effect
    in_order: bool = False
    view: bool = False


TABLE: tuple[Operation, ...] = (
    Operation(aten.dropout.default, Effect.NOTHING, in_order=True),
    Operation(aten.feature_dropout.default, Effect.NOTHING, in_order=True),
    Operation(aten.alias.default, Effect.NOTHING, in_order=True),
    Operation(aten.detach.default, Effect.NOTHING, in_order=True),
    Operation(aten.view.default, Effect.MOVE, in_order=True, view=True),
    Operation(aten._unsafe_view.default, Effect.MOVE, in_order=True),
    Operation(aten.reshape.default, Effect.MOVE, in_order=True),
    Operation(aten.flatten.using_ints, Effect.MOVE, in_order=True),
    Operation(aten.unsqueeze.default, Effect.MOVE, in_order=True, view=True),
    Operation(aten.squeeze.dim, Effect.MOVE, in_order=True, view=True),
    Operation(aten.contiguous.default, Effect.MOVE, in_order=True),
    Operation(aten.clone.default, Effect.MOVE, in_order=True),
    Operation(aten.permute.default, Effect.MOVE, view=True),
    Operation(aten.transpose.int, Effect.MOVE, view=True),
    Operation(aten.roll.default, Effect.MOVE),
    Operation(aten.slice.Tensor, Effect.PICK, view=True),
    Operation(aten.select.int, Effect.PICK, view=True),
    Operation(aten.unbind.int, Effect.SPLIT, view=True),
    Operation(aten.split.Tensor, Effect.SPLIT, view=True),
    Operation(aten.split_with_sizes.default, Effect.SPLIT, view=True),
    Operation(aten.chunk.default, Effect.SPLIT, view=True),
    Operation(operator.getitem, Effect.SPLIT, view=True),
    Operation(aten.expand.default, Effect.REPEAT, in_order=True, view=True),
    Operation(aten.to.dtype, Effect.CAST, in_order=True),
    Operation(aten.to.dtype_layout, Effect.CAST, in_order=True),
    Operation(aten._to_copy.default, Effect.CAST, in_order=True),
    Operation(aten.type_as.default, Effect.CAST, in_order=True),
    Operation(aten.pad.default, Effect.PAD),
    Operation(aten.stack.default, Effect.STACK),
    Operation(aten.mean.dim, Effect.MEAN),
    Operation(aten.relu.default, Effect.CLIP, in_order=True),
    Operation(aten.hardtanh.default, Effect.CLIP, in_order=True),
    Operation(aten.max_pool2d.default, Effect.CLIP),
    Operation(aten.sum.dim_IntList, Effect.SUM),
    Operation(aten.mul.Tensor, Effect.SCALE, in_order=True),
    Operation(aten.div.Tensor, Effect.SCALE, in_order=True),
    Operation(aten.add.Tensor, Effect.SHIFT, in_order=True),
    Operation(aten.sub.Tensor, Effect.SHIFT, in_order=True),
    Operation(aten.lerp.Tensor, Effect.BLEND, in_order=True),
    Operation(aten.lerp.Scalar, Effect.BLEND, in_order=True),
    Operation(aten.addcmul.default, Effect.BLEND, in_order=True),
    Operation(aten.masked_fill.Scalar, Effect.MASK, in_order=True),
    Operation(aten.exp.default, Effect.EXPONENTIAL, in_order=True),
    Operation(aten.softmax.int, Effect.SOFTMAX, in_order=True),
    Operation(aten._softmax.default, Effect.SOFTMAX, in_order=True),
    Operation(aten.layer_norm.default, Effect.NORM, in_order=True),
    Operation(aten.gelu.default, Effect.ACTIVATION, in_order=True),
    Operation(aten.silu.default, Effect.ACTIVATION, in_order=True),
    Operation(aten.linear.default, Effect.LINEAR),
    Operation(aten.conv2d.default, Effect.CONVOLUTION),
    Operation(aten.conv2d.padding, Effect.CONVOLUTION),
    Operation(aten.conv_transpose2d.input, Effect.OTHER_CONVOLUTION),
    Operation(aten.convolution.default, Effect.OTHER_CONVOLUTION),
    Operation(aten.matmul.default, Effect.PRODUCT),
    Operation(aten.bmm.default, Effect.PRODUCT),
    Operation(aten.einsum.default, Effect.OTHER_PRODUCT),
    Operation(aten.addmm.default, Effect.OTHER_PRODUCT),
    Operation(aten.mm.default, Effect.OTHER_PRODUCT),
    Operation(aten.conv1d.default, Effect.OTHER_PRODUCT),
    Operation(aten.max.dim, Effect.CHOICE),
    Operation(aten.topk.default, Effect.CHOICE),
)  # fmt: skip


def operations(*effects: Effect) -> tuple[Target, ...]:
    """The operations of the table that have one of these effects."""
    return tuple(row.target for row in TABLE if row.effect in effects)


LINEAR = aten.linear.default
LAYER_NORM = aten.layer_norm.default
RELU = aten.relu.default
ADD = (aten.add.Tensor,)
CONVOLUTIONS = operations(Effect.CONVOLUTION)
ANY_CONVOLUTION = operations(Effect.CONVOLUTION, Effect.OTHER_CONVOLUTION)
PRODUCTS = operations(Effect.PRODUCT)
OTHER_PRODUCTS = operations(Effect.OTHER_PRODUCT)
SOFTMAX = operations(Effect.SOFTMAX)
GELU = operations(Effect.ACTIVATION)
EXPONENTIAL = operations(Effect.EXPONENTIAL)
SUMS = operations(Effect.SUM)
CHOICES = operations(Effect.CHOICE)

IDENTITIES = operations(Effect.NOTHING)
"""What a traced graph can do without?"""

MOVES = operations(Effect.MOVE)
"""Which operations change no value, so that a quantizer may stand on either side of them?"""

SCALES = operations(Effect.SCALE)
"""What may stand between queries @ keys and the softmax of plain attention?"""

VIEWS = tuple(row.target for row in TABLE if row.view)
"""After which operations does overwriting the output change the input, too?"""

CARRIES = operations(
    Effect.MOVE, Effect.PICK, Effect.REPEAT, Effect.CAST, Effect.PAD, Effect.STACK, Effect.MEAN
)  # fmt: skip
"""After which operations are values still of the kind they were (the image, a softmax's output, the logits)?

They may be fewer, repeated, averaged, or have zeros among them: of a softmax they still lie in [0, 1].
"""

_ARITHMETIC = (Effect.SCALE, Effect.SHIFT, Effect.BLEND, Effect.MASK)
_SHAPE = (Effect.MOVE, Effect.REPEAT, Effect.CAST)

ELEMENTWISE = tuple(row.target for row in TABLE if row.effect in _ARITHMETIC or (row.effect in _SHAPE and row.in_order))
"""After which operations does each value stand where its source stood, perhaps changed? So logits come to a softmax."""

CHANNEL_PATHS = (*CARRIES, *SCALES, *operations(Effect.SPLIT))
"""Along which operations can a linear's output channels be followed? What they do to them is tried with numbers."""

KEEPS_CHANNELS = operations(Effect.MOVE, Effect.PICK)
"""Which operations may leave the channels last and all there? Their arguments decide, see `smooth`."""

KEEPS_INTEGERS = (*CARRIES, *operations(Effect.CLIP))
"""Over which operations may a runtime carry quantized integers instead of requantizing?

ONNX Runtime does over moves, picks and clips. Averages, pads and stacks count, too: a convolution that follows them in
float (squeeze and excitation) is then left in float with its source, which costs time and no accuracy.
"""
