"""examples/photos_to_browser.py and detector.py: from pictures to a trained network, to a proven bundle and on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common import main_of
from leanvit.runtime.bundle import read_manifest
from leanvit.web import site
from small_vit import classes
from toy_tasks import HEADS, SIZE, ToyTasks

pytest_plugins = ("toy_tasks",)


def test_photos_become_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(site, "read_files", lambda source: {"ort.js": b"", "ort-wasm.js": b"", "ort-wasm.wasm": b""})
    output = tmp_path / "out"
    main_of("photos_to_browser.py")(
        str(classes(tmp_path / "photos", 14)), str(output), max_drop=100.0, model="vit_micro", epochs=1, batch_size=16,
        device="cpu",
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert f"{output}/bundle: " in lines[-3]
    assert lines[-1] == f"look at it: leanvit web {output}/bundle {output}/page --serve"
    page = json.loads((output / "page" / "web.json").read_text())
    assert {"bundle/model.onnx", "index.html", "ort/ort.js"} <= set(page["files"])
    assert read_manifest(output / "page" / "bundle").task == "classify"


def test_annotations_become_a_detector(toys: ToyTasks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = min((toys.scenes / "images" / "val").iterdir())
    main_of("detector.py")(
        str(toys.scenes), str(tmp_path), str(picture), max_drop=100.0, least=0.01, model="mobilenetv3_small_050",
        img_size=SIZE, epochs=6, batch_size=8, lr=3e-3, grad_accum_steps=1, device="cpu", amp="none", **HEADS["detect"],
    )  # fmt: skip
    told = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(told) if line.startswith("trained: "))
    _, proven, *objects = told[start:]
    assert proven.startswith(f"{tmp_path}/bundle: ")
    assert proven.endswith(" on 8 pictures")
    assert objects
    assert all(line.startswith(f"{picture}: ") and "% at " in line for line in objects)
    assert read_manifest(tmp_path / "bundle").task == "detect"
