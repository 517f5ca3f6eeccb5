"""The direction of imports: pyproject.toml's contracts hold, and a broken one would be found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = ROOT / "pyproject.toml"
CONTRACTS = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]


def lint(source: Path, folder: Path) -> tuple[int, str]:
    """Exit code and output of lint-imports for the package below `source`, with our contracts."""
    command = [Path(sys.executable).with_name("lint-imports"), "--config", PYPROJECT, "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def counted(output: str) -> tuple[int, int]:
    found = re.search(r"Contracts: (\d+) kept, (\d+) broken", output)
    assert found, output
    return int(found[1]), int(found[2])


def test_every_import_contract_is_kept(tmp_path: Path) -> None:
    code, output = lint(ROOT / "src", tmp_path)
    assert code == 0, output
    assert counted(output) == (len(CONTRACTS), 0)


def test_the_contracts_are_those_of_the_design() -> None:
    layers = next(c["layers"] for c in CONTRACTS if c["type"] == "layers")
    order = [name.strip().removeprefix("leanvit.") for layer in layers for name in layer.split(":")]
    rank = {name: next(i for i, layer in enumerate(layers) if f"leanvit.{name}" in layer) for name in order}
    assert rank["cli"] < rank["report"] <= rank["export"] <= rank["quant"] < rank["data"] <= rank["runtime"]
    assert rank["runtime"] < rank["models"] < rank["config"] < rank["errors"]
    forbidden = {s: set(c["forbidden_modules"]) for c in CONTRACTS if c["type"] == "forbidden"
                 for s in c["source_modules"]}  # fmt: skip
    assert {"leanvit.models", "timm"} <= forbidden["leanvit.quant"]
    assert {"leanvit.quant"} <= forbidden["leanvit.models"]
    for module in ("runtime", "export.bundle", "imaging", "cli"):
        assert {"torch", "timm"} <= forbidden[f"leanvit.{module}"]


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("runtime.py", "import torch", "a bundle is served without torch"),
        ("config/base.py", "import leanvit.train", "data flows one way"),
        ("quant/graph.py", "import timm", "quant knows no model"),
        ("models/revit.py", "import leanvit.quant", "models know nothing of quantization"),
    ],
)
def test_an_import_against_the_direction_is_found(module: str, line: str, contract: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src" / "leanvit", tmp_path / "leanvit", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "leanvit" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    code, output = lint(tmp_path, tmp_path)
    assert code == 1
    assert re.search(f"{contract} BROKEN", output), output


HEAVY = {"torch", "timm", "numpy", "PIL", "onnxruntime", "yaml", "jsonargparse", "rich", "sklearn", "safetensors"}


def modules_after(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print('MODULES', *sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import leanvit",
        "import leanvit; leanvit.__version__; dir(leanvit)",
        "from leanvit.cli import main; main(['--help'])",
        "from leanvit.cli import main; main(['--version'])",
        "from leanvit.cli import main; main(['no-such-verb'])",
    ],
)
def test_start_and_help_import_nothing_heavy(code: str) -> None:
    modules = modules_after(code)
    assert "leanvit" in modules
    assert not HEAVY & modules


@pytest.mark.parametrize("verb", ["train", "quantize", "export", "predict", "demo"])
def test_the_help_of_a_verb_imports_no_framework(verb: str) -> None:
    code = (
        "from leanvit.cli import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "import sys; print('MODULES', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: leanvit {verb}" in done.stdout
    modules = set(done.stdout.rpartition("MODULES")[2].split())
    assert not {"torch", "timm", "numpy", "onnxruntime", "sklearn"} & modules


def test_the_torch_free_modules_import_no_torch() -> None:
    code = "import leanvit.runtime, leanvit.export.bundle, leanvit.imaging, leanvit.config, leanvit.predict"
    modules = modules_after(code)
    assert "numpy" in modules
    assert not {"torch", "timm", "torchvision", "sklearn", "safetensors"} & modules


def test_public_names_are_there_and_lead_to_the_right_place() -> None:
    code = (
        "import leanvit; from leanvit import MPTQConfig, Predictor, QuantizedModel, export, quantize; "
        "assert callable(export) and callable(quantize); "
        "assert {'export', 'quantize', 'Predictor', 'MPTQConfig'} <= set(dir(leanvit)); "
        "assert Predictor.__module__ == 'leanvit.runtime'"
    )
    assert "torch" in modules_after(code)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import leanvit

    with pytest.raises(AttributeError, match="quantise"):
        leanvit.quantise  # noqa: B018
