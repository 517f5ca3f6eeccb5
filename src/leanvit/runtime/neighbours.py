"""Nearest vectors by cosine, in blocks: memory grows with the vectors, never with their square. NumPy only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.errors import NumericalError, ShapeError

Floats = NDArray[np.float32]
Places = NDArray[np.int64]

QUERY_BLOCK = 512
VECTOR_BLOCK = 4096
"""Cosines that are held at a time: 512 x 4096 float32 are 8 MB."""


def unit(vectors: NDArray[Any], where: str = "the images") -> Floats:
    """Vectors (N, D) of any length as float32 of length 1; those of length 0 stay as they are.

    where: names them in errors. Raises ShapeError for another number of dimensions, NumericalError for NaN or infinity.
    """
    if vectors.ndim != 2:
        raise ShapeError(f"embeddings have shape {vectors.shape}, expected (images, D) for {where}.")
    wide = vectors.astype(np.float64)
    if not np.isfinite(wide).all():
        raise NumericalError(
            f"embeddings of {where} are NaN or infinite, expected finite numbers. Use another "
            "checkpoint, or export again."
        )
    lengths = np.sqrt(np.square(wide).sum(1, keepdims=True))
    return (wide / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def cosines(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Cosine of each pair of rows of two arrays (N, D): (N,) float64; 0 where one of a pair has no length."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    lengths = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return (a * b).sum(1) / np.where(lengths > 0, lengths, 1)


def nearest(
    queries: NDArray[Any], vectors: NDArray[Any], count: int, *, but_itself: bool = False
) -> tuple[Places, Floats]:
    """The `count` vectors that are nearest to each query by cosine, nearest first; fewer where there are no more.

    queries: (Q, D). vectors: (N, D), which may be a memory map: a block of it is read at a time. but_itself: the
    queries are the vectors, and none is its own neighbour.
    Returns places in `vectors` (Q, count) int64 and cosines (Q, count) float32; of equal cosines the lower place comes
    first. Raises ShapeError where the lengths differ, NumericalError for NaN or infinity.
    """
    if queries.ndim != 2 or vectors.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ShapeError(f"vectors have shapes {queries.shape} and {vectors.shape}, expected (Q, D) and (N, D).")
    count = min(count, len(vectors) - int(but_itself))
    places = np.empty((len(queries), count), np.int64)
    found = np.empty((len(queries), count), np.float32)
    for start in range(0, len(queries), QUERY_BLOCK):
        block = slice(start, start + QUERY_BLOCK)
        own = np.arange(start, start + len(queries[block])) if but_itself else None
        places[block], found[block] = _nearest_of_block(unit(queries[block]), vectors, count, own)
    return places, found


def _nearest_of_block(queries: Floats, vectors: NDArray[Any], count: int, own: Places | None) -> tuple[Places, Floats]:
    """own: place of each query among the vectors, which is passed over."""
    best = np.full((len(queries), 0), -np.inf, np.float32)
    where = np.full((len(queries), 0), 0, np.int64)
    for start in range(0, len(vectors), VECTOR_BLOCK):
        block = unit(np.asarray(vectors[start : start + VECTOR_BLOCK]))
        near = queries @ block.T
        if own is not None:
            inside = (own >= start) & (own < start + len(block))
            near[inside, own[inside] - start] = -np.inf
        here = np.argpartition(-near, count, axis=1)[:, :count] if count < len(block) else _all_places(near)
        best = np.concatenate([best, np.take_along_axis(near, here, axis=1)], axis=1)
        where = np.concatenate([where, here + start], axis=1)
        order = np.lexsort((where, -best), axis=1)[:, :count]
        best, where = np.take_along_axis(best, order, axis=1), np.take_along_axis(where, order, axis=1)
    return where, best


def _all_places(near: Floats) -> Places:
    return np.broadcast_to(np.arange(near.shape[1]), near.shape)
