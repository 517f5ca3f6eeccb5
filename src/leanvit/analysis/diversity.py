"""Token diversity through the depth: do the tokens of a layer differ, or have they become one.

    diversity = 1 - mean over pairs i != j of  x_i x_j / (|x_i| |x_j|)
    residual  = |X - 1 m^T|_F / |X|_F,   m the mean of the tokens: the best rank-1 form with equal rows

Both are 0 where all tokens are equal. Diko et al., "ReViT", 2024, arXiv 2402.11301 (cosine similarity as the
measure of feature collapse); Dong et al., "Attention is Not All You Need: Pure Attention Loses Rank Doubly
Exponentially with Depth", ICML 2021, arXiv 2103.03404 (residual; they use another norm).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.analysis.attention import AttentionLayer
from leanvit.analysis.running import evaluating
from leanvit.errors import ModelError


def token_diversity(tokens: Tensor) -> Tensor:
    """One minus the mean cosine similarity of all pairs of tokens: (B, N, C) to (B,), in [0, 1 + 1 / (N - 1)].

    Raises ModelError where there is one token only.
    """
    count = _require_pairs(tokens)
    unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
    similar = (unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))) / (count * (count - 1))
    return 1.0 - similar


def rank_one_residual(tokens: Tensor) -> Tensor:
    """Share of the tokens' norm that is not their mean: (B, N, C) to (B,), in [0, 1]. Raises as `token_diversity`."""
    _require_pairs(tokens)
    tokens = tokens.double()
    centred = tokens - tokens.mean(1, keepdim=True)
    norm = tokens.square().sum((1, 2)).sqrt()
    return centred.square().sum((1, 2)).sqrt() / norm.clamp(min=torch.finfo(torch.double).tiny)


def _require_pairs(tokens: Tensor) -> int:
    count = tokens.shape[1]
    if count < 2:
        raise ModelError(f"a layer has {count} token, expected at least two to compare. Use a larger image.")
    return count


def layer_tokens(model: nn.Module, x: Tensor, layers: Sequence[AttentionLayer]) -> dict[str, Tensor]:
    """Tokens after the block around each attention layer, class tokens and padding left out.

    x: (B, 3, H, W), the images that `layers` were read from. Returns (B, N, C) by the name of the block. Raises
    ModelError where a block returns no tokens.
    """
    blocks = {layer.name.rpartition(".")[0]: layer for layer in layers}
    pieces: dict[str, list[Tensor]] = {name: [] for name in blocks}
    modules = dict(model.named_modules())
    handles = []

    def keep(name: str) -> Any:
        # A copy, because what follows may work in place.
        return lambda module, args, output: pieces[name].append(_first_tensor(output, name).clone())

    try:
        for name in blocks:
            handles.append(modules[name].register_forward_hook(keep(name)))
        with torch.inference_mode(), evaluating(model):
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    return {name: _tokens(torch.cat(pieces[name]), len(x), layer, last) for name, layer in blocks.items()}


def _first_tensor(output: Any, name: str) -> Tensor:
    first = output[0] if isinstance(output, tuple) else output
    if not isinstance(first, Tensor) or first.dim() not in (3, 4):
        raise ModelError(
            f"{name} returns {type(first).__name__}, expected tokens or a map as its (first) output. "
            "Leave token diversity of this model out."
        )
    return first


def _tokens(output: Tensor, batch: int, layer: AttentionLayer, channels_last: bool) -> Tensor:
    """Output of a block, all groups of an image together, as (B, N, C)."""
    if output.dim() == 4:
        output = output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)
    tokens = output.reshape(batch, -1, output.shape[-1])
    if layer.queries is not None and layer.queries.index.numel() == tokens.shape[1]:
        tokens = tokens[:, layer.queries.known.flatten().to(tokens.device)]
    return tokens
