"""`leanvit train --ray`: one run in many processes through Ray Train, started again where one of them is lost.

Ray Train's TorchTrainer sets the environment that torchrun sets, so that leanvit.train.run works there as it is, and
ends with the weights of a run under torchrun. Where a process or a machine is lost, the group starts again and goes on
from the last save. All machines must reach the data and the output folder under the same path.

The loop over lost groups is here and not in Ray's FailureConfig: that one starts again after an error of the user's as
well, and with the first start's settings, which may not have said `resume`.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leanvit import passed_over
from leanvit.config import TrainConfig
from leanvit.errors import ConfigError, EnvironmentProblem, LeanvitError
from leanvit.progress import note
from leanvit.scale.cluster import connected, thread_variables

if TYPE_CHECKING:
    from leanvit.train import TrainResult

LOSSES = 3
"""Lost groups in a row without a save between them, after which there is no hope of another."""

POLL_SECONDS = 0.5
"""Between two looks for lines of the first process: a reader takes less for at once."""

ENVIRONMENT = {
    # Ray Train would move its processes to a folder of its own, and relative paths would be lost.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Lines come here by `Lines`; a print that also logs would double them in Ray's files.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
}


@dataclass(frozen=True)
class Group:
    """How many processes train, and what each of them has."""

    workers: int
    cpus: int
    gpu: bool

    def __str__(self) -> str:
        return f"{self.workers} processes with {self.cpus} CPUs{' and a GPU' if self.gpu else ''} each"


def run(config: TrainConfig) -> TrainResult:
    """Train as `config` says on the cluster that `config.ray` names; what leanvit.train.run returns.

    Raises what that raises in any of the processes, and EnvironmentProblem where the cluster has no room or loses
    processes faster than they save.
    """
    if config.ray is None:
        raise ConfigError("ray is not given, expected where to train. Give --ray local or an address.")
    with connected(config.ray) as ray:
        group = group_for([node["Resources"] for node in ray.nodes() if node["Alive"]], config)
        note(f"training on Ray: {group}")
        # Of the files that a run leaves behind none depends on where it was trained.
        alone = replace(config, ray=None, ray_workers=None)
        with _shown(ray) as lines:
            return _until_done(alone, group, lines)


def group_for(machines: Sequence[Mapping[str, float]], config: TrainConfig) -> Group:
    """The processes that a cluster has room for: as many as asked for, each with as many CPUs as all can have.

    machines: CPU and GPU of each machine that is up. Raises EnvironmentProblem where there is no room.
    """
    gpus = 0 if config.device == "cpu" else sum(int(machine.get("GPU", 0)) for machine in machines)
    most = max((int(machine.get("CPU", 0)) for machine in machines), default=0)
    workers = config.ray_workers or gpus or sum(machine.get("CPU", 0) >= 1 for machine in machines)

    def room(cpus: int) -> int:
        each = ((int(m.get("CPU", 0)) // cpus, int(m.get("GPU", 0))) for m in machines)
        return sum(min(both) if gpus else both[0] for both in each)

    fitting = [cpus for cpus in range(1, most + 1) if room(cpus) >= workers]
    if not workers or not fitting:
        found = f"{len(machines)} machines with {sum(int(m.get('CPU', 0)) for m in machines)} CPUs and {gpus} GPUs"
        raise EnvironmentProblem(
            f"the cluster has no room for {workers} processes: {found}, expected a CPU{' and a GPU' if gpus else ''} "
            "for each. Lower --ray-workers or add machines."
        )
    return Group(workers, max(fitting), bool(gpus))


class Lines:
    """An actor between the processes and the command: what the first one says, and what all of them left out."""

    def __init__(self) -> None:
        self._said: list[str] = []
        self._left_out: dict[str, None] = {}

    def say(self, line: str) -> None:
        """Keep a line until it is taken."""
        self._said.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        said, self._said = self._said, []
        return said

    def leave_out(self, names: Sequence[str]) -> None:
        """Keep the names of images that took no part."""
        self._left_out.update(dict.fromkeys(names))

    def left_out(self) -> list[str]:
        """All names that were kept."""
        return list(self._left_out)


@contextlib.contextmanager
def _shown(ray: ModuleType) -> Iterator[Any]:
    """A handle of `Lines`, whose lines appear on standard error while the block runs."""
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    # On this machine: the loss of another must not take it along.
    lines = ray.remote(num_cpus=0, label_selector=here)(Lines).remote()
    ended = threading.Event()

    def show() -> None:
        for line in ray.get(lines.take.remote()):
            note(line)

    def keep_showing() -> None:
        while not ended.wait(POLL_SECONDS):
            with contextlib.suppress(ray.exceptions.RayError):
                show()

    thread = threading.Thread(target=keep_showing, daemon=True)
    thread.start()
    try:
        yield lines
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(ray.exceptions.RayError):
            show()
            passed_over.left_out(ray.get(lines.left_out.remote()), "images", said=True)
        ray.kill(lines)


def _until_done(config: TrainConfig, group: Group, lines: Any) -> TrainResult:
    """Train; go on from the last save where a group was lost."""
    from ray.train import ControllerError, TrainingFailedError

    first = last = _stamp(config)
    losses = 0
    while True:
        try:
            return _fit(config, group, lines)
        except ControllerError as error:
            raise EnvironmentProblem(f"Ray Train: {_reason(error.controller_failure)}. See its logs.") from error
        except TrainingFailedError as error:
            saved = _stamp(config)
            losses = 1 if saved != last else losses + 1
            failures = dict(sorted(getattr(error, "worker_failures", {}).items()))
            _raise_what_stays(list(failures.values()) or [error], losses, config)
            note(f"lost {_lost(failures, error)}: {group} start again as soon as there is room, from the last save")
            # A save that was there before the first start is another run's, unless this one was to go on from it.
            last, config = saved, replace(config, resume=config.resume or saved != first)


def _stamp(config: TrainConfig) -> tuple[int, ...] | None:
    """What changes with every save of the state."""
    from leanvit.train import LAST_NAME

    try:
        found = (Path(config.output) / LAST_NAME).stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _raise_what_stays(failures: Sequence[BaseException], losses: int, config: TrainConfig) -> None:
    """Raise the error that another start would meet as well; return where processes were lost.

    A process whose neighbour is gone fails with a RuntimeError of PyTorch, which nothing tells from others: one that
    comes back without a save in between is no loss.
    """
    # One process stops for a reason that has a name, and its neighbours for want of it.
    stay = sorted((e for e in failures if not _may_be_loss(e)), key=lambda error: not isinstance(error, LeanvitError))
    if stay:
        raise stay[0]
    if losses < LOSSES:
        return
    if not any(_is_of_ray(error) for error in failures):
        raise failures[0]
    raise EnvironmentProblem(
        f"training lost processes {losses} times without a save in between, the last time by: {_reason(failures[0])}. "
        f"Give each more memory or --save-interval; go on with: leanvit train ... --output {config.output} --resume"
    ) from failures[0]


def _may_be_loss(error: BaseException) -> bool:
    return _is_of_ray(error) or isinstance(error, RuntimeError | ConnectionError)


def _is_of_ray(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] == "ray"


def _lost(failures: Mapping[int, BaseException], error: BaseException) -> str:
    """Who was lost, in words: the processes that died, without those that failed for it."""
    dead = [rank for rank, failure in failures.items() if _is_of_ray(failure)] or list(failures)
    return f"process {', '.join(map(str, dead))}" if dead else _reason(error)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _fit(config: TrainConfig, group: Group, lines: Any) -> TrainResult:
    """Run one group of processes to its end. Raises TrainingFailedError of Ray where one of them does not reach it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Leave ctrl-C to the command line: Ray's handler would go on to wait."""

    work = functools.partial(_work, config, group.cpus, os.getcwd(), lines)
    scaling = ScalingConfig(
        num_workers=group.workers, use_gpu=group.gpu,
        resources_per_worker={"CPU": group.cpus} | ({"GPU": 1} if group.gpu else {}),
    )  # fmt: skip
    # Ray Train wants a folder for checkpoints of its own kind, of which there are none.
    with tempfile.TemporaryDirectory(prefix="leanvit-ray-") as storage:
        run_config = RunConfig(
            storage_path=storage,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),
            worker_runtime_env={"env_vars": thread_variables(group.cpus)},
        )
        result: TrainResult = Trainer(work, scaling_config=scaling, run_config=run_config).fit().return_value
    return result


def _work(config: TrainConfig, threads: int, folder: str, lines: Any) -> TrainResult:
    """What each process does; folder: where the command was given, to which relative paths belong."""
    import ray
    import torch

    from leanvit.train import run as run_it
    from leanvit.train.processes import from_environment

    with contextlib.suppress(FileNotFoundError):
        os.chdir(folder)
    torch.set_num_threads(threads)
    with passed_over.gathering() as gathered, contextlib.ExitStack() as stack:
        if from_environment().first:
            stack.enter_context(contextlib.redirect_stderr(_ToLines(lines)))
        result = run_it(config)
    # Waited for: calls are in order, so that everything that was said has arrived as well.
    ray.get(lines.leave_out.remote(list(gathered.names)))
    return result


class _ToLines(io.TextIOBase):
    """Standard error of a process, line by line to `Lines`."""

    def __init__(self, lines: Any) -> None:
        self._lines = lines
        self._begun = ""

    def write(self, text: str) -> int:
        """Send the lines that are complete."""
        *complete, self._begun = (self._begun + text).split("\n")
        for line in complete:
            self._lines.say.remote(line)
        return len(text)
