"""examples/embeddings.py, run as its page says."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import main_of, save_image
from leanvit.data.sets import load_split
from leanvit.runtime.bundle import read_manifest


def test_the_example_finds_the_image_itself_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = load_split("digits", "val")
    for number in range(80):
        folder = tmp_path / "photos" / str(images.labels[number] % 2)
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / f"{number:02}.png", images.sources[number])
    main = main_of("embeddings.py")
    main("vit_micro.fmnist", str(tmp_path / "photos"), str(tmp_path / "bundle"))
    lines = capsys.readouterr().out.splitlines()
    assert "the neighbours of an image call it by its label in" in lines[0]
    first = min((tmp_path / "photos").rglob("*.png"))
    assert lines[1] == f"1.0000 {first}"
    assert read_manifest(tmp_path / "bundle").answers == {"normalize": True}
