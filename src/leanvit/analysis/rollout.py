"""Attention rollout: what the tokens of the last layer are mixed of, if attention and skips were all there is.

    R = prod over layers l of (A_l + I) / 2,   A_l the mean over heads

Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv 2005.00928.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leanvit.analysis.attention import AttentionLayer
from leanvit.errors import ModelError


def attention_rollout(layers: Sequence[AttentionLayer]) -> Tensor:
    """Rollout through all layers: (B, N, N), rows (tokens at the end) over columns (tokens at the start).

    Raises ModelError where a layer attends in windows, or the number of tokens changes from layer to layer.
    """
    first = layers[0].weights.shape[-1]
    for layer in layers:
        _, groups, _, queries, keys = layer.weights.shape
        if groups > 1 or (queries, keys) != (first, first):
            found = f"{groups} groups of " if groups > 1 else ""
            raise ModelError(
                f"rollout multiplies the attention of all layers, expected {first} queries and keys in each of them; "
                f"{layer.name} has {found}{queries} queries and {keys} keys. Choose a model with global attention at "
                "one resolution, such as ViT, DeiT or revit_*, or leave rollout out."
            )
    own = torch.eye(first, device=layers[0].weights.device)
    rollout = own
    for layer in layers:
        rollout = torch.matmul(0.5 * (layer.weights[:, 0].mean(1) + own), rollout)
    return rollout


def rollout_map(layers: Sequence[AttentionLayer]) -> Tensor:
    """The row of the class token, or the mean over all patches where there is none, as maps (B, rows, columns).

    A map sums to 1, or to less where the class token keeps the rest. Raises ModelError as `attention_rollout`
    does, and where it is not known where the tokens stand.
    """
    rollout = attention_rollout(layers)
    _, keys = layers[0].places()
    known = keys.known[0].to(rollout.device)
    received = rollout[:, 0] if not known[0] else rollout.mean(1)
    return received[:, known].reshape(-1, *keys.grid)
