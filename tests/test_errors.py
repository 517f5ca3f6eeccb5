"""Errors: the exit codes that docs/errors.md promises, and words that help."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import ROOT
from leanvit import errors

DOCS = ROOT / "docs" / "errors.md"
SRC = ROOT / "src"


def documented_codes() -> set[int]:
    rows = re.findall(r"^\| ([0-9][0-9, ]*) \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    return {int(code) for row in rows for code in row.split(",")}


def all_errors() -> list[type[errors.LeanvitError]]:
    found, queue = [], [errors.LeanvitError]
    while queue:
        queue += (cls := queue.pop()).__subclasses__()
        found.append(cls)
    return found


def test_every_exit_code_is_documented_and_every_documented_code_exists() -> None:
    constants = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert constants == documented_codes() == {0, 2, 3, 4, 5, 6, 70, 130, 143}


@pytest.mark.parametrize(
    ("cls", "code"),
    [
        (errors.ConfigError, 2),
        (errors.UnknownModelError, 2),
        (errors.DataError, 3),
        (errors.ImageError, 3),
        (errors.CalibrationError, 3),
        (errors.ModelError, 3),
        (errors.ShapeError, 3),
        (errors.CheckpointError, 3),
        (errors.ExportError, 3),
        (errors.BundleError, 3),
        (errors.EnvironmentProblem, 4),
        (errors.MissingDependencyError, 4),
        (errors.RunLockedError, 4),
        (errors.NumericalError, 5),
        (errors.VerificationError, 5),
        (errors.PartialError, 6),
    ],
)
def test_each_error_has_the_exit_code_of_its_meaning(cls: type[errors.LeanvitError], code: int) -> None:
    assert cls.exit_code == code


def test_no_error_raised_on_purpose_counts_as_a_bug() -> None:
    assert {cls.__name__ for cls in all_errors() if cls.exit_code == 70} == {"LeanvitError"}


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("onnxruntime", 'pip install "leanvit[onnx]"'),
        ("openvino", 'pip install "leanvit[openvino]"'),
        ("yaml", "pip install pyyaml"),
        ("sklearn", "pip install scikit-learn"),
        ("torch", "pip install torch"),
    ],
)
def test_a_missing_package_names_the_command_that_installs_it(
    module: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(errors.MissingDependencyError, match=f"^{module} is not installed. Run: {re.escape(command)}$"):
        errors.require(module)


def test_a_missing_package_of_an_installed_package_is_not_blamed_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_anywhere"):
        errors.require("needs_more")


def test_require_gives_the_module_itself() -> None:
    import json

    assert errors.require("json") is json


def test_is_installed_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "explodes_on_import.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert errors.is_installed("explodes_on_import")
    assert not errors.is_installed("no_such_package_anywhere")
    assert not errors.is_installed("no_such_package_anywhere.part")
    monkeypatch.setitem(sys.modules, "explodes_on_import", None)
    assert not errors.is_installed("explodes_on_import")


def test_did_you_mean_names_the_nearest_name_or_nothing() -> None:
    known = ["vitaev2_small", "vitae_tiny", "revit_micro"]
    assert errors.did_you_mean("vitae2_small", known) == " Did you mean 'vitaev2_small'?"
    assert errors.did_you_mean("xyz", known) == ""


def test_errors_imports_the_standard_library_only() -> None:
    code = (
        "import sys; import leanvit.errors; "
        "print(*(n for n in sys.modules if n.split('.')[0] not in {*sys.stdlib_module_names, '__main__'}))"
    )
    found = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path.append({str(SRC)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {name.split(".")[0] for name in found.stdout.split()} == {"leanvit"}
