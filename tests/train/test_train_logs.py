"""What a run writes down: files always, other programs where asked for and installed, nothing over the network."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import pytest

from leanvit.config import TrainConfig
from leanvit.errors import MissingDependencyError
from leanvit.train.logs import open_trackers, write_history

HISTORY = [
    {"epoch": 1, "lr": 0.1, "train_loss": 2.0, "train_top1": 10.0, "seconds": 1.0},
    {"epoch": 2, "lr": 0.2, "train_loss": 1.0, "train_top1": 20.0, "seconds": 1.0, "val_loss": 1.5, "val_top1": 30.0},
]


def test_history_is_the_same_in_all_files(tmp_path: Path) -> None:
    write_history(tmp_path, HISTORY, {"seed": 3})
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == HISTORY
    assert json.loads((tmp_path / "train.json").read_text()) == {"seed": 3, "history": HISTORY}
    with (tmp_path / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == HISTORY


def test_tensorboard_reads_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tracker,) = open_trackers(tmp_path, TrainConfig(trackers=("tensorboard",)))
    for row in HISTORY:
        tracker.log(row)
    tracker.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(1, 2.0), (2, 1.0)]
    assert [(e.step, e.value) for e in events.Scalars("val_top1")] == [(2, 30.0)]


def test_mlflow_keeps_runs_in_a_local_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tracker,) = open_trackers(tmp_path, TrainConfig(trackers=("mlflow",)))
    for row in HISTORY:
        tracker.log(row)
    tracker.close()
    assert (tmp_path / "mlflow.db").is_file()
    (run,) = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}").search_runs(["1"])
    assert run.data.metrics["train_loss"] == 1.0
    assert run.data.params["lr"] == "0.002"


def test_wandb_stays_offline_unless_the_user_says_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tracker,) = open_trackers(tmp_path, TrainConfig(trackers=("wandb",)))
    for row in HISTORY:
        tracker.log(row)
    tracker.close()
    assert os.environ["WANDB_MODE"] == "offline"
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_program_that_is_not_installed_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    def gone(name: str) -> object:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(importlib, "import_module", gone)
    with pytest.raises(MissingDependencyError, match=r"wandb is not installed. Run: .*leanvit\[trackers\]"):
        open_trackers(tmp_path, TrainConfig(trackers=("wandb",)))
