"""python: and torchvision: the original's outputs, labels and preprocessing; what is gone or wrong is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision import models

from leanvit.checkpoint import save_checkpoint
from leanvit.config import LoadOptions
from leanvit.errors import CheckpointError, ConfigError, UnknownModelError
from leanvit.load.api import build, load

MINE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), nn.Linear(16, 2))
    def forward(self, x):
        return {"logits": self.layer(x)}

def net():
    return Net().half(), {"labels": ["cat", "dog"], "input_size": (8, 8), "mean": (0.5, 0.5, 0.5), "crop_pct": 0.5}

def bare():
    return Net()

def broken():
    raise ValueError("no weights here")

def other():
    return 3
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path / "mine.py"


@torch.no_grad()
def test_a_network_of_ones_own_is_what_its_function_builds(mine: Path, tmp_path: Path) -> None:
    network, info = load(f"python:{mine}:net")
    names: dict[str, object] = {}
    exec(compile(MINE, "mine", "exec"), names)
    x = torch.rand(2, 3, 8, 8)
    original = names["Net"]().half().float()  # type: ignore[operator]
    torch.testing.assert_close(network(x), original(x)["logits"], atol=1e-6, rtol=0)
    assert (info.architecture, info.labels) == ("Net", ("cat", "dog"))
    assert (info.preprocess.input_size, info.preprocess.mean, info.preprocess.crop_pct) == ((8, 8), (0.5,) * 3, 0.5)
    save_checkpoint(tmp_path / "own.safetensors", network, info)
    again, told = load(tmp_path / "own.safetensors")
    assert told == info
    assert torch.equal(again(x), network(x))
    mine.unlink()
    with pytest.raises(CheckpointError, match=r"gone, but the network was built by its net\(\)"):
        build(info)


@pytest.mark.parametrize(
    ("function", "kind", "words"),
    [
        ("bare", ConfigError, "does not say its input size. Give --img-size"),
        ("broken", CheckpointError, r"broken\(\) raised ValueError: no weights here"),
        ("other", CheckpointError, "returned int, expected a torch.nn.Module"),
        ("nett", CheckpointError, "has no nett. Did you mean 'net'"),
    ],
)
def test_what_a_file_of_ones_own_gets_wrong_is_named(function: str, kind: type, words: str, mine: Path) -> None:
    with pytest.raises(kind, match=words):
        load(f"python:{mine}:{function}")
    assert load(f"python:{mine}:bare", LoadOptions(img_size=8))[1].labels == ("0", "1")


@torch.no_grad()
def test_torchvision_has_its_own_weights_categories_and_transform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    torch.manual_seed(0)
    original = models.squeezenet1_1().eval()
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.save(original.state_dict(), tmp_path / "checkpoints" / Path(weights.url).name)
    for spec in ("torchvision:squeezenet1_1", "torchvision:squeezenet1_1.IMAGENET1K_V1"):
        network, info = load(spec)
        x = torch.rand(1, 3, 224, 224)
        assert torch.equal(network(x), original(x))
    assert (info.labels[0], len(set(info.labels))) == ("tench", 1000)
    told, found = weights.transforms(), info.preprocess
    assert (found.input_size, found.mean, found.std) == ((224, 224), tuple(told.mean), tuple(told.std))
    assert (found.interpolation, int(224 / found.crop_pct)) == (told.interpolation.value, told.resize_size[0])
    again = build(info)
    again.load_state_dict(network.state_dict())
    with pytest.raises(UnknownModelError, match="Did you mean 'squeezenet1_1'"):
        load("torchvision:squeezenet11")
    with pytest.raises(CheckpointError, match="Known: IMAGENET1K_V1"):
        load("torchvision:squeezenet1_1.V7")
