"""A trained network by what a user calls it: a checkpoint file, the folder of a run, or NAME.TAG."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from leanvit.checkpoint import CheckpointInfo, build, load_checkpoint
from leanvit.data import preprocess_for
from leanvit.errors import CheckpointError


def load_model(spec: str) -> tuple[nn.Module, CheckpointInfo]:
    """Model (eval mode, CPU) and info of a checkpoint, a run folder, or an architecture with a tag: 'vit_micro.fmnist'.

    Raises CheckpointError where it is none of them, or where the weights name no classes.
    """
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    name, _, tag = spec.partition(".")
    if Path(spec).exists() or not tag or not timm.is_model(name):
        return load_checkpoint(spec)
    labels = tuple(getattr(timm.get_pretrained_cfg(spec), "label_names", None) or ())
    if not labels:
        raise CheckpointError(f"the weights of '{spec}' name no classes, expected label_names. Give a checkpoint file.")
    model = build(spec, len(labels), pretrained=True).eval()
    return model, CheckpointInfo(name, labels, preprocess_for(model))
