"""Weights in the package: complete, small, honest, and loaded without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

import leanvit.models
from common import ROOT
from leanvit.checkpoint import load_checkpoint, preprocess_for, read_tensors
from leanvit.config import FASHION_MNIST_CLASSES, TrainConfig, from_dict, load_yaml
from leanvit.data.loader import Loader
from leanvit.data.sets import FASHION_MNIST_FOLDER, load_split
from leanvit.models._pretrained import WEIGHTS, weights_file
from leanvit.train import evaluate

RECIPES = ROOT / "configs" / "train"
FILES = sorted(WEIGHTS.glob("*.safetensors"))
NAMES = [file.name.partition(".")[0] for file in FILES]
DELIVERED = {
    "deit_micro",
    "exmobilevit_micro",
    "reswin_micro",
    "revit_micro",
    "swin_micro",
    "vit_micro",
    "vitae_micro",
    "vitaev2_micro",
}
LIMIT = 3_000_000


def metrics(name: str) -> dict[str, Any]:
    _, metadata = read_tensors(weights_file(name))
    return dict(json.loads(metadata["leanvit"])["metrics"])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights of the package must not be downloaded")

    monkeypatch.setattr("socket.socket.connect", refuse)


def test_every_micro_model_of_the_issue_has_weights() -> None:
    assert set(NAMES) == DELIVERED


@pytest.mark.parametrize(
    ("name", "cls"),
    [("vit_micro", VisionTransformer), ("deit_micro", VisionTransformerDistilled), ("swin_micro", SwinTransformer)],
)
def test_plain_members_are_timm_classes(name: str, cls: type) -> None:
    assert type(timm.create_model(name)) is cls


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tag", ["", ".fmnist"])
def test_timm_loads_the_weights_of_the_package(name: str, tag: str) -> None:
    model = timm.create_model(name + tag, pretrained=True)
    tensors, _ = read_tensors(weights_file(name))
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[key].to(value.dtype), value) for key, value in tensors.items())
    assert all(value.dtype == torch.float16 for value in tensors.values() if value.is_floating_point())
    assert model.num_classes == 10
    assert model.pretrained_cfg["tag"] == "fmnist"
    assert model.pretrained_cfg["label_names"] == FASHION_MNIST_CLASSES


@pytest.mark.parametrize("name", NAMES)
def test_head_of_another_task_is_new_and_the_rest_is_loaded(name: str) -> None:
    model = timm.create_model(name, pretrained=True, num_classes=3)
    tensors, _ = read_tensors(weights_file(name))
    state = model.state_dict()
    classifier = model.pretrained_cfg["classifier"]
    heads = (classifier,) if isinstance(classifier, str) else classifier
    kept = [key for key in tensors if not key.startswith(tuple(f"{head}." for head in heads))]
    assert len(tensors) - len(kept) == sum(len(model.get_submodule(head).state_dict()) for head in heads)
    assert all(torch.equal(state[key].to(tensors[key].dtype), tensors[key]) for key in kept)
    assert model(torch.zeros(1, *model.pretrained_cfg["input_size"])).shape == (1, 3)


@pytest.mark.parametrize("name", NAMES)
def test_file_is_small_and_is_a_checkpoint_with_the_preprocessing_of_timm(name: str) -> None:
    assert weights_file(name).stat().st_size <= LIMIT
    model, info = load_checkpoint(weights_file(name))
    assert info.architecture == name
    assert info.labels == FASHION_MNIST_CLASSES
    assert info.preprocess == preprocess_for(timm.create_model(name))
    x = torch.randn(2, 3, *info.preprocess.input_size, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), timm.create_model(name, pretrained=True).eval()(x))


@pytest.mark.parametrize("name", NAMES)
def test_metadata_says_what_was_reached_and_how(name: str) -> None:
    found = metrics(name)
    assert found["images"] == 10_000
    assert found["top1"] == pytest.approx(found["correct"] / 100)
    assert found["top1"] >= 85
    recipe = RECIPES / f"{name}_fmnist.yaml"
    assert f"OMP_NUM_THREADS=1 {found['command']}\n" in recipe.read_text()
    config = from_dict(TrainConfig, load_yaml(recipe), str(recipe))
    assert (config.model, config.epochs, config.data) == (name, found["epoch"], "fashion-mnist")
    assert f"{found['correct']:,} of 10,000" in recipe.read_text()


@pytest.mark.skipif(not Path(FASHION_MNIST_FOLDER).is_dir(), reason="Debian package dataset-fashion-mnist is absent")
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_is_what_the_metadata_says(name: str) -> None:
    model = timm.create_model(name, pretrained=True)
    images = load_split("fashion-mnist", "val").subset(torch.arange(1000).numpy())
    assert abs(evaluate(model, Loader(images, preprocess_for(model), 250)).top1 - metrics(name)["top1"]) < 3


def test_weights_belong_to_registered_models_with_a_recipe() -> None:
    registered = {entry["name"] for entry in leanvit.models.list_models()}
    assert set(NAMES) <= registered
    assert {path.name for path in RECIPES.glob("*_micro_fmnist.yaml")} == {f"{name}_fmnist.yaml" for name in NAMES}
