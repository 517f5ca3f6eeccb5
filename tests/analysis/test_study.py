"""leanvit analyze: what it writes is what the measures give, whatever one model lacks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import analysis
from leanvit.checkpoint import CheckpointInfo, load_checkpoint, preprocess_for, save_checkpoint
from leanvit.config import load_yaml
from leanvit.data.loader import to_input
from leanvit.data.sets import load_split

Run = Callable[..., Any]
DIGITS = tuple(map(str, range(10)))


def save_model(path: Path, name: str, labels: tuple[str, ...] = DIGITS) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=len(labels))
    save_checkpoint(path, model, CheckpointInfo(name, labels, preprocess_for(model)))
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    names = ("revit_micro", "vit_micro", "exmobilevit_micro", "swin_micro")
    return {name: save_model(folder / f"{name}.safetensors", name) for name in names}


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with np.load(folder / "analysis.npz") as arrays:
        return json.loads((folder / "analysis.json").read_text()), {name: arrays[name] for name in arrays.files}


def test_two_models_are_looked_at_side_by_side(checkpoints: dict[str, Path], tmp_path: Path, leanvit: Run) -> None:
    first, second = checkpoints["revit_micro"], checkpoints["exmobilevit_micro"]
    done = leanvit("analyze", first, second, "--images", 3, "--accuracy-images", 20, "--output", tmp_path / "out",
                   "--resolutions", 32, 64)  # fmt: skip
    assert done.code == 0, done.err
    result, arrays = read(tmp_path / "out")
    assert result["command"].startswith(f"leanvit analyze {first} {second} --images 3 --output ")
    assert "--accuracy-images 20" in result["command"]
    assert load_yaml(tmp_path / "out" / "config.yaml")["models"] == [str(first), str(second)]
    revit, exmobilevit = result["models"]
    assert [m["name"] for m in result["models"]] == [str(first), str(second)]
    assert revit["done"] == ["attention", "rollout", "distance", "diversity", "norms", "alpha", "field", "cost"]
    assert list(revit["left_out"]) == ["shortcut"]
    assert exmobilevit["done"] == ["attention", "distance", "diversity", "norms", "shortcut", "field", "cost"]
    assert exmobilevit["shortcut"]["images"] == 20
    assert len(result["labels"]) == len(revit["predicted"]) == 3
    assert arrays["0/attention/005"].shape == (3, 3, 8, 8)
    assert arrays["1/attention/000"].shape == (3, 4, 8, 8)
    assert arrays["0/rollout"].shape == (3, 8, 8)
    assert arrays["0/field"].shape == (32, 32)
    page = (tmp_path / "out" / "report.html").read_text()
    for title in ("Attention maps", "Attention rollout", "Attention distance", "Token diversity", "Token norms",
                  "Residual weight of attention", "What each scale contributes", "Effective receptive field",
                  "Cost against resolution"):  # fmt: skip
        assert f">{title}" in page


def test_the_numbers_are_those_of_the_measures_on_the_same_images(
    checkpoints: dict[str, Path], tmp_path: Path, leanvit: Run
) -> None:
    path = checkpoints["vit_micro"]
    # Batches that don't divide the images.
    done = leanvit("analyze", path, "--images", 5, "--batch-size", 2, "--seed", 3, "--output", tmp_path,
                   "--resolutions", 28)  # fmt: skip
    assert done.code == 0, done.err
    result, arrays = read(tmp_path)
    model, info = load_checkpoint(path)
    images = load_split("digits", "val")
    chosen = np.random.default_rng(3).permutation(len(images))[:5]
    pixels = np.stack([images.pixels(int(i), info.preprocess) for i in chosen])
    assert np.array_equal(arrays["0/pixels"], pixels)
    assert result["labels"] == [images.classes[images.labels[i]] for i in chosen]
    x = to_input(torch.from_numpy(pixels), info.preprocess)
    layers = analysis.attention_layers(model, x)
    (entry,) = result["models"]
    for index, (layer, row) in enumerate(zip(layers, entry["distance"]["layers"], strict=True)):
        distance = analysis.attention_distance(layer, (28, 28))
        assert row["heads"] == pytest.approx(distance.mean(0).tolist(), rel=1e-4)
        assert np.allclose(arrays[f"0/distance/{index:03d}"], distance, rtol=1e-4)
        assert row["uniform"] == pytest.approx(analysis.uniform_distance(layer, (28, 28)))
        assert np.allclose(arrays[f"0/attention/{index:03d}"], layer.received(), atol=1e-6)
    for tokens, row in zip(analysis.layer_tokens(model, x, layers).values(), entry["diversity"]["layers"], strict=True):
        assert row["diversity"] == pytest.approx(float(analysis.token_diversity(tokens).mean()), rel=1e-4)
        assert row["residual"] == pytest.approx(float(analysis.rank_one_residual(tokens).mean()), rel=1e-4)
    assert np.allclose(arrays["0/rollout"], analysis.rollout_map(layers), atol=1e-6)
    with torch.no_grad():
        assert entry["predicted"] == [info.labels[i] for i in model(x).argmax(1)]


def test_the_same_seed_gives_the_same_files(checkpoints: dict[str, Path], tmp_path: Path, leanvit: Run) -> None:
    written = []
    for name in ("a", "b"):
        arguments = ["--images", 2, "--resolutions", 32, "--output", tmp_path / name]
        assert leanvit("analyze", checkpoints["swin_micro"], *arguments).code == 0
        result = json.loads((tmp_path / name / "analysis.json").read_text())
        written.append(({**result, "date": "", "command": ""}, (tmp_path / name / "analysis.npz").read_bytes()))
    assert written[0] == written[1]


def test_the_page_can_be_drawn_again_with_and_without_pictures(
    checkpoints: dict[str, Path], tmp_path: Path, leanvit: Run
) -> None:
    arguments = ["--images", 2, "--resolutions", 28, "--output", tmp_path]
    assert leanvit("analyze", checkpoints["vit_micro"], *arguments).code == 0
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "report.html").unlink()
    assert leanvit("report", tmp_path).code == 0
    assert (tmp_path / "report.html").read_text() == page
    (tmp_path / "analysis.npz").write_bytes(b"PK\x03\x04 damaged")
    assert "analysis.npz: not readable as arrays" in leanvit("report", tmp_path).error
    (tmp_path / "analysis.npz").unlink()
    assert leanvit("report", tmp_path).code == 0
    bare = (tmp_path / "report.html").read_text()
    assert "Pictures are drawn from analysis.npz, which is not in this folder" in bare
    assert "Attention distance" in bare
    assert "Attention maps" not in bare


def test_a_part_that_no_model_has_is_said_after_the_others_are_written(
    checkpoints: dict[str, Path], tmp_path: Path, leanvit: Run
) -> None:
    arguments = [checkpoints["swin_micro"], "--images", 1, "--output", tmp_path]
    done = leanvit("analyze", *arguments, "--parts", "rollout", "alpha", "distance")
    assert done.code == 6
    assert "rollout was left out: rollout multiplies the attention of all layers" in done.error
    (model,) = read(tmp_path)[0]["models"]
    assert model["done"] == ["distance"]
    assert list(model["left_out"]) == ["rollout", "alpha"]
    # One of two models has it: nothing is missing.
    both = leanvit("analyze", checkpoints["vit_micro"], *arguments, "--parts", "rollout")
    assert both.code == 0


def test_a_model_without_any_of_the_parts_is_an_error(
    checkpoints: dict[str, Path], tmp_path: Path, leanvit: Run
) -> None:
    done = leanvit("analyze", checkpoints["vit_micro"], "--output", tmp_path, "--parts", "alpha")
    assert done.code == 3
    assert "has no residual attention" in done.error
    assert not (tmp_path / "analysis.json").exists()


def test_data_of_other_classes_costs_the_ablation_only(tmp_path: Path, image_folder: Run, leanvit: Run) -> None:
    model = save_model(tmp_path / "m.safetensors", "exmobilevit_micro")
    folder = image_folder("data", cat=6, dog=6)
    (folder / "cat" / "broken.png").write_bytes(b"not an image")
    done = leanvit("analyze", model, "--data", folder, "--images", 4, "--output", tmp_path / "out",
                   "--parts", "shortcut", "distance")  # fmt: skip
    assert done.code == 6
    assert "shortcut was left out: " in done.error
    assert "the model was trained on 0, 1, 2, 3..." in done.error
    assert read(tmp_path / "out")[0]["models"][0]["done"] == ["distance"]


def test_an_image_that_can_not_be_read_gives_its_place_to_another(
    tmp_path: Path, image_folder: Run, leanvit: Run
) -> None:
    model = save_model(tmp_path / "m.safetensors", "vit_micro", ("cat", "dog"))
    folder = image_folder("data/val", cat=2, dog=2)
    image_folder("data/train", cat=2, dog=2)
    broken = sorted((folder / "cat").iterdir())[0]
    broken.write_bytes(b"not an image")
    out = tmp_path / "out"
    done = leanvit("analyze", model, "--data", folder.parent, "--parts", "diversity", "--output", out)
    assert done.code == 0, done.err
    assert f"{broken}" in done.err
    assert "Another image takes its place." in done.err
    assert sorted(read(out)[0]["labels"]) == ["cat", "dog", "dog"]
    for path in folder.rglob("*.png"):
        path.write_bytes(b"not an image")
    assert "no image can be read" in leanvit("analyze", model, "--data", folder.parent, "--output", out).error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "no model given, expected one or two"),
        (["a", "b", "c"], "models has 3 entries, expected one, or two to stand side by side"),
        (["a", "--parts", "rolout"], "Got value: rolout"),
        (["a", "--images", "0"], "images is 0, expected at least 1"),
        (["a", "--resolutions", "0"], "expected sides of at least 1 pixel"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], words: str, leanvit: Run) -> None:
    done = leanvit("analyze", *arguments)
    assert done.code == 2
    assert words in done.error


def test_images_of_any_form_are_looked_at(tmp_path: Path, leanvit: Run) -> None:
    """Grey, wide and transparent images are decoded as everywhere."""
    model = save_model(tmp_path / "m.safetensors", "vit_micro", ("a", "b"))
    for label in ("a", "b"):
        (tmp_path / "data" / label).mkdir(parents=True)
        Image.new("L", (60, 20), 90).save(tmp_path / "data" / label / "grey.png")
        Image.new("RGBA", (20, 20), (9, 90, 200, 100)).save(tmp_path / "data" / label / "clear.png")
    out = tmp_path / "out"
    done = leanvit("analyze", model, "--data", tmp_path / "data", "--parts", "distance", "--output", out)
    assert done.code == 0, done.err
    assert read(out)[1]["0/pixels"].shape == (2, 28, 28, 3)


def test_two_models_of_unlike_splits_are_told_apart(checkpoints: dict[str, Path], tmp_path: Path, leanvit: Run) -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_micro", num_classes=10)
    other = tmp_path / "other model.safetensors"
    save_checkpoint(other, model, CheckpointInfo("vit_micro", DIGITS, preprocess_for(model), seed=5))
    arguments = [checkpoints["vit_micro"], other, "--images", 1, "--parts", "diversity", "--output", tmp_path / "out"]
    done = leanvit("analyze", *arguments)
    assert done.code == 0
    assert f"{other} was trained on another split than" in done.err
    # A path with a space can be given to a shell as it stands.
    assert shlex.split(read(tmp_path / "out")[0]["command"])[3] == str(other)
