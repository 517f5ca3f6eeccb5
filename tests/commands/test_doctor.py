"""leanvit doctor: the versions that are there, and how to get what is not."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy
import PIL
import pytest
import torch

from common import ROOT
from leanvit.commands import doctor
from leanvit.commands.doctor import CORE, OPTIONAL, examine

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def package(requirement: str) -> str:
    return re.split(r"[<>=!\[;~ ]", requirement)[0]


def of_name(facts: dict[str, Any], name: str) -> dict[str, Any]:
    return next(entry for entry in facts["packages"] if entry["name"] == name)


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in names:
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)


def machine_with(monkeypatch: pytest.MonkeyPatch, *features: str) -> None:
    facts = {"cpu": "some chip", "cores": 2, "features": list(features), "system": "Linux x86_64"}
    monkeypatch.setattr(doctor, "machine", lambda: facts)


def test_the_core_is_what_pip_installs() -> None:
    assert set(CORE) == {package(requirement) for requirement in PROJECT["dependencies"]}


def test_every_package_of_every_extra_is_examined_and_named_with_an_extra_that_brings_it() -> None:
    extras = {name: {package(r) for r in wanted} for name, wanted in PROJECT["optional-dependencies"].items()}
    del extras["dev"]
    assert set(OPTIONAL) == set().union(*extras.values())
    for name, extra in OPTIONAL.items():
        assert name in extras[extra]


def test_versions_are_those_that_the_packages_give_themselves() -> None:
    facts = examine()
    for name, version in (("torch", torch.__version__), ("numpy", numpy.__version__), ("pillow", PIL.__version__)):
        found = of_name(facts, name)
        assert found["version"].split("+")[0] == version.split("+")[0]
        assert found["how"] == ""
    assert facts["python"] == platform.python_version()


def test_a_missing_extra_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, "onnxruntime", "torch")
    machine_with(monkeypatch, "avx512_vnni", "avx512_bf16")
    facts = examine()
    assert of_name(facts, "onnxruntime") == {
        "name": "onnxruntime", "version": None, "extra": "onnx", "how": 'pip install "leanvit[onnx]"',
    }  # fmt: skip
    assert of_name(facts, "torch")["how"] == "pip install leanvit"
    assert len(facts["advice"]) == 2
    assert "torch" in facts["advice"][0]
    assert "leanvit[onnx]" in facts["advice"][1]


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ((), ["int8", "bfloat16"]),
        (("avx2", "avx512f"), ["int8", "bfloat16"]),
        (("avx512_vnni",), ["bfloat16"]),
        (("avx512_bf16",), ["int8"]),
        (("amx_int8",), ["nothing is missing"]),
        (("avx_vnni", "avx512_bf16"), ["nothing is missing"]),
    ],
)
def test_advice_follows_the_instructions_of_the_chip(
    features: tuple[str, ...], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch)
    monkeypatch.setattr(metadata, "version", lambda name: "1.0")
    machine_with(monkeypatch, *features)
    advice = examine()["advice"]
    assert len(advice) == len(words)
    for sentence, word in zip(advice, words, strict=True):
        assert word in sentence


def test_the_instructions_are_those_of_the_kernel_s_list() -> None:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(re.findall(r"^(?:flags|Features)\s*: (.*)$", info, re.MULTILINE)[0].split())
    found = set(examine()["machine"]["features"])
    assert found <= flags
    assert ("avx2" in found) == ("avx2" in flags)


def test_the_command_prints_every_package(leanvit: Callable[..., Any]) -> None:
    done = leanvit("doctor")
    assert done.code == 0
    assert done.err == ""
    for name in (*CORE, *OPTIONAL):
        assert name in done.out


def test_json_is_the_same_facts(leanvit: Callable[..., Any]) -> None:
    done = leanvit("doctor", "--json")
    assert done.code == 0
    assert json.loads(done.out) == examine()


def test_it_imports_neither_torch_nor_timm() -> None:
    code = "import sys; from leanvit.cli import main; main(['doctor']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "timm", "sklearn", "onnxruntime", "onnx"} & set(done.stderr.split())
