"""A flag that a verb shows, it obeys: the code of the package reads every field of every verb's configuration."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from common import ROOT
from flag_reads import dead_fields
from leanvit.cli import VERBS

PACKAGE = ROOT / "src" / "leanvit"
DEAD = dead_fields(PACKAGE)


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_a_verb_is_read(verb: str) -> None:
    assert DEAD[VERBS[verb][0]] == set()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package's source that a test may damage."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "leanvit", ignore=shutil.ignore_patterns("*.safetensors")))


def damage(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "cls"),
    [("commands.py", "BenchmarkConfig"), ("training.py", "TrainConfig"), ("evaluation.py", "ValConfig")],
)
def test_a_field_that_nobody_reads_is_found(name: str, cls: str, copy: Path) -> None:
    before = dead_fields(copy)[cls]
    path = copy / "config" / name
    (head,) = re.findall(rf"class {cls}(?:\(\w+\))?:\n", path.read_text(encoding="utf-8"))
    damage(path, head, f'{head}    """Doc."""\n\n    never_read: int = option(3, "What nobody asks for.")\n')
    assert dead_fields(copy)[cls] - before == {"never_read"}


def test_a_field_that_is_no_longer_read_is_found(copy: Path) -> None:
    damage(copy / "commands" / "benchmark.py", "rounds=config.rounds", "rounds=15")
    assert dead_fields(copy)["BenchmarkConfig"] == {"rounds"}


def test_checking_a_value_is_not_obeying_it(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "verbs.py").write_text(
        "class RunConfig:\n    size: int = 1\n    used: int = 2\n    version: int = 1\n"
        "    def __post_init__(self):\n        assert self.size\n"
    )
    (tmp_path / "run.py").write_text("def run(config: RunConfig):\n    return config.used\n")
    assert dead_fields(tmp_path) == {"RunConfig": {"size"}}


def test_what_a_method_reads_counts_where_the_method_is_used(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "verbs.py").write_text(
        "class Base:\n    low: int = 1\n"
        "class RunConfig(Base):\n    high: int = 2\n    other: int = 3\n"
        "    @property\n    def span(self):\n        return self.high - self.low\n"
        "    @property\n    def unused(self):\n        return self.other\n"
    )
    (tmp_path / "run.py").write_text(
        "class Run:\n    def __init__(self, config: RunConfig):\n        self.settings = config\n"
        "    def go(self):\n        return self.settings.span\n"
    )
    assert dead_fields(tmp_path)["RunConfig"] == {"other"}
