"""The table of operations says what they do: every row is tried on numbers."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from leanvit.quant import ops
from leanvit.quant.ops import TABLE, Effect, Operation, aten

X = torch.arange(1.0, 25.0).reshape(2, 3, 4) - 6.5
"""24 different values, none of them 0."""

# What follows the first operand.
ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    aten.dropout.default: (0.5, False),
    aten.feature_dropout.default: (0.5, False),
    aten.view.default: ([6, 4],),
    aten._unsafe_view.default: ([6, 4],),
    aten.reshape.default: ([4, 6],),
    aten.flatten.using_ints: (1,),
    aten.unsqueeze.default: (0,),
    aten.squeeze.dim: (0,),
    aten.permute.default: ([2, 0, 1],),
    aten.transpose.int: (1, 2),
    aten.roll.default: ([1], [1]),
    aten.slice.Tensor: (2, 1, 3),
    aten.select.int: (1, 2),
    aten.split.Tensor: (1, 1),
    aten.split_with_sizes.default: ([1, 2], 1),
    aten.unbind.int: (1,),
    aten.chunk.default: (2, 2),
    aten.expand.default: ([5, 2, 3, 4],),
    aten.to.dtype: (torch.float64,),
    aten.to.dtype_layout: (),
    aten.type_as.default: (torch.ones((), dtype=torch.float64),),
    aten.pad.default: ([1, 2],),
    aten.mean.dim: ([2],),
    aten.max_pool2d.default: ([2],),
    aten.sum.dim_IntList: ([2],),
    aten.mul.Tensor: (torch.full((), 3.0),),
    aten.div.Tensor: (torch.full((), 3.0),),
    aten.add.Tensor: (torch.full((), 3.0),),
    aten.sub.Tensor: (torch.full((), 3.0),),
    aten.lerp.Tensor: (torch.zeros(()), torch.full((), 0.5)),
    aten.lerp.Scalar: (torch.zeros(()), 0.5),
    aten.addcmul.default: (torch.ones(()), torch.ones(())),
    aten.masked_fill.Scalar: (X > 5, 0.0),
}
MOVED = (Effect.NOTHING, Effect.MOVE, Effect.CAST)
VALUE_BY_VALUE = (Effect.SCALE, Effect.SHIFT, Effect.BLEND, Effect.MASK, Effect.CLIP, Effect.ACTIVATION)
TRIED = (*MOVED, *VALUE_BY_VALUE, Effect.PICK, Effect.REPEAT, Effect.PAD, Effect.MEAN, Effect.SPLIT, Effect.STACK)


def apply(row: Operation, x: Tensor) -> list[Tensor]:
    """The operation's outputs on x."""
    if row.target is operator.getitem:
        return [operator.getitem(x.unbind(0), i) for i in (0, 1)]
    if row.effect is Effect.STACK:
        return [row.target([x, x])]
    keywords = {"dtype": torch.float64} if row.target in (aten._to_copy.default, aten.to.dtype_layout) else {}
    found = row.target(x, *ARGUMENTS.get(row.target, ()), **keywords)
    return list(found) if isinstance(found, list | tuple) else [found]


def counts(*tensors: Tensor) -> Counter[float]:
    return Counter(value for tensor in tensors for value in tensor.double().flatten().tolist())


@pytest.mark.parametrize("row", [r for r in TABLE if r.effect in TRIED], ids=lambda r: str(r.target))
def test_a_row_says_what_its_operation_does_to_values(row: Operation) -> None:
    found, given = apply(row, X.clone()), counts(X)
    if row.effect in (*MOVED, Effect.SPLIT):
        assert counts(*found) == given
        assert (len(found) > 1) == (row.effect is Effect.SPLIT)
    elif row.effect in (Effect.PICK, Effect.CLIP):
        new = counts(*found) - given
        assert set(new) <= ({-1.0, 0.0, 1.0} if row.effect is Effect.CLIP else set())
        assert not new or row.target is not aten.max_pool2d.default
        assert found[0].numel() < X.numel() or row.effect is Effect.CLIP
    elif row.effect in (Effect.REPEAT, Effect.STACK):
        assert set(counts(*found)) == set(given)
        assert found[0].numel() > X.numel()
    elif row.effect is Effect.PAD:
        assert set(counts(*found) - given) == {0.0}
        assert not given - counts(*found)
    elif row.effect is Effect.MEAN:
        assert X.min() < found[0].min()
        assert found[0].max() < X.max()
    else:
        assert found[0].shape == X.shape
        assert counts(*found) != given


@pytest.mark.parametrize("row", [r for r in TABLE if r.effect in TRIED], ids=lambda r: str(r.target))
def test_in_order_means_that_one_value_changes_at_its_own_place(row: Operation) -> None:
    x, index = X.clone(), 17
    before = torch.cat([part.double().flatten() for part in apply(row, x)])
    x.view(-1)[index] += 0.25
    after = torch.cat([part.double().flatten() for part in apply(row, x)])
    changed = (before != after).nonzero().flatten() % X.numel()
    if row.in_order and row.effect not in (Effect.MASK, Effect.CLIP):
        assert set(changed.tolist()) == {index}
    elif row.in_order:
        assert set(changed.tolist()) <= {index}
    elif row.effect is Effect.MOVE:
        assert set(changed.tolist()) != {index}


@pytest.mark.parametrize("row", [r for r in TABLE if r.effect in TRIED], ids=lambda r: str(r.target))
def test_views_share_memory_and_only_they_always_do(row: Operation) -> None:
    x = X.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # not contiguous: reshape and flatten have to copy
    found = apply(row, x)
    shares = all(part.untyped_storage().data_ptr() == x.untyped_storage().data_ptr() for part in found)
    if row.view:
        assert shares
    elif row.effect not in (Effect.NOTHING, Effect.CAST) and row.target is not aten._unsafe_view.default:
        assert not shares


def test_every_operation_has_one_row() -> None:
    targets = [row.target for row in TABLE]
    assert len(set(targets)) == len(targets)


def test_moves_are_only_moves() -> None:
    """mean, pad and stack are no reshapes: they stand in no set of operations that change no value."""
    for target in (aten.mean.dim, aten.pad.default, aten.stack.default, aten.select.int, aten.expand.default):
        assert target not in ops.MOVES
        assert target in ops.CARRIES
