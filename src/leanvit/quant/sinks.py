"""Norms of tokens through the depth: do a few patches stand far above the others, as attention sinks do.

Large transformers keep global facts in patches of little content, whose norm is several times that of the others
(Darcet et al., "Vision Transformers Need Registers", ICLR 2024, arXiv 2309.16588, figure 3; Sun et al., "Massive
Activations in Large Language Models", arXiv 2402.17762). One such token sets the range of an activation quantizer, and
leaves few steps to all others.

What OPT-m does for them: fc2's input, where such a token comes from, has a quantizer with a fine and a coarse region.
Ranges of its own for the class token gained nothing (vit_micro at W4A4, seed 0, divergence on test images 0.0153 where
it was 0.0147, and 0.0125 where it was 0.0123 with outliers put in).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanvit.quant.graph import QuantGraph, module_path, node_argument
from leanvit.quant.interpret import observe_nodes
from leanvit.quant.ops import LAYER_NORM
from leanvit.quant.samples import few_images

SINK_TIMES = 3.0
"""The median of an image's norms, from which a token counts as a sink: in figure 3 of Darcet et al. most patches of
DINOv2 lie around 50, and their sinks from 150 on."""


def token_norms(tokens: Tensor) -> Tensor:
    """Euclidean norm of every token: (B, N, C) to (B, N), not negative."""
    return tokens.double().square().sum(-1).sqrt()


def norm_facts(tokens: Tensor) -> Tensor:
    """Of each image's tokens (B, N, C): median norm, largest norm, and how many are sinks. Returns (B, 3)."""
    norms = token_norms(tokens)
    median = norms.median(1).values
    sinks = (norms > SINK_TIMES * median[:, None]).sum(1)
    return torch.stack([median, norms.amax(1), sinks.to(norms)], 1)


@torch.no_grad()
def find_sinks(graph: QuantGraph, images: Tensor) -> dict[str, Any]:
    """Where tokens that a LayerNorm reads stand far above the others, in a float graph.

    images: (N, 3, H, W) calibration images, of which a few are looked at. Returns JSON values: `times`, from which a
    token counts, `layers`, the LayerNorms before which there are sinks with the means over the images of norm_facts,
    and `summary`, a line that says it, None where there are none.
    """
    read = {
        source.name: module_path(node)
        for node in graph.module.graph.nodes
        if node.target is LAYER_NORM and _has_tokens(source := node_argument(node, 0))
    }
    found: dict[str, list[Tensor]] = {name: [] for name in read}

    def look(name: str, tokens: Tensor) -> None:
        found[name].append(norm_facts(tokens.reshape(len(tokens), -1, tokens.shape[-1])))

    observe_nodes(graph.module, set(read), few_images(images), look)
    rows = []
    for name, facts in found.items():
        median, largest, sinks = (float(value) for value in torch.cat(facts).mean(0))
        if sinks:
            rows.append({"layer": read[name], "median": median, "largest": largest, "sinks": sinks})
    return {"times": SINK_TIMES, "layers": rows, "summary": _summary(rows)}


def _summary(rows: list[dict[str, Any]]) -> str | None:
    """One line of what was found; None where there is no sink."""
    if not rows:
        return None
    worst = max(rows, key=lambda row: float(row["largest"] / row["median"]))
    return (
        f"tokens far above the others (attention sinks) before {len(rows)} of the norms, most before {worst['layer']}: "
        f"on average {worst['sinks']:.1f} an image of more than {SINK_TIMES:g} times the median norm, and an image's "
        f"largest {worst['largest'] / worst['median']:.1f} times"
    )


def _has_tokens(source: Any) -> bool:
    """Whether what a norm reads is (B, ..., C) of several tokens."""
    value = source.meta.get("val")
    return value is not None and value.dim() >= 3
