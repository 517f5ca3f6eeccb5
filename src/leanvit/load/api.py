"""load(): any network that a user can name becomes a network and its description; build(): the same without weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from leanvit import checkpoint
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import LoadOptions
from leanvit.errors import CheckpointError, did_you_mean
from leanvit.load import files, own, python_files, timm_names, torchvision_models, transformers_models
from leanvit.load.describe import adjusted
from leanvit.load.source import Source
from leanvit.runtime.task_of import task_of

if TYPE_CHECKING:
    from torch import nn

TABLE: tuple[Source, ...] = (
    own.source(lambda info: build(info)),
    timm_names.HUB,
    timm_names.FOLDER,
    transformers_models.SOURCE,
    torchvision_models.SOURCE,
    python_files.SOURCE,
    files.SOURCE,
    timm_names.NAMES,
)
"""Every kind of source; the first that claims a spec opens it."""


def load(spec: str | Path, options: LoadOptions | None = None) -> tuple[nn.Module, CheckpointInfo]:
    """The network (eval mode, CPU, float32) and the description that a spec names.

    spec: leanvit checkpoint or run folder; NAME.TAG of timm, hf-hub:ORG/NAME, local-dir:FOLDER; a file of weights;
        transformers:FOLDER_OR_ID; torchvision:NAME[.WEIGHTS]; python:FILE.py:FUNCTION.
    options: what the file does not say, and what is to be otherwise (LoadOptions).
    Raises CheckpointError where the spec is none of them or its weights don't fit, ConfigError where an option
    contradicts the network, UnknownModelError, MissingDependencyError.
    """
    spec, options = str(spec), options or LoadOptions()
    source = source_of(spec)
    network, info = source.open(spec, options)
    info = adjusted(network, info, options, spec)
    if options.keep_tokens == 1.0:
        return network, info
    merged = replace(info, kwargs={**info.kwargs, "keep_tokens": options.keep_tokens})
    return checkpoint.with_merged_tokens(network, options.keep_tokens), merged


def load_checkpoint(path: str | Path) -> tuple[nn.Module, CheckpointInfo]:
    """The same for a checkpoint of leanvit only, of any task, as it was written. Raises CheckpointError."""
    return own.open_checkpoint(str(path), LoadOptions(), build)


def load_classifier(spec: str | Path, options: LoadOptions | None = None) -> tuple[nn.Module, CheckpointInfo]:
    """`load` for a network without another head than its own classifier. Raises CheckpointError for other tasks."""
    task = task_of(spec)
    if task not in own.PLAIN_TASKS:
        raise CheckpointError(f"{spec} is a network for the task '{task}', expected a classifier.")
    return load(spec, options)


def source_of(spec: str) -> Source:
    """The kind of source that a spec is of. Raises CheckpointError that lists them where it is of none."""
    for source in TABLE:
        if source.claims(spec):
            return source
    raise CheckpointError(_unknown(spec))


def build(info: CheckpointInfo) -> nn.Module:
    """The network of a description with random weights, on the CPU.

    Raises CheckpointError for a task or a kind of source that is not registered, UnknownModelError, ConfigError.
    """
    if info.task in own.BUILDERS:
        return own.BUILDERS[info.task](info)
    if info.task in own.PLAIN_TASKS:
        return build_classifier(info)
    raise CheckpointError(
        f"the checkpoint is for task '{info.task}', expected one of {', '.join(own.BUILDERS or own.PLAIN_TASKS)}. "
        "Import the module that registers that task."
    )


def build_classifier(info: CheckpointInfo) -> nn.Module:
    """The same for a network whose only head is its own classifier, or that has none."""
    kind = info.source.get("kind")
    if kind is None:
        # One logit stands between two labels.
        outputs = 1 if info.task == "binary" else len(info.labels)
        return checkpoint.build(info.architecture, outputs, **info.kwargs)
    for source in TABLE:
        if source.name == kind and source.build is not None:
            return source.build(info)
    raise CheckpointError(
        f"the network comes from '{kind}', which this leanvit does not know. Use the one that wrote it."
    )


def _unknown(spec: str) -> str:
    import timm

    # A path is meant, unless the text has nothing of one.
    if "/" in spec or Path(spec).suffix in files.SUFFIXES or Path(spec).exists():
        what = "no checkpoint, and none in it" if Path(spec).exists() else "no such checkpoint"
    else:
        near = did_you_mean(spec.partition(".")[0], timm.list_models())
        what = f"no such checkpoint and no architecture of timm.{near}" if near else "no such checkpoint"
    *others, last = [source.form for source in TABLE]
    forms = f"{', '.join(others)} or {last}"
    return f"{spec}: {what}, expected {forms}. Train one: leanvit train --data FOLDER"
