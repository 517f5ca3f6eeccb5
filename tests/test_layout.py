"""Where tests and their helpers lie: no test file needs another, and what two of them use is written once."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from common import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("test_*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def test_no_test_file_imports_another() -> None:
    assert [(path.name, name) for path in FILES for name in imports(path) if name.startswith("test_")] == []


def test_names_of_test_files_and_helpers_are_unique() -> None:
    counted = Counter(path.name for path in [*FILES, *(TESTS / "helpers").glob("*.py")])
    assert [name for name, count in counted.items() if count > 1] == []


def test_test_folders_have_the_names_of_rooms() -> None:
    rooms = {path.name for path in (ROOT / "src" / "leanvit").iterdir() if path.is_dir()}
    others = {"benchmarks", "golden", "helpers", "outside", "__pycache__"}
    assert {path.name for path in TESTS.iterdir() if path.is_dir()} - others <= rooms


def test_what_reads_golden_files_is_written_once() -> None:
    for name in ("load_golden", "fill_module", "official_keys"):
        text = f"def {name}("
        found = [path.name for path in TESTS.rglob("*.py") if text in path.read_text(encoding="utf-8")]
        assert found == ["official.py"], name
