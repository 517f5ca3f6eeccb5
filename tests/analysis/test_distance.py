"""Attention distance on attention whose distance is known, and against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leanvit.analysis import AttentionLayer, attention_distance, uniform_distance
from leanvit.analysis.places import Places
from leanvit.errors import ModelError

ROWS, COLUMNS, SIZE = 3, 4, (12, 32)
PITCH = (4.0, 8.0)
TOKENS = ROWS * COLUMNS


def layer_of(weights: torch.Tensor, index: torch.Tensor | None = None) -> AttentionLayer:
    places = Places(torch.arange(TOKENS)[None] if index is None else index, (ROWS, COLUMNS))
    return AttentionLayer("attn", weights, places, places)


def apart(i: int, j: int) -> float:
    """Pixels between the centres of two places."""
    rows, columns = i // COLUMNS - j // COLUMNS, i % COLUMNS - j % COLUMNS
    return math.hypot(PITCH[0] * rows, PITCH[1] * columns)


def test_a_head_that_looks_at_itself_has_distance_zero() -> None:
    weights = torch.eye(TOKENS).expand(2, 1, 3, -1, -1)
    assert torch.equal(attention_distance(layer_of(weights), SIZE), torch.zeros(2, 3))


def test_a_head_that_looks_one_place_to_the_right_has_the_pitch() -> None:
    right = [i + 1 if i % COLUMNS < COLUMNS - 1 else i - 1 for i in range(TOKENS)]
    weights = torch.eye(TOKENS)[right].expand(1, 1, 1, -1, -1)
    assert attention_distance(layer_of(weights), SIZE).item() == pytest.approx(PITCH[1])


def test_even_attention_has_the_mean_distance_of_all_pairs() -> None:
    weights = torch.full((2, 1, 1, TOKENS, TOKENS), 1 / TOKENS)
    expected = np.mean([apart(i, j) for i in range(TOKENS) for j in range(TOKENS)])
    assert attention_distance(layer_of(weights), SIZE).numpy() == pytest.approx(expected, rel=1e-5)
    assert uniform_distance(layer_of(weights), SIZE) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31 - 1))
def test_distance_is_that_of_a_loop_with_class_tokens_padding_and_windows_left_out(seed: int) -> None:
    generator = np.random.default_rng(seed)
    # Two windows of seven tokens: a class token or padding here and there, twelve places.
    index = np.full(14, -1)
    index[generator.choice(14, TOKENS, replace=False)] = generator.permutation(TOKENS)
    index = index.reshape(2, 7)
    weights = generator.dirichlet(np.full(7, 0.5), (2, 2, 3, 7))
    expected = np.zeros((2, 3))
    for image in range(2):
        for head in range(3):
            distances = []
            for group in range(2):
                keys = [k for k in range(7) if index[group, k] >= 0]
                for q in keys:
                    share = weights[image, group, head, q]
                    away = sum(share[k] * apart(index[group, q], index[group, k]) for k in keys)
                    distances.append(away / sum(share[k] for k in keys))
            expected[image, head] = np.mean(distances)
    found = attention_distance(layer_of(torch.from_numpy(weights).float(), torch.from_numpy(index)), SIZE)
    assert found.numpy() == pytest.approx(expected, rel=1e-4)


def test_even_attention_leaves_out_what_a_mask_hides() -> None:
    weights = torch.full((1, 1, 2, TOKENS, TOKENS), 1.0)
    top = torch.arange(TOKENS) < COLUMNS
    weights[..., ~(top[:, None] == top[None])] = 3.7e-44  # what exp(-100) leaves in float32
    weights = weights / weights.sum(-1, keepdim=True)
    # Each query counts once, however many keys it sees.
    means = [np.mean([apart(i, j) for j in range(TOKENS) if (i < COLUMNS) == (j < COLUMNS)]) for i in range(TOKENS)]
    assert uniform_distance(layer_of(weights), SIZE) == pytest.approx(np.mean(means), rel=1e-5)


def test_a_query_that_sees_class_tokens_only_has_no_distance() -> None:
    index = torch.cat([torch.tensor([-1]), torch.arange(TOKENS)])[None]
    weights = torch.zeros(1, 1, 1, TOKENS + 1, TOKENS + 1)
    weights[..., 0] = 1.0
    weights[0, 0, 0, 1] = torch.eye(TOKENS + 1)[2]  # place 0 looks at place 1
    assert attention_distance(layer_of(weights, index), SIZE).item() == pytest.approx(PITCH[1])


def test_tokens_without_places_are_an_error_that_names_the_layer() -> None:
    layer = AttentionLayer("blocks.0.attn", torch.ones(1, 4, 1, 2, 2) / 2, None, None)
    with pytest.raises(
        ModelError, match=r"blocks\.0\.attn: where its tokens stand is not known \(4 groups of 2 queries"
    ):
        attention_distance(layer, SIZE)
