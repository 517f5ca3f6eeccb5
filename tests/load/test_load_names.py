"""timm's names, folders and the hub: what is found without a network, and how fast it is said where it is not."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import timm
import torch
from timm.data import ImageNetInfo
from timm.models import save_for_hf

import leanvit
from leanvit.checkpoint import build, preprocess_for
from leanvit.config import FASHION_MNIST_CLASSES, LoadOptions
from leanvit.errors import CheckpointError, ConfigError
from leanvit.load import hub
from leanvit.load.api import load
from leanvit.load.labels import imagenet_labels, imagenet_synsets, labels_for


@torch.no_grad()
def test_weights_that_come_with_the_package_are_found_by_name_and_tag() -> None:
    network, info = leanvit.load("vit_micro.fmnist")
    original = timm.create_model("vit_micro.fmnist", pretrained=True, num_classes=10).eval()
    x = torch.rand(2, 3, 28, 28)
    assert torch.equal(network(x), original(x))
    assert (info.labels, info.preprocess) == (FASHION_MNIST_CLASSES, preprocess_for(original))
    assert load("vit_micro")[1] == info
    larger, told = load("vit_micro", LoadOptions(img_size=(28, 56)))
    original.set_input_size((28, 56))
    x = torch.rand(2, 3, 28, 56)
    torch.testing.assert_close(larger(x), original(x), atol=1e-6, rtol=0)
    assert told.preprocess.input_size == (28, 56)


def test_random_weights_are_never_taken_for_a_name() -> None:
    with pytest.raises(CheckpointError, match=r"no weights of its own.* --model vitaev2_small"):
        load("vitaev2_small")
    with pytest.raises(CheckpointError, match=r"have the tag 'fmnst'. Did you mean 'fmnist'"):
        load("vit_micro.fmnst")
    with pytest.raises(CheckpointError, match="Did you mean 'vit_micro'"):
        load("vit_mikro")
    with pytest.raises(ConfigError, match=r"--model is swin_micro, but vit_micro.fmnist is a vit_micro"):
        load("vit_micro.fmnist", LoadOptions(model_name="swin_micro"))


@torch.no_grad()
def test_a_folder_that_timm_wrote_is_the_original(tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = build("vit_micro", 3, depth=2, in_chans=1, img_size=20).eval()
    arguments = {"depth": 2, "in_chans": 1, "img_size": 20, "num_classes": 3}
    save_for_hf(original, tmp_path / "it", model_args=arguments, model_config={"label_names": ["cat", "dog", "bird"]})
    for spec in (f"local-dir:{tmp_path / 'it'}", str(tmp_path / "it")):
        network, info = load(spec)
        x = torch.rand(2, 1, 20, 20)
        torch.testing.assert_close(network(x), original(x), atol=1e-6, rtol=0)
        assert info.labels == ("cat", "dog", "bird")
        assert (info.preprocess.input_size, info.preprocess.channels) == ((20, 20), 1)
        again = leanvit.load.__globals__["build"](info)
        again.load_state_dict(network.state_dict())
        assert torch.equal(again.eval()(x), network(x))


@pytest.mark.parametrize("spec", ["hf-hub:nobody/nothing", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_offline_it_is_said_within_seconds_how_to_bring_the_file(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://192.0.2.1")  # TEST-NET-1: nothing answers there (RFC 5737)
    asked: list[str] = []
    answers = hub.answers
    monkeypatch.setattr(hub, "answers", lambda url: asked.append(url) or answers(url))
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"does not answer.* hf download .* local-dir:FOLDER"):
        load(spec)
    assert asked
    assert (
        time.monotonic() - started < 30
    )  # what is waited for the hub itself is PROBE_SECONDS; the rest is this machine
    assert hub.PROBE_SECONDS < 5


def test_imagenets_names_are_different_and_in_the_order_of_its_synsets() -> None:
    labels = imagenet_labels("imagenet-1k")
    assert len(set(labels)) == len(labels) == 1000
    assert (labels[0], labels[999]) == ("tench", "toilet tissue")
    assert labels[134] != labels[517]  # both are cranes
    assert imagenet_synsets(labels) == tuple(ImageNetInfo("imagenet-1k").label_names())
    assert imagenet_synsets(("a", "b")) is None
    assert labels_for(1000, None, "x") == labels
    assert labels_for(2, None, "x") == ("0", "1")
    assert labels_for(2, ["cat", "cat"], "x") == ("cat (0)", "cat (1)")
