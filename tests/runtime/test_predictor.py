"""The bundle in use: torch-free, exact about what it accepts, and unforgiving of a changed byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from leanvit import Predictor
from leanvit.errors import BundleError, ConfigError, ImageError, LeanvitError
from leanvit.runtime.bundle import load_golden, read_manifest, sqnr_db

WITHOUT_TORCH = """
import sys

BLOCKED = ("torch", "timm", "torchvision", "safetensors", "jsonargparse", "rich", "yaml", "sklearn")

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
from leanvit import Predictor
print(Predictor(sys.argv[1]).predict(sys.argv[2], top_k=1)[0][0])
"""


@pytest.fixture
def digit(demo_run: Path, tmp_path: Path) -> Path:
    path = tmp_path / "digit.png"
    path.write_bytes(load_golden(demo_run / "bundle")[0][0])
    return path


def test_predictor_runs_where_importing_torch_or_timm_raises(demo_run: Path, digit: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_TORCH, str(demo_run / "bundle"), str(digit)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == Predictor(demo_run / "bundle").predict(digit, top_k=1)[0][0]


def test_predictions_are_probabilities_in_falling_order(demo_run: Path, digit: Path) -> None:
    predictor = Predictor(demo_run / "bundle")
    best = predictor.predict(digit, top_k=10)
    values = [p for _, p in best]
    assert sum(values) == pytest.approx(1, abs=1e-5)
    assert values == sorted(values, reverse=True)
    assert {label for label, _ in best} == set(predictor.labels)
    images, expected = load_golden(demo_run / "bundle")
    assert best[0][0] == predictor.labels[int(expected[0].argmax())]
    assert predictor.predict(images[0]) == predictor.predict(digit)
    assert predictor.predict(np.asarray(Image.open(digit).convert("RGB"))) == predictor.predict(digit)


def test_batches_do_not_influence_each_other(demo_run: Path) -> None:
    predictor = Predictor(demo_run / "bundle", threads=1)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), dtype=np.uint8)
    together = predictor.logits(pixels)
    alone = np.concatenate([predictor.logits(pixels[i : i + 1]) for i in range(8)])
    assert sqnr_db(alone, together) > 80


def test_wrong_arrays_are_refused(demo_run: Path) -> None:
    predictor = Predictor(demo_run / "bundle")
    with pytest.raises(ConfigError, match=r"expected uint8 \(N, 32, 32, 3\)"):
        predictor.logits(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ConfigError, match=r"\(1, 3, 32, 32\)"):
        predictor.logits(np.zeros((1, 3, 32, 32), np.uint8))
    with pytest.raises(ImageError, match="in RGB order"):
        predictor.predict(np.zeros((32, 32), np.uint8))


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "golden.npz", "verify.json"])
def test_every_changed_byte_is_noticed(demo_run: Path, tmp_path: Path, name: str) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_run / "bundle", bundle)
    original = (bundle / name).read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(0, len(original), 50).tolist():
        changed = bytearray(original)
        changed[position] ^= int(generator.integers(1, 256))
        (bundle / name).write_bytes(changed)
        with pytest.raises(LeanvitError) as caught:
            read_manifest(bundle)
        assert caught.value.exit_code in (3, 5)
    (bundle / name).write_bytes(original)
    assert read_manifest(bundle).profile == "w8a8"


def test_missing_folder_and_missing_file_are_named(demo_run: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="leanvit export"):
        Predictor(tmp_path / "absent")
    bundle = tmp_path / "bundle"
    shutil.copytree(demo_run / "bundle", bundle)
    (bundle / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"golden\.npz: missing"):
        Predictor(bundle)


def test_sqnr_is_that_of_the_definition() -> None:
    truth = np.array([3.0, 4.0])
    assert sqnr_db(truth, truth + np.array([0.05, 0.0])) == pytest.approx(40)
    assert sqnr_db(truth, truth) == 200
    assert sqnr_db(truth, truth * np.nan) == -200


def test_onnxruntime_leaves_no_telemetry_database(demo_run: Path, tmp_path: Path) -> None:
    code = "import sys; from leanvit import Predictor; Predictor(sys.argv[1])"
    hidden = {"ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME"}
    environment = {k: v for k, v in os.environ.items() if k not in hidden} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", code, str(demo_run / "bundle")]
    subprocess.run(command, check=True, env=environment, timeout=120)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == []
