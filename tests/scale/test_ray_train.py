"""Training on Ray: the weights of torchrun, also where a process is killed; a process' error is the command's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from common import Outcome
from leanvit.config import TrainConfig, from_dict, load_yaml, save_yaml
from leanvit.errors import ConfigError, DataError, EnvironmentProblem, NumericalError, is_installed
from leanvit.files import read_json
from leanvit.scale import train
from leanvit.scale.train import Group, Lines, group_for

TOY: dict[str, Any] = {
    "data": "digits", "model": "vit_micro", "epochs": 3, "images_per_class": 5, "batch_size": 14, "val_fraction": 0.07,
    "amp": "none", "device": "cpu", "warmup_epochs": 1.0, "lr": 1e-3, "save_interval": 1,
}  # fmt: skip
ON_RAY: dict[str, Any] = {**TOY, "ray": "local", "ray_workers": 2}

Run = Callable[..., Outcome]
needs_ray = pytest.mark.skipif(not is_installed("ray"), reason='ray is missing: pip install "leanvit[ray]"')


@pytest.fixture(scope="module")
def under_torchrun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, trained by two processes of torchrun with a thread each."""
    folder = tmp_path_factory.mktemp("torchrun")
    save_yaml(TrainConfig(**TOY, output=str(folder / "run")), folder / "settings.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "leanvit", "train", "--config", str(folder / "settings.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def assert_same_run(folder: Path, expected: Path) -> None:
    """State, best weights and history are the same to the bit; only times differ."""
    for name in ("last.safetensors", "model.safetensors"):
        one, two = load_file(folder / name), load_file(expected / name)
        assert one.keys() == two.keys()
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    timeless = []
    for path in (folder, expected):
        summary = read_json(path / "train.json")
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in summary.pop("history")]
        timeless.append(({k: v for k, v in summary.items() if k != "cpu_seconds"}, rows))
    assert timeless[0] == timeless[1]
    assert timeless[0][0]["processes"] == 2


@pytest.mark.slow
def test_ray_trains_the_weights_of_torchrun(
    cluster: ModuleType, under_torchrun: Path, tmp_path: Path, leanvit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_yaml(TrainConfig(**ON_RAY, output="run"), "settings.yaml")
    done = leanvit("train", "--config", "settings.yaml")
    assert done.code == 0, done.err
    assert done.out.count("best top1") == 1
    assert "checkpoint run/model.safetensors" in done.out
    assert_same_run(tmp_path / "run", under_torchrun)
    written = from_dict(TrainConfig, load_yaml("run/config.yaml"))
    assert written == TrainConfig(**TOY, output="run")


def kill_the_writer(folder: Path, killed: list[int]) -> None:
    """Wait for the first save in a folder and kill -9 the process that holds it."""
    deadline = time.monotonic() + 120
    while not (folder / "last.safetensors").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.append(int((folder / ".lock").read_text()))
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.slow
def test_a_run_that_lost_a_process_ends_with_the_same_weights(
    cluster: ModuleType, under_torchrun: Path, tmp_path: Path, leanvit: Run
) -> None:
    save_yaml(TrainConfig(**ON_RAY, output=str(tmp_path / "run")), tmp_path / "settings.yaml")
    killed: list[int] = []
    killer = threading.Thread(target=kill_the_writer, args=(tmp_path / "run", killed))
    killer.start()
    done = leanvit("train", "--config", tmp_path / "settings.yaml")
    killer.join()
    assert done.code == 0, done.err
    assert int((tmp_path / "run" / ".lock").read_text()) != killed[0]
    assert done.err.count("lost process 0: 2 processes with 1 CPUs each start again") == 1
    # What the first process says appears here, that it went on from a save as well.
    assert done.err.count("going on after") == 1
    assert_same_run(tmp_path / "run", under_torchrun)


@pytest.mark.slow
def test_an_error_in_a_process_is_that_of_the_command(cluster: ModuleType, tmp_path: Path, leanvit: Run) -> None:
    config = TrainConfig(**{**ON_RAY, "model": "vit_mikro"}, output=str(tmp_path / "run"))
    save_yaml(config, tmp_path / "settings.yaml")
    done = leanvit("train", "--config", tmp_path / "settings.yaml")
    assert done.code == 2
    assert "Did you mean 'vit_micro'?" in done.error
    assert "start again" not in done.err
    assert done.out == ""


# --- without a cluster ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machines", "options", "group"),
    [
        ([{"CPU": 8.0}], {"ray_workers": 2}, Group(2, 4, False)),
        ([{"CPU": 8.0}], {}, Group(1, 8, False)),
        ([{"CPU": 4.0}, {"CPU": 4.0}, {}], {}, Group(2, 4, False)),
        # Two of three machines have room for 3 CPUs each, and none for 4.
        ([{"CPU": 3.0}, {"CPU": 3.0}, {"CPU": 2.0}], {"ray_workers": 2}, Group(2, 3, False)),
        ([{"CPU": 9.0, "GPU": 3.0}, {"CPU": 8.0}], {}, Group(3, 3, True)),
        ([{"CPU": 8.0, "GPU": 2.0}], {"device": "cpu", "ray_workers": 4}, Group(4, 2, False)),
    ],
)
def test_every_process_gets_as_many_cpus_as_all_can_have(
    machines: list[dict[str, float]], options: dict[str, Any], group: Group
) -> None:
    assert group_for(machines, TrainConfig(ray="auto", **options)) == group


@pytest.mark.parametrize(
    ("machines", "words"),
    [
        ([{"CPU": 2.0}], ["3 processes", "1 machines with 2 CPUs", "--ray-workers"]),
        ([{"CPU": 8.0, "GPU": 2.0}], ["3 processes", "2 GPUs", "a CPU and a GPU for each"]),
        ([{}], ["no room"]),
    ],
)
def test_a_cluster_without_room_is_named(machines: list[dict[str, float]], words: list[str]) -> None:
    with pytest.raises(EnvironmentProblem) as caught:
        group_for(machines, TrainConfig(ray="auto", ray_workers=3))
    for word in words:
        assert word in str(caught.value)


def died() -> Exception:
    from ray.exceptions import RayActorError

    return RayActorError()


# Stands in a table for what `died` makes, which needs Ray.
DIED = RuntimeError("a process died")
GONE = RuntimeError("Connection closed by peer")


class Groups:
    """Stands in for groups of processes: each fails as told, the last one trains; `saves` are made by the group."""

    def __init__(self, output: Path, *groups: tuple[dict[int, Exception], bool]) -> None:
        self.output = output
        self.groups = list(groups)
        self.resumed: list[bool] = []

    def fit(self, config: TrainConfig, group: Group, lines: Any) -> Any:
        from ray.train import WorkerGroupError

        self.resumed.append(config.resume)
        if not self.groups:
            return "trained"
        failures, saves = self.groups.pop(0)
        if saves:
            self.output.mkdir(exist_ok=True)
            (self.output / "new").write_bytes(b"state")
            os.replace(self.output / "new", self.output / "last.safetensors")
        raise WorkerGroupError("lost", failures)


def train_with(groups: Groups, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    monkeypatch.setattr(train, "_fit", groups.fit)
    config = TrainConfig(output=str(groups.output), **options)
    return train._until_done(config, Group(2, 1, False), Lines())


@needs_ray
def test_a_lost_group_goes_on_from_its_own_save_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lay in the folder before is of another run, which this one was not asked to go on with."""
    (tmp_path / "last.safetensors").write_bytes(b"another run")
    groups = Groups(tmp_path, ({0: died()}, False), ({1: died(), 0: GONE}, True), ({0: died()}, False))
    assert train_with(groups, monkeypatch) == "trained"
    assert groups.resumed == [False, False, True, True]
    groups = Groups(tmp_path, ({0: died()}, False))
    train_with(groups, monkeypatch, resume=True)
    assert groups.resumed == [True, True]


@needs_ray
def test_losses_without_a_save_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = ({1: died(), 0: GONE}, False)
    # A save between them is progress, which counts anew.
    assert train_with(Groups(tmp_path, lost, lost, ({1: died()}, True), lost), monkeypatch) == "trained"
    assert capsys.readouterr().err.count("lost process 1: 2 processes with 1 CPUs each start again") == 4
    with pytest.raises(EnvironmentProblem, match=r"3 times without a save .* --resume"):
        train_with(Groups(tmp_path, *[lost] * 4), monkeypatch)


@needs_ray
@pytest.mark.parametrize(
    ("failures", "kind", "starts"),
    [
        ({0: ConfigError("wrong"), 1: ConfigError("wrong")}, ConfigError, 1),
        # The neighbour of a process that stops fails as the neighbour of a lost one does.
        ({0: GONE, 1: NumericalError("not finite")}, NumericalError, 1),
        ({0: DataError("gone"), 1: DIED}, DataError, 1),
        ({0: GONE, 1: KeyError("a bug")}, KeyError, 1),
        ({0: KeyError("a bug of its own"), 1: ConfigError("wrong")}, ConfigError, 1),
        ({0: GONE, 1: GONE}, RuntimeError, 3),
    ],
)
def test_an_error_that_would_come_again_is_raised(
    failures: dict[int, Exception], kind: type[Exception], starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raised = {rank: died() if error is DIED else error for rank, error in failures.items()}
    groups = Groups(tmp_path, *[(raised, False)] * 5)
    with pytest.raises(kind):
        train_with(groups, monkeypatch)
    assert len(groups.resumed) == starts


def test_ray_and_torchrun_exclude_each_other(leanvit: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = leanvit("train", "--ray", "local")
    assert (done.code, "torchrun and --ray" in done.error) == (2, True)


def test_standard_error_is_sent_line_by_line() -> None:
    kept = Lines()
    handle = type("Handle", (), {"say": type("Say", (), {"remote": staticmethod(kept.say)})})
    with train._ToLines(handle) as stream:
        print("one\ntw", end="", file=stream)
        assert kept.take() == ["one"]
        print("o", file=stream)
    assert kept.take() == ["two"]
    kept.leave_out(["a.png"])
    kept.leave_out(["b.png", "a.png"])
    assert kept.left_out() == ["a.png", "b.png"]


def test_training_knows_nothing_of_ray() -> None:
    """`leanvit.train` and the command without --ray work where Ray is not installed."""
    code = "import sys; sys.modules['ray'] = None; import leanvit.train, leanvit.commands.train, leanvit.scale.train"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_without_an_address_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ray local"):
        train.run(replace(TrainConfig(), ray=None))
