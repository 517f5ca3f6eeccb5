"""Authors' checkpoints through the public entries: from_official, fuse and leanvit convert."""

from __future__ import annotations

import pickle
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common import GOLDEN_FOLDER
from leanvit.checkpoint import load_checkpoint
from leanvit.cli import main
from leanvit.errors import CheckpointError, ConfigError, ModelError
from leanvit.models import from_official, fuse
from official import load_golden, official_keys

GOLDEN = {
    "revit_small": "revit",
    "revit_small_cls": "revit",
    "remvitv2_small": "remvitv2",
    "reswin_small_w7": "reswin",
    "mobilevit_s_base_small": "mobilevit",
    "exmobilevit_576_small": "exmobilevit_576",
    "exmobilevit_928_small": "exmobilevit_928",
    "vitae_v1_performer_64": "vitae",
    "vitae_v1_clstoken_64": "vitae",
    "vitaev2_64": "vitaev2",
    "vitaev2_relpos_64": "vitaev2",
}


@pytest.mark.parametrize("name", GOLDEN)
@torch.no_grad()
def test_official_checkpoint_gives_official_logits_before_and_after_fusing(name: str) -> None:
    weights, tensors, config = load_golden(name)
    x, logits = tensors["input"], tensors["logits"]
    model = from_official(GOLDEN[name], weights, config)
    torch.testing.assert_close(model(x), logits, atol=1e-4, rtol=0)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fused = fuse(model)
    torch.testing.assert_close(fused(x), logits, atol=1e-4, rtol=0)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_unknown_family_suggests_a_known_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'vitaev2'"):
        from_official("vitae2", {"a": torch.zeros(1)})


def test_wrapped_checkpoints_are_unwrapped_and_empty_ones_refused() -> None:
    weights, tensors, config = load_golden("revit_small")
    x, logits = tensors["input"], tensors["logits"]
    wrapped = {"epoch": 3, "model_state": {f"module.{key}": tensor for key, tensor in weights.items()}}
    with torch.no_grad():
        torch.testing.assert_close(from_official("revit", wrapped, config)(x), logits, atol=1e-4, rtol=0)
    with pytest.raises(CheckpointError, match="no weights in the checkpoint; its keys are epoch"):
        from_official("revit", {"epoch": 3})


def test_a_model_without_inference_form_is_named() -> None:
    with pytest.raises(ModelError, match="Linear has no inference form"):
        fuse(nn.Linear(2, 2))


@pytest.fixture(scope="module")
def published() -> dict[str, Tensor]:
    """Weights of the published ExMobileViT-640 under the authors' names, by the golden files' rule."""
    value = runpy.run_path(str(GOLDEN_FOLDER / "fill_revit_exmobilevit.py"))["value"]
    keys = official_keys("exmobilevit_640")
    return {key: torch.from_numpy(np.asarray(value(key, tuple(shape)))) for key, shape in keys.items()}


def test_convert_recognises_the_family_and_keeps_the_authors_logits(
    published: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": published, "epoch": 300}, tmp_path / "authors.pth")
    assert main(["convert", str(tmp_path / "authors.pth"), str(tmp_path / "model.safetensors")]) == 0
    assert "exmobilevit_640" in capsys.readouterr().out
    model, info = load_checkpoint(tmp_path / "model.safetensors")
    assert (info.architecture, len(info.labels)) == ("exmobilevit_640", 1000)
    image = runpy.run_path(str(GOLDEN_FOLDER / "fill_revit_exmobilevit.py"))["image"]("exmobilevit_640", 2, 256)
    expected = torch.from_numpy(np.load(GOLDEN_FOLDER / "full_exmobilevit_640.npz")["logits"])
    with torch.no_grad():
        torch.testing.assert_close(model(image), expected, atol=1e-4, rtol=0)


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.write_text, (self.path, "owned"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trap = tmp_path / "owned.txt"
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Malicious(trap)}))
    torch.save({"state_dict": Malicious(trap)}, tmp_path / "evil2.pth")
    for name in ("evil.pth", "evil2.pth"):
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out.safetensors")]) == 3
        assert "not a checkpoint that can be read safely" in capsys.readouterr().err
    assert not trap.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_of_no_family_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "x.pth")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "out.safetensors")]) == 3
    assert "fits no family" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "absent.pth"), str(tmp_path / "out.safetensors")]) == 3
