"""Checkpoints come back as they were written, and damage is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from leanvit.checkpoint import CheckpointInfo, build, load_checkpoint, load_weights, read_tensors, save_checkpoint
from leanvit.config import Preprocess
from leanvit.errors import CheckpointError, UnknownModelError

INFO = CheckpointInfo(
    architecture="revit_micro",
    labels=tuple("abcde"),
    preprocess=Preprocess(input_size=(32, 32), mean=(0.1, 0.2, 0.3)),
    metrics={"top1": 50.0},
    data="digits",
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "run" / "model.safetensors"
    save_checkpoint(path, build("revit_micro", 5), INFO)
    return path


def test_checkpoint_round_trips_weights_and_facts(checkpoint: Path) -> None:
    torch.manual_seed(0)
    original = build("revit_micro", 5)
    for path in (checkpoint, checkpoint.parent):
        model, info = load_checkpoint(path)
        assert info == INFO
        assert not model.training
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in original.state_dict().items())


def test_unknown_model_suggests_a_known_one() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'revit_micro'"):
        build("revit_mirco", 10)


def test_nan_in_a_checkpoint_is_named(checkpoint: Path) -> None:
    tensors = load_file(checkpoint)
    tensors["blocks.1.mlp.fc1.weight"][2, 3] = torch.nan
    damaged = checkpoint.with_name("nan.safetensors")
    save_file(tensors, damaged)
    with pytest.raises(CheckpointError, match=r"1 values of 'blocks\.1\.mlp\.fc1\.weight' are NaN"):
        read_tensors(damaged)


def test_every_flipped_weight_byte_is_noticed(checkpoint: Path) -> None:
    raw = bytearray(checkpoint.read_bytes())
    header = int.from_bytes(raw[:8], "little") + 8
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(header, len(raw), (20,), generator=generator).tolist():
        raw[position] ^= 1
        checkpoint.write_bytes(raw)
        with pytest.raises(CheckpointError):
            load_checkpoint(checkpoint)
        raw[position] ^= 1


def test_truncated_and_missing_files_are_named(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(checkpoint.parent / "absent")


def test_weights_of_another_architecture_list_their_keys() -> None:
    model = build("revit_micro", 5)
    tensors = dict(model.state_dict())
    tensors["extra.weight"] = tensors.pop("pos_embed")
    tensors["head.weight"] = torch.zeros(7, tensors["head.weight"].shape[1])
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, tensors, "x.safetensors")
    for part in ("unknown extra.weight", "missing pos_embed", "head.weight has shape (7,"):
        assert part in str(caught.value)


def test_another_class_count_leaves_out_the_head_only() -> None:
    torch.manual_seed(0)
    source, target = build("revit_micro", 7), build("revit_micro", 5)
    head = target.head.weight.clone()
    load_weights(target, dict(source.state_dict()), "x.safetensors", head=False)
    assert torch.equal(target.head.weight, head)
    assert torch.equal(target.pos_embed, source.pos_embed)
