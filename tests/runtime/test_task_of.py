"""What a path is for, told without torch and without trust in what is there."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from leanvit.runtime.task_of import description_of, task_of


def tensors_file(path: Path, **info: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"w": torch.zeros(3)}, path, {"leanvit": json.dumps(info)})
    return path


def raw_file(path: Path, header: bytes, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    return path


def test_checkpoints_runs_quantized_parts_and_bundles_tell_their_task(tmp_path: Path) -> None:
    file = tensors_file(tmp_path / "run" / "model.safetensors", task="pose", labels=["a"])
    assert task_of(file) == task_of(file.parent) == task_of(str(file)) == "pose"
    assert description_of(file) == {"task": "pose", "labels": ["a"]}
    for task, part in (("semantic", "network"), ("segment", "pyramid")):
        quantized = tensors_file(tmp_path / task / part / "quantized.safetensors", task=task).parents[1]
        # A demo's run, which holds whole quantized classifiers, has no report beside them.
        assert task_of(quantized) == "classify"
        (quantized / "quantize.json").write_text("{}")
        assert task_of(quantized) == task
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text(json.dumps({"task": "detect"}))
    assert task_of(tmp_path / "bundle") == "detect"


def test_classifiers_and_all_else_are_for_classification(tmp_path: Path, bundle: Path) -> None:
    for path in (
        tensors_file(tmp_path / "old.safetensors", labels=["a"]), bundle, tmp_path, tmp_path / "gone",
        "revit_micro.fmnist", "", "a\0b", "x" * 5000, "/dev/null",
    ):  # fmt: skip
        assert task_of(path) == "classify", path


@pytest.mark.parametrize(
    "header",
    [
        b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b"[" * 200_000, b"{}",
        b'{"__metadata__": 3}', b'{"__metadata__": {"leanvit": 3}}', b'{"__metadata__": {"leanvit": "[1]"}}',
        b'{"__metadata__": {"leanvit": "{"}}', b'{"__metadata__": {"leanvit": "{\\"task\\": null}"}}',
        b'{"__metadata__": {"leanvit": "{\\"task\\": [\\"pose\\"]}"}}',
    ],
)  # fmt: skip
def test_damaged_files_are_left_to_those_that_open_them(header: bytes, tmp_path: Path) -> None:
    assert task_of(raw_file(tmp_path / "model.safetensors", header)) == "classify"
    assert task_of(tmp_path) == "classify"
    (tmp_path / "bundle.json").write_bytes(header)
    assert task_of(tmp_path) == "classify"


@pytest.mark.parametrize("length", [2**64 - 1, 2**40, (100 << 20) + 1])
def test_a_huge_header_is_not_read(length: int, tmp_path: Path) -> None:
    assert description_of(raw_file(tmp_path / "model.safetensors", b"{}", length)) == {}


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert task_of(tmp_path / "pipe") == "classify"


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_no_bytes_make_it_fail(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    assert isinstance(task_of(path), str)


def test_no_torch_is_imported() -> None:
    program = "import sys, leanvit.runtime.task_of; leanvit.runtime.task_of.task_of('x'); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
