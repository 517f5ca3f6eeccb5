"""What pyproject.toml declares is what the package imports, and the other way round."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.registry import known_implementations

from common import ROOT
from leanvit.errors import EXTRAS, PACKAGES

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
MODULES = {
    "scikit-image": "skimage", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml",
    "faster-coco-eval": "faster_coco_eval", "segmentation-models-pytorch": "segmentation_models_pytorch",
}  # fmt: skip


def package(requirement: str) -> str:
    return re.split(r"[<>=!\[;~ ]", requirement)[0]


def module(requirement: str) -> str:
    return MODULES.get(package(requirement), package(requirement).replace("-", "_"))


def extra(name: str) -> set[str]:
    return {module(requirement) for requirement in PROJECT["optional-dependencies"][name]}


def imported(folder: Path) -> Iterator[str]:
    """Top-level names that the code below a folder imports, by statement or by `require("name")`."""
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "require":
                names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            yield from (str(name).split(".")[0] for name in names)


CORE = {module(requirement) for requirement in PROJECT["dependencies"]}
EXTRA_NAMES = [name for name in PROJECT["optional-dependencies"] if name != "dev"]
SOURCE = set(imported(ROOT / "src"))


def test_every_core_dependency_is_imported_by_the_package() -> None:
    assert CORE <= SOURCE


@pytest.mark.parametrize("name", EXTRA_NAMES)
def test_an_extra_brings_what_code_imports(name: str) -> None:
    # Peers are what benchmarks compare with; a competitor is no part of the package.
    code = SOURCE | (set(imported(ROOT / "benchmarks")) if name == "peers" else set())
    assert extra(name) <= code | opened_by_scheme(name)


def opened_by_scheme(scheme: str) -> set[str]:
    """The package that fsspec imports for URLs of a scheme, by its own table; none where it knows no such scheme."""
    known = known_implementations.get(scheme, {"class": ""})
    return {known["class"].split(".")[0]}


def test_the_package_imports_only_what_is_declared() -> None:
    declared = CORE.union(*(extra(name) for name in EXTRA_NAMES))
    assert SOURCE - sys.stdlib_module_names - {"leanvit", ""} - declared == set()


def test_the_extra_that_an_error_names_brings_the_package() -> None:
    for name, brought_by in EXTRAS.items():
        assert name.split(".")[0] in extra(brought_by), name
    for name, distribution in PACKAGES.items():
        assert module(distribution) == name


def test_an_import_in_a_function_and_by_require_are_both_seen(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("def f():\n    import a.b\n    from c.d import e\n    return require('g.h')\n")
    assert set(imported(tmp_path)) == {"a", "c", "g"}
