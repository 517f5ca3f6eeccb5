"""Two processes over gloo against one: the same losses, every validation image once, one writer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from leanvit.config import TrainConfig, save_yaml
from leanvit.errors import ConfigError
from leanvit.files import read_json
from leanvit.train import run
from leanvit.train.processes import Processes, connected, from_environment, without_sync

COMMON: dict[str, Any] = {
    "data": "digits", "epochs": 2, "images_per_class": 5, "batch_size": 14, "val_fraction": 0.07, "amp": "none",
    "device": "cpu", "warmup_epochs": 1.0, "lr": 1e-3,
}  # fmt: skip


def torchrun(*program: str) -> subprocess.CompletedProcess[str]:
    """A program in two processes, one thread each."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*starter, *program],
        capture_output=True, text=True, check=False, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def launch(config: TrainConfig, folder: Path) -> subprocess.CompletedProcess[str]:
    """`leanvit train` as torchrun starts it."""
    path = folder / "settings.yaml"
    save_yaml(config, path)
    return torchrun("-m", "leanvit", "train", "--config", str(path))


def history(folder: Path) -> list[dict[str, float]]:
    rows = read_json(folder / "train.json")["history"]
    return [{k: v for k, v in row.items() if k not in ("seconds", "cpu_seconds")} for row in rows]


def close(first: Path, second: Path, tolerance: float) -> None:
    """Losses of every epoch, and the weights, are near each other."""
    for a, b in zip(history(first), history(second), strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    one, two = (load_file(folder / "last.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    weights = [name for name in one if name.startswith("model.") and one[name].is_floating_point()]
    # AdamW divides small gradients by their own size, so that single weights differ by more than the losses.
    apart = max(float((one[n] - two[n]).abs().mean()) for n in weights)
    assert apart < 20 * tolerance


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"model": "revit_micro", "mixup": 0.4, "cutmix": 0.4, "reprob": 0.3, "hflip": 0.5, "class_weights": "balanced"},
        {"model": "vit_micro", "grad_accum_steps": 2, "model_ema_decay": 0.9, "freeze_epochs": 1, "workers": 1},
    ],
)
def test_two_processes_train_as_one_with_the_same_batch(options: dict[str, Any], tmp_path: Path) -> None:
    """Fifty images in steps of 14, so that the last step has 8; an odd number to validate, nobody counted twice."""
    one, two = tmp_path / "one", tmp_path / "two"
    run(TrainConfig(**COMMON, **{**options, "grad_accum_steps": 1, "workers": 0}, output=str(one)))
    done = launch(TrainConfig(**COMMON, **options, output=str(two)), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best top1") == 1
    close(one, two, 1e-5)
    summary = read_json(two / "train.json")
    assert summary["processes"] == 2
    assert summary["best"]["images"] == read_json(one / "train.json")["best"]["images"] == summary["val_images"]
    assert summary["val_images"] % 2 == 1


@pytest.mark.slow
def test_sharded_parameters_train_as_whole_ones_and_go_on(tmp_path: Path) -> None:
    """FSDP2 over gloo: an epoch, then resumed for another."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    settings = {**COMMON, "model": "revit_micro", "batch_size": 25}
    for epochs, resume in ((1, False), (2, True)):
        settings |= {"epochs": epochs, "resume": resume}
        run(TrainConfig(**settings, output=str(whole)))
        done = launch(TrainConfig(**settings, output=str(shared), fsdp=True), tmp_path)
        assert done.returncode == 0, done.stderr
    close(whole, shared, 1e-5)


THREADS_AFTER_TRAINING = """
import sys
from pathlib import Path
from leanvit.config import TrainConfig, from_dict, load_yaml
from leanvit.train import run
run(from_dict(TrainConfig, load_yaml(sys.argv[1]), "settings"))
print("threads", *sorted(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="names of threads are read from /proc")
@pytest.mark.parametrize("fsdp", [False, True])
def test_threads_of_the_connection_end_with_it(fsdp: bool, tmp_path: Path) -> None:
    """One that outlives it may abort the process while the interpreter shuts down, after a training that succeeded."""
    settings, program = tmp_path / "settings.yaml", tmp_path / "train.py"
    config = {**COMMON, "model": "revit_micro", "batch_size": 25, "epochs": 1}
    save_yaml(TrainConfig(**config, fsdp=fsdp, output=str(tmp_path / "run")), settings)
    program.write_text(THREADS_AFTER_TRAINING)
    done = torchrun(str(program), str(settings))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads") == 2
    assert "gloo" not in done.stdout


@pytest.mark.slow
def test_two_processes_do_not_share_a_folder_with_another_run(tmp_path: Path) -> None:
    from leanvit.files import only_writer

    with only_writer(tmp_path / "run"):
        done = launch(TrainConfig(**COMMON, output=str(tmp_path / "run")), tmp_path)
    assert done.returncode != 0
    assert f"process {os.getpid()} is writing here" in done.stderr
    assert "forcefully exiting" not in done.stderr  # the other one does not wait for torchrun to kill it


def test_one_process_needs_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    alone = from_environment()
    assert alone == Processes(0, 1, 0)
    value = torch.ones(2)
    with connected(alone, torch.device("cpu")), without_sync(torch.nn.Linear(1, 1), last=False):
        assert alone.sum(value)[0] is value
    assert not torch.distributed.is_initialized()


def test_variables_that_are_no_numbers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match=r"'first'.*Start with torchrun"):
        from_environment()
