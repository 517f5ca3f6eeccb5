"""examples/your_*.py, run as their pages say; README's lines have the form of what they print."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch

from common import ROOT, main_of, save_image, smooth
from hf_vit import depth_one, save_transformers
from leanvit.files import read_json
from small_vit import clock

PAGE = (ROOT / "docs" / "load.md").read_text(encoding="utf-8")
LABELS = ("day", "night")


def form(line: str) -> str:
    """A printed line without its numbers, names of files and labels."""
    line = re.sub(r"(^|holds )(float|w8a8)[\w-]*", r"\1FILE", line)
    line = re.sub(r"\d+(\.\d+)?", "#", line)
    line = re.sub(r"[\w/.#-]*/[^:]*\.png", "IMAGE", line)
    line = re.sub(r"[\w/.#-]*/(bundle|int#)(?=[: ])", "BUNDLE", line)
    return re.sub(r"(: |ers )[A-Za-z][\w -]*(?= #%)", r"\1LABEL", line)


def shown(example: str) -> set[str]:
    """The forms of the lines that docs/load.md shows for an example."""
    found = re.search(rf"\$ python examples/{example} .*\n((?:[^$`].*\n)+)", PAGE)
    assert found is not None, example
    return {form(line) for line in found.group(1).splitlines()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / "photos"
    for index, name in enumerate(LABELS):
        (folder / name).mkdir(parents=True)
        for number in range(25):
            save_image(folder / name / f"{number:02}.png", smooth(32, 40, seed=100 * index + number))
    return folder


def test_a_file_of_timms_trainer_becomes_the_fastest_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = argparse.Namespace(model="vit_micro", model_kwargs={"depth": 1})
    state = {
        "arch": "vit_micro",
        "args": arguments,
        "state_dict": depth_one().state_dict(),
        "label_names": list(LABELS),
    }
    torch.save(state, tmp_path / "model_best.pth.tar")
    # Random weights have no accuracy to lose: what is held is agreement.
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for path in photos.rglob("*.png"):
        (pictures / f"{path.parent.name}{path.name}").write_bytes(path.read_bytes())
    main_of("your_timm_model.py")(
        "vit_micro", str(tmp_path / "model_best.pth.tar"), str(pictures), str(tmp_path / "out"), by="throughput",
        max_drop=30.0, calibration_images=32, timer=clock(fp32=10.0, w8a8=5.0),
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[-3] == f"{tmp_path / 'out' / 'bundle'} holds w8a8"
    assert {form(line.replace("agreement", "top1")) for line in lines} == shown("your_timm_model.py")


def test_a_network_of_transformers_says_the_same_as_its_bundle(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    save_transformers(tmp_path / "hf", depth_one(), LABELS)
    main_of("your_transformers_model.py")(str(tmp_path / "hf"), str(photos), str(tmp_path / "int8"), min_speedup=0.0)
    first, *images = capsys.readouterr().out.splitlines()
    assert {form(line) for line in (first, *images)} == shown("your_transformers_model.py")
    for line in images:
        (label, probability), (theirs, likely) = re.findall(r"(day|night) ([\d.]+)%", line.partition(": ")[2])
        assert label == theirs
        assert abs(float(probability) - float(likely)) < 3


def test_a_module_of_ones_own_is_what_its_bundle_says(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main_of("your_own_module.py")(str(photos), str(tmp_path / "int8"))
    (line,) = capsys.readouterr().out.splitlines()
    assert {form(line)} == shown("your_own_module.py")
    same, count = map(int, re.findall(r"(\d+) of (\d+)", line)[0])
    assert count == 50
    assert same >= 47
    assert read_json(tmp_path / "int8" / "verify.json")["passed"]
