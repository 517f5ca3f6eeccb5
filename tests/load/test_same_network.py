"""One network as transformers, timm and a file of Python: bundles with the same outputs, labels, preprocessing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models import save_for_hf

from common import Outcome, save_image, smooth
from hf_vit import depth_one, save_transformers
from leanvit.files import read_json
from leanvit.runtime.bundle import read_manifest
from leanvit.runtime.predictor import Predictor

pytest.importorskip("transformers")

LABELS = ("day", "night")
MINE = """
import sys
import torch
from torch import nn
sys.path.insert(0, {helpers!r})
from hf_vit import depth_one

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = depth_one()
        self.inner.load_state_dict(torch.load({weights!r}))
    def forward(self, x):
        return {{"logits": self.inner(x)}}

def network():
    half = (0.5, 0.5, 0.5)
    return Mine(), {{"labels": ["day", "night"], "input_size": (28, 28), "mean": half, "std": half,
                    "interpolation": "bilinear", "crop_mode": "squash"}}
"""


@torch.no_grad()
def test_bundles_of_three_libraries_say_the_same(tmp_path: Path, leanvit: Callable[..., Outcome]) -> None:
    network, half = depth_one(), [0.5, 0.5, 0.5]
    save_transformers(tmp_path / "hf", network, LABELS)
    described = {"mean": half, "std": half, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    network.pretrained_cfg = {**network.pretrained_cfg, **described}
    save_for_hf(network, tmp_path / "timm", {"label_names": list(LABELS)}, {"depth": 1, "num_classes": 2})
    torch.save(network.state_dict(), tmp_path / "mine.pth")
    helpers = str(Path(__file__).parents[1] / "helpers")
    (tmp_path / "mine.py").write_text(MINE.format(helpers=helpers, weights=str(tmp_path / "mine.pth")))

    pictures = [save_image(tmp_path / f"{seed}.png", smooth(40, 56, seed)) for seed in range(4)]
    found: dict[str, Any] = {}
    for spec in (f"transformers:{tmp_path / 'hf'}", f"local-dir:{tmp_path / 'timm'}",
                 f"python:{tmp_path / 'mine.py'}:network"):  # fmt: skip
        kind = spec.partition(":")[0]
        done = leanvit("export", spec, "--output", tmp_path / kind)
        assert done.code == 0, done.err
        manifest, predictor = read_manifest(tmp_path / kind), Predictor(tmp_path / kind)
        assert read_json(tmp_path / kind / "verify.json")["passed"]
        prepared = np.stack([predictor.prepare(one) for one in pictures])
        found[kind] = (manifest.labels, manifest.preprocess, manifest.task, prepared, predictor.outputs(prepared))
    first = found.pop("transformers")
    x = (torch.from_numpy(first[3]).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    own = network(x).numpy()
    assert np.ptp(own, axis=0).min() > 0.01  # pictures are told apart
    assert np.abs(first[4]["logits"] - own).max() < 1e-5
    for labels, preprocess, task, prepared, outputs in found.values():
        assert (labels, preprocess, task) == first[:3] == (LABELS, first[1], "classify")
        assert np.array_equal(prepared, first[3])
        assert np.abs(outputs["logits"] - first[4]["logits"]).max() < 1e-5
