"""The saved state: complete, whole at any moment of a crash, and what a killed run goes on from to the bit."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from common import ROOT
from leanvit import files
from leanvit.errors import CheckpointError
from leanvit.train.optimizer import parameter_names
from leanvit.train.state import LAST_NAME, Conditions, Progress, differences, load_state, read_state, save_state

PROGRESS = Progress("net", 2, Conditions.here(1), step=3, loss=1.25, history=[{"epoch": 1, "train_loss": 0.1}])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.GELU(), nn.Linear(7, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "adafactor", "rmsproptf", "madgrad"])
def test_every_optimizer_goes_on_as_if_nothing_had_been(name: str, tmp_path: Path) -> None:
    from timm.optim import create_optimizer_v2

    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = network(seed)
        return model, create_optimizer_v2(model, name, lr=0.01, weight_decay=0.05)

    whole, optimizer = make(0)
    train(whole, optimizer, range(5))
    save_state(tmp_path, PROGRESS, whole, optimizer)
    resumed, other = make(1)
    found = read_state(tmp_path)
    assert found is not None
    tensors, progress, scalars = found
    assert progress == PROGRESS
    load_state(tmp_path / LAST_NAME, tensors, scalars, resumed, other)
    train(whole, optimizer, range(5, 9))
    train(resumed, other, range(5, 9))
    pairs = zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert parameter_names(other, resumed) == parameter_names(optimizer, whole)


def test_state_of_another_network_or_optimizer_is_refused(tmp_path: Path) -> None:
    model = network(0)
    save_state(tmp_path, PROGRESS, model, torch.optim.AdamW(model.parameters()))
    found = read_state(tmp_path)
    assert found is not None
    other = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_state(tmp_path / LAST_NAME, found[0], found[2], other, torch.optim.AdamW(other.parameters()))
    groups = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(CheckpointError, match="groups of parameters, expected"):
        load_state(tmp_path / LAST_NAME, found[0], found[2], model, torch.optim.AdamW(groups))


def test_a_damaged_or_foreign_state_is_named(tmp_path: Path) -> None:
    assert read_state(tmp_path) is None
    model = network(0)
    save_state(tmp_path, PROGRESS, model, torch.optim.AdamW(model.parameters()))
    path = tmp_path / LAST_NAME
    good = path.read_bytes()
    path.write_bytes(good[:-3] + bytes([good[-3] ^ 16]) + good[-2:])
    with pytest.raises(CheckpointError, match="SHA-256"):
        read_state(tmp_path)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="not a readable"):
        read_state(tmp_path)
    from safetensors.torch import save_file

    save_file({"model.weight": torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="not a save that this leanvit can go on from"):
        read_state(tmp_path)


def test_what_costs_the_last_bits_is_said() -> None:
    here = Conditions.here(1)
    assert differences(here, here) == []
    assert differences(here, replace(here, world=2, threads=here.threads + 1)) == [
        "world was 1 and is 2",
        f"threads was {here.threads} and is {here.threads + 1}",
    ]


class Disk:
    """Records what a save asks of the system, and gives every folder that a crash may leave.

    The model of reliability.md: content that was not synced may be there in whole, in part or not at all; names
    (creations, renames, removals) reach the disk in order, and all are there once the folder was synced.
    """

    def __init__(self, old: bytes) -> None:
        self.old = old
        self.calls: list[tuple[str, str, bytes]] = []

    def states(self) -> Iterator[dict[str, bytes]]:
        for end in range(len(self.calls) + 1):
            done = self.calls[:end]
            synced_names = max((i + 1 for i, (kind, *_) in enumerate(done) if kind == "sync folder"), default=0)
            named = [i for i, (kind, *_) in enumerate(done) if kind in ("create", "rename", "remove")]
            certain = [i for i in named if i < synced_names]
            pending = [i for i in named if i >= synced_names]
            for count in range(len(pending) + 1):
                yield from self._contents(done, [*certain, *pending[:count]])

    def _contents(self, done: list[tuple[str, str, bytes]], applied: list[int]) -> Iterator[dict[str, bytes]]:
        folder, durable = {LAST_NAME: self.old}, {LAST_NAME: True}
        for index, (kind, name, data) in enumerate(done):
            if kind == "write" and name in folder:
                folder[name], durable[name] = data, False
            elif kind == "sync" and name in folder:
                durable[name] = True
            elif index in applied and kind == "create":
                folder[name], durable[name] = b"", False
            elif index in applied and kind == "rename" and name in folder:
                target = data.decode()
                folder[target], durable[target] = folder.pop(name), durable.pop(name)
            elif index in applied and kind == "remove":
                folder.pop(name, None)
        unsure = [name for name in folder if not durable[name]]
        for lengths in itertools.product((0.0, 0.5, 1.0), repeat=len(unsure)):
            cut = dict(zip(unsure, lengths, strict=True))
            yield {n: data[: int(len(data) * cut.get(n, 1.0))] for n, data in folder.items()}


def record(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Note the system calls of write_atomic while they happen."""
    real_open, real_fsync, real_replace, names = open, os.fsync, os.replace, {}

    def open_(path: Path, mode: str) -> object:
        file = real_open(path, mode)
        names[file.fileno()] = Path(path).name
        disk.calls.append(("create", Path(path).name, b""))
        real_write = file.write

        class Recorded:
            def __enter__(self) -> object:
                return self

            def __exit__(self, *error: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                disk.calls.append(("write", Path(path).name, data))
                return real_write(data)

            flush, fileno = file.flush, file.fileno

        return Recorded()

    def fsync(descriptor: int) -> None:
        kind = "sync folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "sync"
        disk.calls.append((kind, names.get(descriptor, ""), b""))
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        disk.calls.append(("rename", Path(source).name, Path(target).name.encode()))
        real_replace(source, target)

    monkeypatch.setattr(files, "open", open_, raising=False)
    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", rename)


def judge(disk: Disk, versions: list[bytes]) -> tuple[int, int]:
    """Folders that a crash may leave, and those among them without a whole version under the name that is read."""
    states = list(disk.states())
    return len(states), sum(state.get(LAST_NAME) not in versions for state in states)


def test_no_crash_leaves_a_folder_without_a_whole_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = network(0)
    optimizer = torch.optim.AdamW(model.parameters())
    save_state(tmp_path, PROGRESS, model, optimizer)
    disk = Disk((tmp_path / LAST_NAME).read_bytes())
    train(model, optimizer, range(2))
    with monkeypatch.context() as patch:
        record(disk, patch)
        save_state(tmp_path, replace(PROGRESS, step=5), model, optimizer)
    assert [kind for kind, *_ in disk.calls] == ["create", "write", "sync", "rename", "sync folder"]
    states, bad = judge(disk, [disk.old, (tmp_path / LAST_NAME).read_bytes()])
    assert states >= 10
    assert bad == 0


@pytest.mark.parametrize("left_out", ["sync", "rename"])
def test_the_enumeration_finds_a_protocol_without_sync_or_rename(left_out: str) -> None:
    """The check can fail: renaming what was not synced, or writing in place, has bad states."""
    disk = Disk(b"old" * 10)
    name = LAST_NAME if left_out == "rename" else "temporary"
    calls = [("create", name, b""), ("write", name, b"new" * 10), ("sync", name, b"")]
    calls += [("rename", "temporary", LAST_NAME.encode()), ("sync folder", "", b"")]
    disk.calls = [call for call in calls if call[0] != left_out]
    assert judge(disk, [b"old" * 10, b"new" * 10])[1] > 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 4])
def test_a_run_under_kill_9_ends_as_one_that_nobody_killed(number: int, tmp_path: Path) -> None:
    """Two kills, one inside a write, in two of eight modes: each dtype, number of workers and of processes is in one.

    The same script does a hundred kills and more, of every mode.

    In a process of its own: it forks, and what earlier tests left in this one (threads, pools) must not go along.
    """
    output = tmp_path / "rows.json"
    script = [sys.executable, str(ROOT / "benchmarks" / "resume.py"), "--kills", "2", "--modes", str(number)]
    done = subprocess.run(
        [*script, "--folder", str(tmp_path / "runs"), "--output", str(output)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())["rows"]
    assert found["kills"] == 2
    assert found["inside_a_write"] >= 1
    assert found["restarts"] >= 2
    assert found["identical"] == found["runs"] >= 1
