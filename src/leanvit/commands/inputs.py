"""What several verbs read: networks and data of any task, and what was measured before."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from leanvit.checkpoint import CheckpointInfo
    from leanvit.config import LoadOptions
    from leanvit.export.data import Data


def load_model(spec: str, options: LoadOptions | None = None) -> tuple[nn.Module, CheckpointInfo]:
    """Network and info of whatever leanvit.load takes, where its only head is its own classifier."""
    import leanvit.tasks  # noqa: F401 - registers how the networks of tasks are built
    from leanvit.load.api import load_classifier

    return load_classifier(spec, options)


def open_network(spec: str, options: LoadOptions | None = None) -> tuple[nn.Module, CheckpointInfo]:
    """Float network (eval mode, CPU) and info of whatever leanvit.load takes, of any task.

    Raises CheckpointError where it is nothing of it or damaged.
    """
    import leanvit.tasks  # noqa: F401 - registers how the networks of tasks are built
    from leanvit.load.api import load

    return load(spec, options)


def read_own_data(info: CheckpointInfo, data: str, split: Any) -> tuple[CheckpointInfo, Data]:
    """One split of a network's own data, as it was cut in training; and the info, whose classes have names then.

    Raises DataError where the data has other classes.
    """
    from leanvit.export.data import agreed_classes, read_data

    found = read_data(info.task, data, split, val_fraction=info.val_fraction, seed=info.seed)
    labels, found = agreed_classes(info.labels, found, data)
    return replace(info, labels=labels), found


def named_by_data(info: CheckpointInfo, data: str) -> CheckpointInfo:
    """The info, whose classes have the names of the data where they only had numbers and are as many."""
    from leanvit.load.labels import are_numbered

    return read_own_data(info, data, "val")[0] if info.labels and are_numbered(info.labels) else info


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
