"""Vision transformers of leanvit; importing this package registers them with timm."""

from __future__ import annotations

import sys
from typing import Any

import torch

from leanvit.models import exmobilevit, remvit, reswin, revit, vitae, vitaev2
from leanvit.models._convert import from_official
from leanvit.models._fuse import fuse
from leanvit.models._paper import PaperResult
from leanvit.models.exmobilevit import add_exshortcut

__all__ = [
    "add_exshortcut",
    "exmobilevit",
    "from_official",
    "fuse",
    "list_models",
    "remvit",
    "reswin",
    "revit",
    "vitae",
    "vitaev2",
]


def list_models() -> list[dict[str, Any]]:
    """Every architecture of leanvit, by name.

    Each entry: name, family (module), params (counted, 1000 classes or the model's own), input_size (h, w),
    paper_params, paper_macs (1e9 multiply-adds), paper_top1 (percent), None where the paper states none.
    """
    import timm

    entries = []
    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if not module.startswith(__name__):
            continue
        with torch.device("meta"):
            model = timm.create_model(name)
        results: dict[str, PaperResult] = getattr(sys.modules[module], "PAPER", {})
        paper = results.get(name)
        entries.append(
            {
                "name": name,
                "family": module.rpartition(".")[2],
                "params": sum(p.numel() for p in model.parameters()),
                "input_size": list(model.pretrained_cfg["input_size"][1:]),
                "paper_params": paper.params if paper else None,
                "paper_macs": paper.macs if paper else None,
                "paper_top1": paper.top1 if paper else None,
            }
        )
    return entries
