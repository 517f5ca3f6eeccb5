"""Shipped recipes: they parse, and each opens with what a reader needs to trust and repeat it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from common import ROOT
from leanvit.cli import parse
from leanvit.config import TrainConfig, from_dict, load_yaml

RECIPES = sorted((ROOT / "configs" / "train").glob("*.yaml"))
HEADER = ("Recipe:", "Command:", "Hardware:", "Reached:", "Paper:")


def header(recipe: Path) -> dict[str, str]:
    lines = [line.removeprefix("# ") for line in recipe.read_text().splitlines() if line.startswith("#")]
    return {key: line.removeprefix(key).strip() for key in HEADER for line in lines if line.startswith(key)}


def test_there_are_recipes() -> None:
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_a_training_configuration_named_after_its_model(recipe: Path) -> None:
    config = from_dict(TrainConfig, load_yaml(recipe), recipe.name)
    assert recipe.stem.startswith(config.model.split(".")[0])
    assert config.output == f"runs/{recipe.stem}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_opens_with_command_hardware_and_the_number_reached(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = header(recipe)
    assert tuple(found) == HEADER
    command = [word for word in shlex.split(found["Command:"]) if "=" not in word]
    monkeypatch.chdir(ROOT)
    if command[0] == "python":
        # A script that prepares the weights to start from, then trains by this recipe
        assert (ROOT / command[1]).is_file()
        assert recipe.stem == f"{command[2]}_fmnist"
        return
    assert command[:2] == ["leanvit", "train"]
    assert parse("train", command[2:]) == from_dict(TrainConfig, load_yaml(recipe), recipe.name)


TASK_RECIPES = sorted((ROOT / "configs" / "tasks").glob("*.yaml"))


@pytest.mark.parametrize("recipe", TASK_RECIPES, ids=lambda path: path.stem)
def test_a_recipe_of_a_task_is_its_command_and_says_what_it_reached(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = from_dict(TrainConfig, load_yaml(recipe), recipe.name)
    assert recipe.stem.startswith(config.model)
    assert config.output == f"runs/{recipe.stem}"
    found = header(recipe)
    assert tuple(found) == HEADER
    monkeypatch.chdir(ROOT)
    command = shlex.split(found["Command:"])
    assert command[:2] == ["leanvit", "train"]
    assert parse("train", command[2:]) == config
