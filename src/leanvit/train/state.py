"""What a run needs to go on exactly: one file, replaced as a whole.

Order, augmentation, dropout and learning rate are pure functions of seed, epoch, step and process, so that weights,
optimizer and counters are the whole state. They are in ONE safetensors file, with history and best result in its
metadata: whatever moment a run is killed at, the file is that of one save or of the next. It is written under another
name, synced, renamed, and the folder synced (files.write_atomic); log, summary and best weights are made from it
or again.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save
from torch import Tensor, nn

from leanvit.checkpoint import digest, load_weights, read_tensors, whole
from leanvit.config import from_dict
from leanvit.errors import CheckpointError, ConfigError
from leanvit.files import write_atomic
from leanvit.progress import note
from leanvit.train.optimizer import parameter_names
from leanvit.train.processes import from_environment

LAST_NAME = "last.safetensors"


@dataclass(frozen=True)
class Conditions:
    """What must be the same for a resumed run to end with the same bits."""

    world: int
    threads: int
    torch: str
    machine: str

    @staticmethod
    def here(world: int) -> Conditions:
        """Those of this process."""
        return Conditions(world, torch.get_num_threads(), torch.__version__, platform.machine())


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    epoch: finished epochs. step: finished steps of the next one. loss, correct, seen, losses: sums over that epoch so
    far, the last by name where there are several. history: see TrainResult. best: metrics of the best epoch.
    scaler: state of the fp16 loss scaler.
    """

    architecture: str
    epoch: int
    conditions: Conditions
    step: int = 0
    loss: float = 0.0
    correct: float = 0.0
    seen: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    losses: dict[str, float] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    version: int = 2


def save_state(
    folder: Path,
    progress: Progress,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
    *,
    writes: bool = True,
) -> None:
    """Write everything to LAST_NAME in `folder`, atomically.

    average: the moving average of the weights. writes: False where another process writes; sharded weights
    are gathered from all, so all must call this.
    """
    tensors = {f"model.{name}": whole(value) for name, value in learner.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": whole(value) for name, value in average.state_dict().items()}
    numbers: dict[str, float] = {}
    names = parameter_names(optimizer, learner)
    state = optimizer.state_dict()
    for index, entries in state["state"].items():
        for key, value in entries.items():
            where = f"optimizer.{names[index]}:{key}"
            if isinstance(value, Tensor):
                tensors[where] = whole(value)
            else:
                numbers[where] = value
    for number, group in enumerate(state["param_groups"]):
        tensors |= {f"group.{number}:{key}": whole(v) for key, v in group.items() if isinstance(v, Tensor)}
    if not writes:
        return
    metadata = {
        "leanvit_progress": json.dumps(asdict(progress)),
        "optimizer": json.dumps({"numbers": numbers, "groups": [_scalars(g) for g in state["param_groups"]]}),
        "sha256": digest(tensors),
    }
    write_atomic(folder / LAST_NAME, save(tensors, metadata))


def _scalars(group: Mapping[str, Any]) -> dict[str, float]:
    """What an optimizer counts for a whole group, as schedule-free ones do."""
    return {k: v for k, v in group.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def read_state(folder: Path) -> tuple[dict[str, Tensor], Progress, dict[str, Any]] | None:
    """Tensors, progress and optimizer scalars of the last save in `folder`, or None where there is none.

    Raises CheckpointError where the file is damaged or of another version.
    """
    path = folder / LAST_NAME
    if not path.is_file():
        return None
    tensors, metadata = read_tensors(path)
    try:
        progress = from_dict(Progress, json.loads(metadata["leanvit_progress"]), str(path))
        optimizer: dict[str, Any] = json.loads(metadata["optimizer"])
    except (KeyError, ValueError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: not a save that this leanvit can go on from ({error}). Start again without --resume, perhaps "
            f"with --initial-checkpoint {path.with_name('model.safetensors')}."
        ) from error
    return tensors, progress, optimizer


def restore_state(
    folder: Path,
    start: Progress,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
) -> Progress | None:
    """Put the last save in `folder` back and say what differs from then; None, with a remark, where there is none.

    start: progress of the run before its first step, with its architecture and conditions. Returns the progress of
    the save under the conditions of `start`. Raises CheckpointError where the save is damaged or of another network.
    """
    path = folder / LAST_NAME
    found = read_state(folder)
    if found is None:
        note(f"{path} does not exist yet: training starts at epoch 1")
        return None
    tensors, progress, scalars = found
    if progress.architecture != start.architecture:
        raise CheckpointError(
            f"{path} is of {progress.architecture}, not of {start.architecture}. Check --model and --task."
        )
    load_state(path, tensors, scalars, learner, optimizer, average)
    # Every process restores, one of them says so.
    for difference in differences(progress.conditions, start.conditions) if from_environment().first else ():
        note(f"{difference}: the weights will not be those of an uninterrupted run to the last bit")
    return replace(progress, conditions=start.conditions)


def load_state(
    path: Path,
    tensors: dict[str, Tensor],
    scalars: dict[str, Any],
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
) -> None:
    """Put a save back. Raises CheckpointError where it is of another network or has no average that is asked for."""
    wanted = learner.state_dict()
    weights = {n: _placed(t, wanted[n]) if n in wanted else t for n, t in _under("model.", tensors).items()}
    load_weights(learner, weights, path)
    if average is not None:
        load_weights(average, _under("average.", tensors), path)
    parameters = dict(learner.named_parameters())
    position = {name: index for index, name in enumerate(parameter_names(optimizer, learner))}
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**_under("optimizer.", tensors), **_under("optimizer.", scalars["numbers"])}.items():
        name, _, entry = key.rpartition(":")
        if name not in position:
            raise CheckpointError(f"{path} has optimizer state of '{name}', which does not learn here. Check --config.")
        placed = _placed(value, parameters[name]) if isinstance(value, Tensor) else value
        state.setdefault(position[name], {})[entry] = placed
    groups = optimizer.state_dict()["param_groups"]
    if len(groups) != len(scalars["groups"]):
        raise CheckpointError(
            f"{path} has {len(scalars['groups'])} groups of parameters, expected {len(groups)}. "
            "Resume with the settings that the run started with (config.yaml)."
        )
    merged = [
        {**group, **saved, **_under(f"group.{number}:", tensors)}
        for number, (group, saved) in enumerate(zip(groups, scalars["groups"], strict=True))
    ]
    optimizer.load_state_dict({"state": state, "param_groups": merged})


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` holds it: cut into shards where that is sharded."""
    mesh: Any = getattr(like, "device_mesh", None)
    if mesh is None or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), mesh, cast(Any, like).placements)


def _under(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def differences(saved: Conditions, here: Conditions) -> list[str]:
    """What makes the end of a resumed run differ in its last bits from an uninterrupted one, in words."""
    before, now = asdict(saved), asdict(here)
    return [f"{key} was {before[key]} and is {now[key]}" for key in before if before[key] != now[key]]
