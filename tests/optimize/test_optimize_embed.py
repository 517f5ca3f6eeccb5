"""leanvit.optimize on a network without a classifier, with and without classes of images."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanvit.config import OptimizeOptions
from leanvit.files import read_json
from leanvit.optimize import api
from leanvit.runtime.bundle import read_manifest
from small_vit import classes, clock, pictures, small_vit

FAST = clock(fp32=10.0, w8a8=5.0, w4a8=5.0, w4a16=9.0, mixed=5.0)


@pytest.mark.parametrize("labelled", [True, False])
def test_vectors_are_made_small_by_their_neighbours(labelled: bool, tmp_path: Path) -> None:
    network = small_vit()
    network.reset_classifier(0)
    data = classes(tmp_path / "data", 20) if labelled else pictures(tmp_path / "data", 60)
    options = OptimizeOptions(max_drop=30.0, calibration_images=32)
    result = api.run(network, str(data), tmp_path / "out", options, timer=FAST)
    manifest = read_manifest(tmp_path / "out" / "bundle")
    assert (manifest.task, manifest.labels) == ("embed", ())
    assert result["labelled"] is labelled
    assert 0 < manifest.accuracy["value"] <= 1
    rows = {row["name"]: row for row in read_json(tmp_path / "out" / "optimize.json")["files"]}
    assert "sqnr_db" in rows["w8a8"]["near"]
