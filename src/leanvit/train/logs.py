"""Where a run is written down: log.csv, log.jsonl and train.json always, TensorBoard, W&B and MLflow on demand."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from leanvit.config import TrainConfig, to_dict
from leanvit.errors import require
from leanvit.files import write_atomic, write_json

SUMMARY_NAME = "train.json"
CLASSIFIER_COLUMNS = ("epoch", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "seconds")
"""Columns of log.csv, before any of a task's own."""

Row = dict[str, Any]


def numbers(row: Row) -> dict[str, float]:
    """What a tracker draws of an epoch: its numbers, also those of the metrics."""
    found = {key: value for key, value in row.items() if isinstance(value, int | float)}
    return found | {key: value for key, value in row.get("metrics", {}).items() if isinstance(value, int | float)}


def write_history(folder: Path, history: Sequence[Row], summary: dict[str, Any]) -> None:
    """log.csv and log.jsonl with a line an epoch, and the summary with everything."""
    rows = io.StringIO()
    plain = [{k: v for k, v in row.items() if isinstance(v, int | float) and k != "cpu_seconds"} for row in history]
    writer = csv.DictWriter(rows, fieldnames=_columns(plain))
    writer.writeheader()
    writer.writerows(plain)
    write_atomic(folder / "log.csv", rows.getvalue().encode())
    write_atomic(folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    write_json(folder / SUMMARY_NAME, {**summary, "history": list(history)})


def _columns(rows: Sequence[Row]) -> list[str]:
    found = list(dict.fromkeys(key for row in rows for key in row))
    if set(found) <= set(CLASSIFIER_COLUMNS):
        return list(CLASSIFIER_COLUMNS)
    return found


class Tracker(Protocol):
    """A program that draws curves of runs."""

    def log(self, row: Row) -> None:
        """Take in one epoch."""

    def close(self) -> None:
        """Write what is pending."""


class TensorBoard:
    """Event files in OUTPUT/tensorboard: tensorboard --logdir OUTPUT."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        require("tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))
        self.writer.add_text("config", json.dumps(to_dict(config)))

    def log(self, row: Row) -> None:
        """One point a curve."""
        for key, value in row.items():
            if key != "epoch":
                self.writer.add_scalar(key, value, int(row["epoch"]))

    def close(self) -> None:
        """Write what is pending."""
        self.writer.close()


class WandB:
    """Weights & Biases, offline unless the user has set WANDB_MODE: send it with `wandb sync OUTPUT/wandb/...`."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        wandb = require("wandb")
        folder.mkdir(parents=True, exist_ok=True)
        self.run = wandb.init(
            project="leanvit", name=folder.name, dir=str(folder), config=to_dict(config), resume="allow",
            settings=wandb.Settings(x_disable_meta=True, disable_git=True, silent=True),
        )  # fmt: skip

    def log(self, row: Row) -> None:
        """One step."""
        self.run.log({k: v for k, v in row.items() if k != "epoch"}, step=int(row["epoch"]))

    def close(self) -> None:
        """Write what is pending."""
        self.run.finish()


class MLflow:
    """MLflow in the local file OUTPUT/mlflow.db, unless the user has set MLFLOW_TRACKING_URI."""

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("DO_NOT_TRACK", "true")
        self.mlflow = require("mlflow")
        if "MLFLOW_TRACKING_URI" not in os.environ:
            self.mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        self.mlflow.set_experiment("leanvit")
        self.mlflow.start_run(run_name=folder.name)
        self.mlflow.log_params({key: str(value)[:250] for key, value in to_dict(config).items()})

    def log(self, row: Row) -> None:
        """One step."""
        self.mlflow.log_metrics({k: v for k, v in row.items() if k != "epoch"}, step=int(row["epoch"]))

    def close(self) -> None:
        """Write what is pending."""
        self.mlflow.end_run()


_TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "mlflow": MLflow}


def open_trackers(folder: Path, config: TrainConfig) -> list[Tracker]:
    """Those that `config.trackers` names. Raises MissingDependencyError where a package is not installed."""
    return [_TRACKERS[name](folder, config) for name in config.trackers]
