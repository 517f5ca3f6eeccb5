"""The core of the tests under the oldest libraries that pyproject.toml allows, or under another Python.

    python benchmarks/versions.py oldest                       every lower bound, with this Python (make test-oldest)
    python benchmarks/versions.py newest --python python3.13   the newest that pip finds, with that Python

Each makes an environment of its own in runs/versions (5 GB, PyTorch is downloaded), runs the tests of CORE there and
has a bundle that this environment wrote, with opset 21, verified by the other's runtimes. Results are merged with
those in benchmarks/results/versions.json; exits with 1 where a test fails or the bundle answers otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from leanvit.files import read_json, write_json
from measure import facts

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "versions.json"
CORE = ("models", "load", "quant", "export", "runtime")
"""Folders of tests: networks, loading, quantization, export with its gate, and what runs bundles."""
EXTRAS = ("onnx", "openvino", "tasks")
TOOLS = ("pytest>=9,<10", "pytest-xdist>=3.8,<4", "filelock", "hypothesis", "torchmetrics", "pyarrow")
"""What the tests of CORE need beside them; their versions are no promise to users."""
PINNED = ("onnx", "openvino")
"""Extras of which `oldest` takes the lower bounds, beside those of the package itself."""
OPSET_23 = "onnxruntime==1.24.1"
"""The first that reads files of opset 23, which the tests write; the lower bound reads those of `--opset 21`."""
REPORTED = ("torch", "torchvision", "timm", "numpy", "scipy", "pillow", "safetensors", "onnx", "onnxscript",
            "onnxruntime", "openvino")  # fmt: skip


def lower_bounds() -> list[str]:
    """Every requirement of the package and of the extras PINNED, at its lower bound: `numpy==2.1`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(r for extra in PINNED for r in project["optional-dependencies"][extra])]
    return [re.sub(r">=([^,]+).*", r"==\1", requirement) for requirement in wanted]


def make_environment(name: str, python: str) -> Path:
    """A fresh environment with leanvit, its EXTRAS and the TOOLS; returns its interpreter."""
    folder = ROOT / "runs" / "versions" / name
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([python, "-m", "venv", folder], check=True)
    interpreter = folder / "bin" / "python"
    bounds = [OPSET_23 if bound.startswith("onnxruntime") else bound for bound in lower_bounds()]
    packages = ["--editable", f"{ROOT}[{','.join(EXTRAS)}]", *TOOLS, *(bounds if name == "oldest" else ())]
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *packages], check=True)
    return interpreter


def run_tests(interpreter: Path, folder: Path) -> dict[str, Any]:
    """How many tests passed, failed and were skipped, and which failed."""
    report = folder / "junit.xml"
    tests = [str(ROOT / "tests" / name) for name in CORE]
    options = ["-m", "not repeat and not ray", "-n", "auto", "--dist", "loadfile", f"--junitxml={report}"]
    subprocess.run([interpreter, "-m", "pytest", *options, *tests], cwd=ROOT, check=False)
    suite = next(ElementTree.parse(report).iter("testsuite"))
    count = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    failed = count["failures"] + count["errors"]
    passed = count["tests"] - failed - count["skipped"]
    cases = [case for case in suite.iter("testcase") if {"failure", "error"} & {part.tag for part in case}]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in cases]
    return {"passed": passed, "failed": failed, "skipped": count["skipped"], "failures": names}


def use_the_lower_bound(interpreter: Path) -> None:
    """Put ONNX Runtime back to what pyproject.toml allows."""
    bound = next(bound for bound in lower_bounds() if bound.startswith("onnxruntime"))
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-deps", bound], check=True)


def verify_bundle(interpreter: Path, folder: Path) -> bool:
    """Whether a bundle of this environment is proved by the other one's runtimes as well."""
    bundle = folder / "bundle"
    shutil.rmtree(bundle, ignore_errors=True)
    export = [sys.executable, "-m", "leanvit", "export", "vit_micro.fmnist", "--opset", "21", "--output", bundle]
    subprocess.run(export, check=True)
    return subprocess.run([interpreter, "-m", "leanvit", "verify", bundle], check=False).returncode == 0


def installed(interpreter: Path) -> dict[str, str]:
    """Versions of the libraries that decide what files say."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {REPORTED}}}))"
    done = subprocess.run([interpreter, "-c", code], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("oldest", "newest"), help="which versions are installed")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environment")
    args = parser.parse_args()
    started = time.monotonic()
    interpreter = make_environment(args.name, args.python)
    python = subprocess.run([interpreter, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]
    counts = run_tests(interpreter, interpreter.parents[1])
    if args.name == "oldest":
        use_the_lower_bound(interpreter)
    row: dict[str, Any] = {
        **facts(),  # whose versions are those of this environment, so that the next take their place
        "name": args.name,
        "python": python,
        "versions": installed(interpreter),
        **counts,
        "bundle": verify_bundle(interpreter, interpreter.parents[1]),
        "seconds": round(time.monotonic() - started),
    }
    kept = read_json(RESULTS)["rows"] if RESULTS.is_file() else []
    write_json(RESULTS, {"version": 1, "rows": [r for r in kept if r["name"] != args.name] + [row]})
    print(f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped; bundle proved: {row['bundle']}")
    return 0 if row["failed"] == 0 and row["bundle"] else 1


if __name__ == "__main__":
    sys.exit(main())
