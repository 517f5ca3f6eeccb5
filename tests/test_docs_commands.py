"""Every command and every Python block of every page: the commands parse, the names exist, and the short ones run."""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import ROOT, Outcome
from leanvit.cli import VERBS, parse

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(text: str) -> list[list[str]]:
    """Arguments of each leanvit command in the blocks of a page: fenced with `$ ` before it, or indented."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(r"^(?:\$ |    )(.*\bleanvit [a-z-].*)$", joined, re.MULTILINE):
        words = shlex.split(line, comments=True)
        programs = [index for index, word in enumerate(words) if Path(word).name == "leanvit"]
        starts = words[: programs[0]] if programs else ["no command"]
        # Before it may stand variables, or a launcher up to `-m`.
        if all("=" in word for word in starts) or starts[-1:] == ["-m"]:
            found.append(words[programs[0] + 1 :])
    return found


def mentions(text: str) -> list[list[str]]:
    """Words after `leanvit` in commands that stand inside a sentence, perhaps shortened."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [found.split() for found in re.findall(r"`leanvit ((?:[a-z]+|-)[^`]*)`", prose.replace("\n", " "))]


def split_verb(words: list[str]) -> tuple[str, list[str]]:
    count = 2 if words[0] == "data" else 1
    return " ".join(words[:count]), words[count:]


def require_known_flags(words: list[str]) -> None:
    """The verb and each flag of a shortened command exist."""
    if words[0].startswith("-"):
        assert words[0] in ("--help", "--version")
        return
    verb, rest = split_verb(words)
    assert verb in VERBS, verb
    for flag in (word.partition("=")[0] for word in rest if re.match(r"--[a-z]", word)):
        if flag in ("--help", "--debug"):
            continue
        assert flag in known_flags(verb), flag


def known_flags(verb: str) -> set[str]:
    """Flags that the help of a verb shows."""
    shown = io.StringIO()
    for asked in ([], ["--task", "detect"]) if verb == "train" else ([],):
        with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
            parse(verb, [*asked, "--help"])
    return set(re.findall(r"--[a-z][a-z-]*", shown.getvalue()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        verb, arguments = split_verb(words)
        if "--help" in arguments or (files_missing := "--config" in arguments and "settings.yaml" in arguments):
            require_known_flags(words)
        else:
            assert not files_missing
            parse(verb, arguments)
    for words in mentions(text):
        require_known_flags(words)


def test_commands_are_found_and_wrong_ones_fail() -> None:
    page = "\n".join(
        (
            "$ leanvit val runs/mine --json  # a comment",
            "    X=1 leanvit data inspect photos \\",
            "        --seed 3",
            "    torchrun -m leanvit train --config settings.yaml",
            "    pip install leanvit is no command",
            "In a sentence `leanvit train ... --resume` and `leanvit vall`.",
        )
    )
    assert commands(page) == [
        ["val", "runs/mine", "--json"],
        ["data", "inspect", "photos", "--seed", "3"],
        ["train", "--config", "settings.yaml"],
    ]
    assert mentions(page) == [["train", "...", "--resume"], ["vall"]]
    require_known_flags(["train", "...", "--resume"])
    for wrong in (["vall"], ["train", "--resmue"]):
        with pytest.raises(AssertionError):
            require_known_flags(wrong)


def test_pages_hold_commands_of_most_verbs() -> None:
    found = {split_verb(words)[0] for page in PAGES for words in commands(page.read_text(encoding="utf-8"))}
    assert found <= set(VERBS)
    assert len(found) >= 10


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


CLIENTS = {"tritonclient"}
"""Packages of other programs, that a page shows beside ours."""


def require_names(block: str) -> None:
    """Everything that a block imports is there."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] not in CLIENTS:
                    importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.filterwarnings("error:.*the old path goes:FutureWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.stem)
def test_python_of_every_page_is_right_and_its_imports_exist(page: Path) -> None:
    for block in python_blocks(page):
        require_names(block)


def test_an_import_that_is_not_there_is_found() -> None:
    for wrong in ("from leanvit import quantise", "import leanvit.nowhere", "from leanvit.config import TrainConfg"):
        with pytest.raises(ImportError):
            require_names(wrong)
    with pytest.raises(SyntaxError):
        require_names("model = = 3")


def test_the_short_commands_about_data_and_packed_weights_run(
    image_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leanvit: Callable[..., Outcome]
) -> None:
    image_folder("photos", cat=4, dog=4)
    monkeypatch.chdir(tmp_path)
    wanted: dict[str, tuple[str, Any]] = {
        "data inspect photos": ("data.md", "inspect.html"),
        "models": ("models/README.md", None),
    }
    for start, (page, file) in wanted.items():
        text = (ROOT / "docs" / page).read_text(encoding="utf-8")
        found = [words for words in [*commands(text), *mentions(text)] if " ".join(words).startswith(start)]
        assert found, start
        done = leanvit(*found[0])
        assert done.code == 0, done.err
        assert file is None or list(tmp_path.rglob(file))
