"""Who may import whom, and what importing leanvit costs."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "torch",
    "timm",
    "torchvision",
    "numpy",
    "PIL",
    "sklearn",
    "onnx",
    "onnxruntime",
    "openvino",
    "jsonargparse",
    "rich",
)


def run_linter(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_import_contracts_are_kept() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    assert {c["name"] for c in contracts} >= {
        "data flows one way",
        "models know nothing of quantization",
        "quant knows no model",
        "a bundle is served without torch",
    }
    result = run_linter()
    assert result.returncode == 0, result.stdout
    assert f"Contracts: {len(contracts)} kept, 0 broken." in result.stdout


def test_a_broken_contract_would_be_noticed(tmp_path: Path) -> None:
    wrong = """
    [tool.importlinter]
    root_package = "leanvit"
    [[tool.importlinter.contracts]]
    name = "upside down"
    type = "layers"
    layers = ["leanvit.errors", "leanvit.cli"]
    """
    (tmp_path / "pyproject.toml").write_text(wrong)
    result = run_linter(cwd=tmp_path)
    assert result.returncode != 0
    assert "1 broken" in result.stdout


@pytest.mark.parametrize(
    "code",
    ["import leanvit", "from leanvit.cli import main; main(['--help'])", "import leanvit.errors, leanvit._version"],
)
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    check = f"{code}; import sys; print('LOADED', *[m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1].strip() == "LOADED"


@pytest.mark.parametrize(
    "module", ["leanvit.runtime", "leanvit.export.bundle", "leanvit.export.verify", "leanvit.predict"]
)
def test_serving_modules_load_no_torch(module: str) -> None:
    check = f"import {module}, sys; print([m for m in ('torch', 'timm', 'safetensors', 'sklearn') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_public_names_are_importable_and_others_are_not() -> None:
    import leanvit

    for name in leanvit.__all__:
        assert getattr(leanvit, name) is not None
    assert callable(leanvit.export)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = leanvit.quantise
