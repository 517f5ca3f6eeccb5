"""examples/on_ray.py: a row for every image, said as the bundle says it, and a damaged image by its reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

from common import main_of, save_image, smooth
from leanvit import Predictor

IMAGES = 12


@pytest.mark.ray
def test_a_folder_is_predicted_on_ray(
    cluster: ModuleType, shared_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [save_image(folder / f"{number:02d}.png", smooth(24, 24, seed=number)) for number in range(IMAGES)]
    paths.pop().write_bytes(b"no picture")
    main = main_of("on_ray.py")
    arguments = str(shared_bundle), str(folder), str(tmp_path / "found")
    main(*arguments, part_images=5)
    first, *told = capsys.readouterr().out.splitlines()
    assert first.startswith("not all: 1 of 12 images could not be read")
    assert told[0] == f"{IMAGES} images in 3 parts"
    assert told[-1].startswith(f"{folder}/11.png: ")
    predictor = Predictor(shared_bundle)
    expected = Counter(predictor.predict(path)[0][0] for path in paths)
    assert {label: int(count) for label, count in (line.split(": ") for line in told[1:-1])} == expected
    main(*arguments, part_images=5)  # all is there: nothing is made again, and the same is told
    assert capsys.readouterr().out.splitlines() == [first, *told]
