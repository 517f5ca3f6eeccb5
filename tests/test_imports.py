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

import import_arrows
from common import ROOT

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


ORDER = next(c["layers"] for c in CONTRACTS if c["type"] == "layers")
ROOMS = [line.strip("()").removeprefix("leanvit.") for line in ORDER]
DATA_FLOW = "data flows one way"
TORCH_FREE = "a bundle is served without torch"
ANY_MODEL = "quant knows no model by name and no data set"


def test_every_room_stands_on_a_line_of_its_own() -> None:
    assert not [line for line in ORDER if ":" in line or "|" in line]
    assert len(set(ROOMS)) == len(ROOMS)
    package = ROOT / "src" / "leanvit"
    found = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "__main__", "_moved", "_version"} <= set(ROOMS)


FORBIDDEN = [
    ("quant/mptq.py", "import leanvit.export.api", DATA_FLOW),
    ("train/loop.py", "from leanvit.quant import mptq", DATA_FLOW),
    ("runtime/predictor.py", "from leanvit.data import sets", DATA_FLOW),
    ("report/html.py", "import leanvit.inspection.run", DATA_FLOW),
    ("models/revit.py", "import leanvit.quant.mptq", DATA_FLOW),
    ("tasks/detect.py", "import leanvit.train.loop", DATA_FLOW),
    ("annotations/coco.py", "import leanvit.runtime.draw", DATA_FLOW),
    ("config/base.py", "import leanvit.train.loop", DATA_FLOW),
    ("export/api.py", "import leanvit.commands.export", DATA_FLOW),
    ("quant/graph.py", "import timm", ANY_MODEL),
    ("quant/mptq.py", "from leanvit.data.sets import specs", ANY_MODEL),
    ("runtime/decode.py", "import torch", TORCH_FREE),
    ("imaging.py", "import torchvision", TORCH_FREE),
    ("annotations/types.py", "import safetensors", TORCH_FREE),
    # What these import needs torch.
    ("runtime/predict.py", "import leanvit.checkpoint", TORCH_FREE),
    ("cli.py", "import leanvit.commands.train", TORCH_FREE),
    ("serve/app.py", "import torch", TORCH_FREE),
    ("serve/models.py", "import leanvit.checkpoint", TORCH_FREE),
    ("commands/serve.py", "import timm", TORCH_FREE),
    ("runtime/predictor.py", "import leanvit.serve.app", DATA_FLOW),
]


@pytest.mark.parametrize("contract", [DATA_FLOW, ANY_MODEL, TORCH_FREE])
def test_each_forbidden_import_breaks_its_contract(contract: str, tmp_path: Path) -> None:
    """All of a contract's at once, for a run takes seconds; each must stand in the report with its own line."""
    shutil.copytree(ROOT / "src" / "leanvit", tmp_path / "leanvit", ignore=shutil.ignore_patterns("__pycache__"))
    expected = []
    for module, line, of in FORBIDDEN:
        if of == contract:
            file = tmp_path / "leanvit" / module
            text = file.read_text(encoding="utf-8") + f"\n{line}\n"
            file.write_text(text, encoding="utf-8")
            expected.append((module, f"(l.{text.count(chr(10))})"))
    code, output = lint(tmp_path, tmp_path)
    assert code == 1
    assert re.search(f"{contract} BROKEN", output), output
    for module, place in expected:
        name = f"leanvit.{module.removesuffix('.py').replace('/', '.')} -> "
        assert [line for line in output.splitlines() if name in line and place in line], (name, output)


def test_no_import_runs_back_or_in_a_circle() -> None:
    found = import_arrows.read(ROOT / "src" / "leanvit")
    rank = {room: place for place, room in enumerate(ROOMS)}
    known = [arrow for arrow in found if {arrow.source_room, arrow.target_room} <= set(rank)]
    back = [arrow for arrow in known if rank[arrow.source_room] > rank[arrow.target_room]]
    assert import_arrows.listed(back) == []
    assert import_arrows.circles(found) == []


def test_an_arrow_back_and_a_circle_are_listed(tmp_path: Path) -> None:
    for name, line in (("one", "from leanvit.two import b"), ("two", "import leanvit.three"), ("three", "")):
        (tmp_path / f"{name}.py").write_text(f"{line}\n", encoding="utf-8")
    found = import_arrows.read(tmp_path)
    assert import_arrows.listed(found) == ["one.py:1 imports leanvit.two", "two.py:1 imports leanvit.three"]
    assert import_arrows.circles(found) == []
    (tmp_path / "three.py").write_text("def late():\n    from leanvit import one\n", encoding="utf-8")
    assert import_arrows.circles(import_arrows.read(tmp_path)) == [["leanvit.one", "leanvit.three", "leanvit.two"]]


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
    code = "import leanvit.runtime, leanvit.runtime.bundle, leanvit.imaging, leanvit.config, leanvit.runtime.predict"
    modules = modules_after(code)
    assert "numpy" in modules
    assert not {"torch", "timm", "torchvision", "sklearn", "safetensors"} & modules


def test_public_names_are_there_and_lead_to_the_right_place() -> None:
    code = (
        "import leanvit; from leanvit import MPTQConfig, Predictor, QuantizedModel, export, quantize; "
        "assert callable(export) and callable(quantize); "
        "assert {'export', 'quantize', 'Predictor', 'MPTQConfig'} <= set(dir(leanvit)); "
        "assert Predictor.__module__ == 'leanvit.runtime.predictor'"
    )
    assert "torch" in modules_after(code)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import leanvit

    with pytest.raises(AttributeError, match="quantise"):
        leanvit.quantise  # noqa: B018
