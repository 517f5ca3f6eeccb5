"""A tiny composed set and, of each task, a trained network, its quantized parts and bundles; made once for all workers.

A test module gets them with `pytest_plugins = ("toy_tasks",)`. They are shared, so nobody may change them.
PYTEST_DONT_REWRITE: there is no assert here, and modules import this one before pytest does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor

from leanvit.annotations import SceneSet
from leanvit.annotations.load import load_scenes
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import DataComposeConfig, TrainConfig
from leanvit.data.compose import compose
from leanvit.export.api import export
from leanvit.export.data import calibration_inputs
from leanvit.quant.parts import QuantizedNetwork, quantize_network, save_network
from leanvit.tasks.build import load_network
from leanvit.train import run
from made_once import made_once, shared_folder

TASKS = ("detect", "segment", "semantic", "pose")
SIZE = (64, 64)
TRAIN, VAL = 32, 8

HEADS: dict[str, dict[str, Any]] = {
    "detect": {"channels": 16, "anchor_scale": 2.0, "head_width": 32, "proposals": 40, "sampled": 24, "detections": 12},
    "semantic": {"decoder": "fpn", "decoder_width": 64},
    "pose": {"decoder_width": 32},
}
HEADS["segment"] = {**HEADS["detect"], "mask_width": 16, "mask_layers": 2}


@dataclass(frozen=True)
class ToyTasks:
    """Where everything is. scenes: folder of the composed set."""

    folder: Path
    scenes: Path

    def config(self, task: str, output: Path, **changes: Any) -> TrainConfig:
        """Settings of a short training."""
        config = TrainConfig(
            # At once: faults that tests plant are chosen for networks that learn so.
            grad_accum_steps=1,
            task=task, data=str(self.scenes), model="mobilenetv3_small_050", output=str(output), epochs=2,
            batch_size=8, img_size=SIZE, lr=3e-3, device="cpu", amp="none", **HEADS[task],
        )  # fmt: skip
        return replace(config, **changes)

    @functools.cache  # noqa: B019 - one object a session
    def split(self, task: str, name: str) -> SceneSet:
        return load_scenes(self.scenes, cast(Any, name), task=cast(Any, task))

    @functools.cache  # noqa: B019
    def run(self, task: str) -> Path:
        """Folder of a training long enough that answers depend on the picture."""
        epochs = 10 if task in ("detect", "segment") else 3
        return made_once(self.folder / task, lambda output: run(self.config(task, output, epochs=epochs)))

    @functools.cache  # noqa: B019
    def calibration(self, task: str) -> Tensor:
        """As many pictures as the gate asks for."""
        _, info = load_network(self.run(task))
        return calibration_inputs(info, self.split(task, "train"), 32, 0)

    @functools.cache  # noqa: B019
    def quantize(self, task: str) -> QuantizedNetwork:
        network, info = load_network(self.run(task))
        return quantize_network(network, info, self.calibration(task))

    @functools.cache  # noqa: B019
    def quantized(self, task: str) -> Path:
        """Folder of `quantize`."""
        _, info = load_network(self.run(task))
        return made_once(
            self.folder / f"{task}_quantized", lambda output: save_network(output, self.quantize(task), info)
        )

    def load(self, task: str, precision: str) -> tuple[Any, CheckpointInfo]:
        """The torch network ("fp32") or the QuantizedNetwork ("w8a8")."""
        network, info = load_network(self.run(task))
        return (network if precision == "fp32" else self.quantize(task)), info

    @functools.cache  # noqa: B019
    def bundle(self, task: str, precision: str) -> Path:
        """A bundle that has passed the gate; its metric is recorded, with that of the float network."""

        def make(output: Path) -> None:
            network, info = self.load(task, precision)
            export(network, output, info=info, images=self.split(task, "val"), float_metric=0.0)

        return made_once(self.folder / f"{task}_{precision}", make)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> ToyTasks:
    folder = shared_folder(tmp_path_factory)
    settings: dict[str, Any] = {"train": TRAIN, "val": VAL, "size": SIZE[:1], "classes": "groups"}
    scenes = made_once(folder / "scenes", lambda output: compose.run(DataComposeConfig(output=str(output), **settings)))
    return ToyTasks(folder, scenes)


def stop_after(monkeypatch: pytest.MonkeyPatch, epochs: int) -> None:
    """Make trainings end with KeyboardInterrupt as soon as so many epochs are on disk."""
    from leanvit.train import Trainer

    record: Callable[..., None] = Trainer._record

    def stop(trainer: Trainer, row: dict[str, Any], scored: Any) -> None:
        record(trainer, row, scored)
        if trainer.progress.epoch == epochs:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_record", stop)


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
