"""Attention weights of every layer and head, read while a model runs; the model need not know of it.

A torch mode sees every call of a function: a softmax whose output multiplies something is attention, and beside
each scaled_dot_product_attention its weights are computed. Hooks tell which module is at work. What comes back is
what multiplied the values: of carried logits (ReViT, ReMViTv2, ReSwin) the mixed ones, with bias and mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from leanvit.analysis.places import Places, find_places, prefix_tokens
from leanvit.analysis.running import evaluating
from leanvit.errors import ModelError
from leanvit.models._attention import whole_logits
from leanvit.models.vitae import EPSILON, Performer, as_float

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_PRODUCTS = (torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm)


@dataclass(frozen=True)
class AttentionLayer:
    """Attention weights of one layer for a batch of images.

    name: path of the module, such as 'blocks.3.attn'.
    weights: (B, groups, heads, Nq, Nk) float32 in [0, 1], rows summing to 1. groups: windows, or the positions
        inside MobileViT's patches; 1 where attention is global.
    queries, keys: where the tokens stand on the image, None where that is not known.
    """

    name: str
    weights: Tensor
    queries: Places | None
    keys: Places | None

    def places(self) -> tuple[Places, Places]:
        """Where queries and keys stand. Raises ModelError where it is not known."""
        if self.queries is None or self.keys is None:
            groups, _, queries, keys = self.weights.shape[1:]
            raise ModelError(
                f"{self.name}: where its tokens stand is not known ({groups} groups of {queries} queries and {keys} "
                "keys), expected global attention, or windows of Swin, ReSwin or ViTAEv2, or MobileViT's patches. "
                "Leave maps and distances of this model out."
            )
        return self.queries, self.keys

    def received(self) -> Tensor:
        """Attention that each place receives: mean over the queries that have a place.

        Returns (B, heads, rows, columns) on the grid of the keys; each map sums to 1, or to less where class
        tokens or padding receive the rest. Raises ModelError where places are not known.
        """
        queries, keys = self.places()
        asked = queries.known.to(self.weights.device)
        share = torch.einsum("bghqk,gq->bghk", self.weights, asked.to(self.weights.dtype)) / asked.sum()
        index = keys.index.to(self.weights.device)
        rows, columns = keys.grid
        maps = share.new_zeros(*share.shape[:1], share.shape[2], rows * columns)
        known = index >= 0
        maps.index_add_(2, index[known], share.permute(0, 2, 1, 3)[:, :, known])
        return maps.reshape(*maps.shape[:2], rows, columns)


def attention_layers(model: nn.Module, x: Tensor) -> list[AttentionLayer]:
    """Attention weights of every layer, in the order in which they are computed.

    model: any that computes attention as softmax(..) v or by scaled_dot_product_attention; it is run in eval mode
    and left as it was. ViTAE's performers, which never form their weights, are read as well: theirs sum to less
    than 1 where the denominator is as small as its epsilon. x: (B, 3, H, W) normalised.
    Raises ModelError where the model has no such attention.
    """
    recorder = _Recorder(model)
    with torch.inference_mode(), evaluating(model), whole_logits(model), recorder.hooked(), recorder:
        model(x)
    if not recorder.pieces:
        raise ModelError(
            f"{type(model).__name__} shows no attention, expected softmax(q k) v or scaled_dot_product_attention in "
            "some layer. Choose a transformer, such as revit_*."
        )
    prefix, size = prefix_tokens(model), (x.shape[-2], x.shape[-1])
    layers = []
    for name, pieces in recorder.pieces.items():
        weights = _five(torch.cat(pieces), recorder.modules[name], len(x), name)
        shape = (weights.shape[1], *weights.shape[3:])
        queries, keys = find_places(name, recorder.modules, recorder.inputs, shape, size, prefix)
        layers.append(AttentionLayer(name, weights, queries, keys))
    return layers


def _five(weights: Tensor, module: nn.Module, batch: int, name: str) -> Tensor:
    """Weights as computed, with images, groups and heads in one, two or three dimensions, in all five."""
    if weights.dim() == 5 and len(weights) == batch:
        return weights
    pair = weights.shape[-2:]
    heads = weights.shape[1] if weights.dim() == 4 else int(getattr(module, "num_heads", 1))
    if weights.dim() > 4 or weights.numel() % (batch * heads * pair[0] * pair[1]):
        raise ModelError(
            f"{name}: attention weights have shape {tuple(weights.shape)}, expected images x groups, heads, queries "
            f"and keys of {batch} images. Leave this model out."
        )
    return weights.reshape(batch, -1, heads, *pair)


def received_attention(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Attention that each patch receives, layer by layer: mean over heads and over the patches that look.

    x: (B, 3, H, W) normalised. Returns one (B, rows, columns) tensor a layer; each map sums to 1, or to less
    where a class token receives the rest. Raises ModelError where the model has no attention, or where its
    tokens stand is not known.
    """
    return [layer.received().mean(1) for layer in attention_layers(model, x)]


class _Recorder(TorchFunctionMode):
    """Sees the functions that a model calls.

    pieces: weights by the name of their module; several where it was run on a part of the batch at a time.
    inputs: by name, the arguments of the last call, with shapes in place of tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.modules = dict(model.named_modules())
        self.pieces: dict[str, list[Tensor]] = {}
        self.inputs: dict[str, tuple[Any, ...]] = {}
        self._running: list[str] = []
        self._softmax: Tensor | None = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Know which module is at work."""
        handles = []
        for name, module in self.modules.items():
            handles.append(module.register_forward_pre_hook(self._enter(name)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Any:
        def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._running.append(name)
            self.inputs[name] = tuple(tuple(a.shape) if isinstance(a, Tensor) else a for a in args)
            if isinstance(module, Performer):
                self._keep(_performer_weights(module, args[0]))

        return enter

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _keep(self, weights: Tensor) -> None:
        self.pieces.setdefault(self._running[-1], []).append(weights.float())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch and look at what it is."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep(_weights_beside(*args, **kwargs))
        elif func in _SOFTMAX and _over_keys(out, *args[1:], **kwargs):
            self._softmax = out
        elif func in _PRODUCTS and self._is_softmax(args[0]):
            self._keep(args[0])
            self._softmax = None
        return out

    def _is_softmax(self, x: Tensor) -> bool:
        last = self._softmax
        return last is not None and x.data_ptr() == last.data_ptr() and x.shape[-2:] == last.shape[-2:]


def _over_keys(out: Tensor, dim: int | None = None, *_: Any, **__: Any) -> bool:
    return out.dim() >= 3 and dim in (-1, out.dim() - 1)


def _weights_beside(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """What scaled_dot_product_attention multiplies `value` by, (..., Nq, Nk)."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.matmul(query.float() * scale, key.float().transpose(-2, -1))
    if is_causal:
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(-1)


def _performer_weights(module: Performer, x: Tensor) -> Tensor:
    """The weights (B, 1, N, N) that a performer applies without forming them; its features as it computes them."""
    k, q, _ = (as_float(t) for t in module.kqv(x).chunk(3, dim=-1))
    keys, queries = module.exponents(k), module.exponents(q)
    if module.stable:
        largest = keys.amax(dim=1, keepdim=True)
        keys, queries = keys - largest, queries + largest
        queries = queries - queries.amax(dim=-1, keepdim=True)
    scale, epsilon = (1.0, 0.0) if module.stable else (module.w.shape[0] ** -0.5, EPSILON)
    products = torch.matmul(keys.exp() * scale, (queries.exp() * scale).transpose(1, 2)).transpose(1, 2)
    return (products / (products.sum(-1, keepdim=True) + epsilon))[:, None]
