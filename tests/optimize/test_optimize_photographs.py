"""Photographs without classes, as they lie in a folder: what is no image of the user's, and what is not read."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import save_image, smooth
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Preprocess
from leanvit.errors import PartialError
from leanvit.optimize.images import _photographs, _without_classes
from leanvit.passed_over import gathering


def test_formats_that_are_not_read_are_left_out_of_photographs_and_counted(tmp_path: Path) -> None:
    for number in range(5):
        save_image(tmp_path / f"{number}.png", smooth(8, 8, seed=number))
    (tmp_path / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    for name in ("__MACOSX", "@eaDir"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "._0.png").write_bytes(b"\0\5\x16\7")
    assert _without_classes(tmp_path) == (tmp_path,)
    info = CheckpointInfo(architecture="vit_micro", labels=("a", "b"), preprocess=Preprocess(input_size=(8, 8)))
    with gathering() as gathered:
        sets = _photographs(str(tmp_path), (tmp_path,), info, 0)
    assert sorted(path.name for one in sets for path in one.sources) == [f"{number}.png" for number in range(5)]
    with pytest.raises(PartialError, match=r"1 was left out .*IMG_1\.HEIC"):
        gathered.require_none()
