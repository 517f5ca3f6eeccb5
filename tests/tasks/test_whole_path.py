"""The tasks' whole path on a tiny composed set: training goes on exactly, files are told apart, bundles are proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leanvit.checkpoint import load_checkpoint, read_tensors
from leanvit.config import DataComposeConfig, TrainConfig
from leanvit.data.compose import compose
from leanvit.errors import CheckpointError
from leanvit.runtime.task_of import task_of
from leanvit.train import Trainer, run
from leanvit.train.state import LAST_NAME


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "scenes"
    compose.run(DataComposeConfig(output=str(folder), train=24, val=8, size=(64,)))
    return folder


@pytest.fixture(scope="module")
def pose(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = settings(scenes, tmp_path_factory.mktemp("runs") / "pose", task="pose", decoder="upernet")
    run(config)
    return Path(config.output)


def settings(scenes: Path, output: Path, **changes: Any) -> TrainConfig:
    config = TrainConfig(
        task="semantic", data=str(scenes), model="exmobilevit_micro", output=str(output), epochs=2, batch_size=8,
        img_size=(64, 64), decoder="fpn", decoder_width=64, lr=1e-3, device="cpu",
    )  # fmt: skip
    return replace(config, **changes)


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_stopped_training_goes_on_to_the_same_bits(
    ema: float, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings(scenes, tmp_path / "whole", model_ema_decay=ema)
    run(whole)
    broken = settings(scenes, tmp_path / "broken", model_ema_decay=ema)
    record = Trainer._record

    def stop(trainer: Trainer, row: dict[str, Any], scored: Any) -> None:
        record(trainer, row, scored)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_record", stop)
        with pytest.raises(KeyboardInterrupt):
            run(broken)
    run(replace(broken, resume=True))
    first, second = (read_tensors(Path(one.output) / LAST_NAME)[0] for one in (whole, broken))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_tasks_state_and_a_classifiers_reader_are_refused(scenes: Path, pose: Path) -> None:
    with pytest.raises(CheckpointError, match="is of pose:exmobilevit_micro, not of semantic"):
        run(settings(scenes, pose, resume=True))
    with pytest.raises(CheckpointError, match="task 'pose', expected a classifier"):
        load_checkpoint(pose)
    assert task_of(pose) == "pose"


def test_the_command_line_takes_a_pose_network_to_a_proven_bundle(
    scenes: Path, pose: Path, tmp_path: Path, leanvit: Callable[..., Any]
) -> None:
    quantized, bundle, drawn = tmp_path / "quantized", tmp_path / "bundle", tmp_path / "drawn"
    given = ("--data", scenes)
    assert leanvit("quantize", pose, *given, "--output", quantized, "--calibration-images", 48).code == 0
    assert leanvit("export", quantized, *given, "--output", bundle, "--max-drop", 100).code == 0
    assert task_of(bundle) == "pose"
    assert leanvit("verify", bundle, *given).code == 0
    picture = scenes / "images" / "val" / "00000.png"
    found = leanvit("predict", bundle, picture, "--boxes", scenes / "val.json", "--draw", drawn)
    assert found.code == 0
    assert '"keypoints"' in found.out
    assert (drawn / "00000.png").is_file()
    assert leanvit("val", bundle, *given, "--limit", 3).code == 0
    model = bundle / "model.onnx"
    changed = bytearray(model.read_bytes())
    changed[len(changed) // 2] ^= 1
    model.write_bytes(changed)
    assert leanvit("predict", bundle, picture).code == 5
