"""Vision transformers of leanvit; importing this package registers them with timm."""

from __future__ import annotations

import fnmatch
import functools
import sys
from typing import Any

import timm
import torch

from leanvit.models import exmobilevit, micro, remvit, reswin, revit, vitae, vitaev2
from leanvit.models._convert import from_official
from leanvit.models._fuse import fuse
from leanvit.models._macs import count_macs
from leanvit.models._paper import PaperResult
from leanvit.models._token_merging import Layout, layout_of, merge_tokens
from leanvit.models.exmobilevit import add_exshortcut

__all__ = [
    "Layout",
    "add_exshortcut",
    "count_macs",
    "exmobilevit",
    "from_official",
    "fuse",
    "layout_of",
    "list_models",
    "merge_tokens",
    "micro",
    "model_names",
    "remvit",
    "reswin",
    "revit",
    "vitae",
    "vitaev2",
]


def model_names() -> list[str]:
    """Names of every architecture of leanvit, sorted as timm sorts them; builds none."""
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith(__name__)]


def list_models(pattern: str = "*") -> list[dict[str, Any]]:
    """Every architecture of leanvit whose name matches a shell pattern, by name; a quarter of a second for each.

    Each entry: name, family (module), input_size (h, w); counted on the network as it is registered: params,
    macs (1e9 multiply-adds at input_size: linear, convolution and both attention products); as the authors state
    them: paper_params, paper_macs (1e9), paper_top1 (percent of ImageNet-1k), None where they state none.
    """
    return [dict(_describe(name)) for name in model_names() if fnmatch.fnmatch(name, pattern)]


@functools.cache
def _describe(name: str) -> dict[str, Any]:
    module = timm.model_entrypoint(name).__module__
    results: dict[str, PaperResult] = getattr(sys.modules[module], "PAPER", {})
    paper = results.get(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    height, width = model.pretrained_cfg["input_size"][1:]
    return {
        "name": name,
        "family": module.rpartition(".")[2],
        "input_size": [height, width],
        "params": sum(p.numel() for p in model.parameters()),
        "macs": count_macs(model, (height, width)) / 1e9,
        "paper_params": paper.params if paper else None,
        "paper_macs": paper.macs if paper else None,
        "paper_top1": paper.top1 if paper else None,
    }
