"""What several verbs read: networks and data of any task, and what was measured before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from leanvit.checkpoint import CheckpointInfo
    from leanvit.export.data import Data


def load_model(spec: str) -> Any:
    """Model and info of a classifier's checkpoint, a run folder or NAME.TAG."""
    from leanvit.checkpoint import load_model

    return load_model(spec)


def open_network(spec: str) -> tuple[nn.Module, CheckpointInfo]:
    """Float network (eval mode, CPU) and info of a checkpoint or run folder of any task, or of NAME.TAG.

    Raises CheckpointError where it is none of them or damaged.
    """
    from leanvit.runtime.task_of import description_of
    from leanvit.tasks.build import load_network

    told = Path(spec).exists() and description_of(spec).get("task")
    return load_network(spec) if told else load_model(spec)


def open_exportable(spec: str) -> tuple[Any, CheckpointInfo]:
    """Float or quantized network of any task, and its info. Raises CheckpointError."""
    from leanvit.quant.parts import is_quantized_network, load_quantized_network
    from leanvit.quant.store import is_quantized, load_quantized

    if is_quantized(spec):
        return load_quantized(spec)
    return load_quantized_network(spec) if is_quantized_network(spec) else open_network(spec)


def read_own_data(info: CheckpointInfo, data: str, split: Any) -> Data:
    """One split of a network's own data, as it was cut in training. Raises DataError where it has other classes."""
    from leanvit.export.data import read_data, require_same_classes

    found = read_data(info.task, data, split, val_fraction=info.val_fraction, seed=info.seed)
    require_same_classes(info.task, info.labels, found, data)
    return found


def measured_before(model: Any, info: CheckpointInfo, data: str) -> float | None:
    """The float network's metric on the same data, as it was measured in training or when it was quantized."""
    from torch import nn

    from leanvit.runtime.task import task_named

    if isinstance(model, nn.Module):
        measured = info.metrics if info.data == data else None
    else:
        # Classifiers of 0.1 have float_accuracy alone.
        report = model.report if model.report.get("data") == data else {}
        measured = report.get("float_metrics") or report.get("float_accuracy")
    value = measured.get(task_named(info.task).metric) if measured else None
    return None if value is None else float(value)
