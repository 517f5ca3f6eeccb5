"""The gate as a table: no torch is needed, a check that raises is one that failed, and each row is made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from leanvit.export.gate import verify
from leanvit.export.gate.check import Check, run_steps, verdict
from leanvit.export.gate.evaluation import Evaluation
from leanvit.export.gate.given import Given
from leanvit.export.gate.labels import check_labels
from leanvit.export.gate.verify import Row, verify_bundle


def test_a_bundle_is_verified_without_torch(bundle: Path) -> None:
    code = (
        "import sys\n"
        "from leanvit.cli import main\n"
        f"assert main(['verify', {str(bundle)!r}]) == 0\n"
        "assert not {'torch', 'timm', 'torchvision'} & set(sys.modules), 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=300)


def test_a_new_check_is_one_function_and_one_row(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(given: Given) -> list[Check]:
        size = (given.folder / "model.onnx").stat().st_size
        return [Check("small", size < 10, f"{size} bytes", "fewer than 10 bytes", "Prune it.")]

    asked = Row("needs a plan", lambda given: pytest.fail("a float bundle has no plan"), verify.quantized)
    monkeypatch.setattr(verify, "CHECKS", (*verify.CHECKS, Row("size", small), asked))
    result = verify_bundle(bundle)
    assert not result["passed"]
    assert [row["name"] for row in result["checks"] if row["passed"] is False] == ["small"]


def test_a_check_that_raises_failed_and_the_next_are_still_made() -> None:
    def broken() -> list[Check]:
        raise ValueError("no such\n  tensor")

    found = run_steps([broken, lambda: [Check("next", True, "made", "made")]])
    assert [(check.name, check.passed, check.found) for check in found] == [
        ("run", False, "no such tensor"), ("next", True, "made"),
    ]  # fmt: skip
    assert verdict([Check("open", None, "", "")])["passed"] is True


@pytest.mark.parametrize(
    ("task", "classes", "passed"),
    [
        ("detect", ("cat", "dog"), True),
        ("detect", ("cat", "dog", "cow"), False),
        ("detect", ("car", "bus"), False),
        ("classify", ("car", "bus"), None),
    ],
)
def test_pictures_of_other_classes_are_rejected(
    task: str, classes: tuple[str, ...], passed: bool | None, tmp_path: Path
) -> None:
    """Folders of labelled images may have names of their own, as ImageNet's do: there the predictions tell."""
    np.savez(tmp_path / "golden.npz", labels=np.array(["cat", "dog"]))
    bundle: Any = SimpleNamespace(folder=tmp_path, manifest=SimpleNamespace(task=task, labels=("cat", "dog")))
    evaluation = Evaluation("set", np.zeros((1, 8, 8, 3), np.uint8), classes)
    assert [check.passed for check in check_labels(Given(bundle, evaluation))] == [passed]
