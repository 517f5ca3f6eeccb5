"""Files of weights, written by timm's trainer, torch and safetensors: the network in them is the original.

Pickles are read in a process of their own, which takes seconds: what is not about pickles is in safetensors here.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo, build, load_checkpoint, save_checkpoint
from leanvit.config import LoadOptions, Preprocess
from leanvit.errors import CheckpointError, ConfigError
from leanvit.load.api import load, load_classifier
from leanvit.load.start import start_from
from leanvit.load.state_dicts import weights_in, without_prefixes


def network(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    return build("vit_micro", kwargs.pop("classes", 3), **kwargs).eval()


def saved(model: nn.Module, folder: Path) -> str:
    save_file(model.state_dict(), folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


@torch.no_grad()
def same(a: nn.Module, b: nn.Module, shape: tuple[int, ...] = (3, 28, 28)) -> bool:
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    return bool((a(x) - b(x)).abs().max() <= 1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, nn.Module]:
    """What timm's trainer saves after one step: the file, the network, and its moving average."""
    folder = tmp_path_factory.mktemp("timm")
    model = network()
    average = ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    model.train()(torch.rand(2, 3, 28, 28)).square().sum().backward()
    optimizer.step()
    average.update(model)
    arguments = Namespace(
        model="vit_micro", mean=[0.1, 0.2, 0.3], std=None, crop_pct=0.8, img_size=None, lr=0.1, opt=None
    )
    saver = CheckpointSaver(model, optimizer, args=arguments, model_ema=average, checkpoint_dir=folder, max_history=1)
    saver.save_checkpoint(0, metric=1.0)
    return folder / "model_best.pth.tar", model.eval(), average.module.eval()


def test_a_checkpoint_of_timms_trainer_is_the_average_and_without_ema_the_network_itself(
    trained: tuple[Path, nn.Module, nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    path, model, average = trained
    loaded, info = load(path)
    assert "state_dict_ema" in capsys.readouterr().err
    assert same(loaded, average)
    assert not same(loaded, model)
    assert same(load(path, LoadOptions(ema=False))[0], model)
    assert (info.architecture, info.labels) == ("vit_micro", ("0", "1", "2"))
    assert (info.preprocess.mean, info.preprocess.crop_pct) == ((0.1, 0.2, 0.3), 0.8)


def nested(state: dict[str, Tensor], shape: str) -> dict[str, Any]:
    def under(prefix: str) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in state.items()}

    return {
        "plain": state,
        "model": {"model": state, "epoch": 3},
        "ddp": {"state_dict": under("module."), "arch": "vit_micro"},
        "compiled ddp": {"state_dict": under("module._orig_mod.")},
        "lightning": {
            "state_dict": {**under("model.net."), "criterion.weight": torch.ones(3)},
            "hyper_parameters": {"model_name": "vit_micro", "lr": 0.1},
            "pytorch-lightning_version": "2.5.0",
        },
        "dino": {"teacher": under("module.backbone."), "student": {}},
    }[shape]


@pytest.mark.parametrize("shape", ["plain", "model", "ddp", "compiled ddp", "lightning", "dino"])
def test_wrappers_of_training_programs_are_seen_through(shape: str) -> None:
    state = network().state_dict()
    tensors, _ = weights_in(nested(state, shape), ema=True)
    found = without_prefixes(tensors, set(state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_checkpoint_of_lightning_says_its_architecture_itself(tmp_path: Path) -> None:
    model = network()
    torch.save(nested(model.state_dict(), "lightning"), tmp_path / "x.ckpt")
    loaded, info = load(tmp_path / "x.ckpt")
    assert same(loaded, model)
    assert (info.architecture, len(info.labels)) == ("vit_micro", 3)


def test_names_under_torch_compile_and_half_precision_in_safetensors_are_taken(tmp_path: Path) -> None:
    model = network()
    compiled = torch.compile(model)
    save_file({name: t.bfloat16() for name, t in compiled.state_dict().items()}, tmp_path / "x.safetensors")
    loaded, _ = load(tmp_path / "x.safetensors", LoadOptions(model_name="vit_micro"))
    assert all(p.dtype == torch.float32 for p in loaded.parameters())
    assert same(loaded, model.bfloat16().float())


def test_a_prefix_that_is_a_part_of_the_network_stays() -> None:
    tensors = {"model.weight": torch.zeros(1), "head.weight": torch.zeros(1)}
    assert set(without_prefixes(tensors, {"model.weight", "head.weight"})) == set(tensors)


def test_classes_channels_and_size_are_those_of_the_file(tmp_path: Path) -> None:
    model = network(classes=7, in_chans=4, img_size=36)
    loaded, info = load(
        saved(model, tmp_path), LoadOptions(model_name="vit_micro", mean=(0.5,), std=(0.1, 0.2, 0.3, 0.4))
    )
    assert same(loaded, model, (4, 36, 36))
    assert (len(info.labels), info.preprocess.input_size, info.preprocess.channels) == (7, (36, 36), 4)
    assert (info.preprocess.mean, info.preprocess.std) == ((0.5,) * 4, (0.1, 0.2, 0.3, 0.4))


def test_a_file_without_a_classifier_embeds(tmp_path: Path) -> None:
    loaded, info = load(saved(network(classes=0), tmp_path), LoadOptions(model_name="vit_micro"))
    assert (info.task, info.labels) == ("embed", ())
    assert loaded(torch.zeros(1, 3, 28, 28)).shape == (1, 96)


@pytest.mark.parametrize("name", ["vit_micro", "swin_micro"])
def test_another_size_has_resampled_positions_as_timm_resamples_them(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build(name, 3).eval()
    path = saved(model, tmp_path)
    loaded, info = load(path, LoadOptions(model_name=name, img_size=(56, 64) if name == "vit_micro" else 64))
    size = info.preprocess.input_size
    # timm's own resize, at which Swin would else take larger windows.
    model.set_input_size(size, **({"window_size": (4, 4)} if name == "swin_micro" else {}))
    assert same(loaded, model, (3, *size))
    save_checkpoint(tmp_path / "own.safetensors", loaded, info)
    assert same(load(tmp_path / "own.safetensors")[0], model, (3, *size))


def test_missing_counters_of_batch_norms_are_no_fault(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("levit_128s", num_classes=2).eval()
    state = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "x.safetensors")
    loaded, _ = load(tmp_path / "x.safetensors", LoadOptions(model_name="levit_128s"))
    assert same(loaded, model, (3, 224, 224))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.write_text, (self.path, "owned"))


def test_a_pickle_with_code_is_refused_by_name_and_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "more": Malicious(tmp_path / "owned"), "net": nn.Linear(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"read safely \(it holds objects of .*(pathlib|torch.nn)"):
        load(tmp_path / "x.pth", LoadOptions(model_name="vit_micro"))
    assert not (tmp_path / "owned").exists()


def test_what_is_missing_is_asked_for_by_name(tmp_path: Path) -> None:
    path = saved(network(), tmp_path)
    with pytest.raises(CheckpointError, match=r"does not say which architecture .* --model NAME"):
        load(path)
    with pytest.raises(CheckpointError, match="does not fit"):
        load(path, LoadOptions(model_name="swin_micro"))
    save_file({"weight": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="NaN"):
        load(tmp_path / "nan.safetensors", LoadOptions(model_name="vit_micro"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load(tmp_path / "gone.pth")


def test_contradictions_name_both_sides(tmp_path: Path) -> None:
    path = saved(network(), tmp_path)
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    (tmp_path / "three.txt").write_text("cat\ndog\nbird\n")
    with pytest.raises(ConfigError, match=r"two.txt holds 2 names, but .* has 3 outputs"):
        load(path, LoadOptions(model_name="vit_micro", labels=str(tmp_path / "two.txt")))
    named = LoadOptions(model_name="vit_micro", labels=str(tmp_path / "three.txt"))
    assert load(path, named)[1].labels == ("cat", "dog", "bird")
    with pytest.raises(ConfigError, match=r"--mean has 2 numbers, but .* takes 3 channels"):
        load(path, LoadOptions(model_name="vit_micro", mean=(0.5, 0.5)))


def test_a_training_starts_from_a_file_with_classes_and_size_of_its_own(tmp_path: Path) -> None:
    trained = build("vit_micro", 3).eval()  # other random weights than network()'s
    model = network(classes=5, img_size=56)
    start_from(model, saved(trained, tmp_path), LoadOptions(model_name="vit_micro"))
    wanted = trained.state_dict()
    found = model.state_dict()
    assert torch.equal(found["blocks.0.attn.qkv.weight"], wanted["blocks.0.attn.qkv.weight"])
    assert found["head.weight"].shape[0] == 5
    assert found["pos_embed"].shape[1] == 14 * 14 + 1
    assert not torch.equal(found["pos_embed"], network(classes=5, img_size=56).state_dict()["pos_embed"])


def test_descriptions_of_timm_networks_are_written_as_before_and_others_say_their_source(tmp_path: Path) -> None:
    info = CheckpointInfo("vit_micro", ("a",), Preprocess((28, 28)))
    assert "source" not in info.as_dict()
    save_checkpoint(tmp_path / "x.safetensors", network(classes=1), info)
    assert load_checkpoint(tmp_path / "x.safetensors")[1] == info == load_classifier(tmp_path / "x.safetensors")[1]
