"""The pages about models: their code runs, their commands parse, their figures and tables are what the code gives."""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest
import timm

from common import ROOT
from leanvit.cli import parse
from leanvit.data.sets import KINDS, load_split
from leanvit.models import model_names
from leanvit.models._convert import FAMILIES as OFFICIAL

PAGES = ROOT / "docs" / "models"
FAMILIES = sorted({timm.model_entrypoint(name).__module__.rpartition(".")[2] for name in model_names()})
MARKDOWN = [ROOT / "README.md", ROOT / "LEADERBOARD.md", ROOT / "LOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = (
    "Equations",
    "Variants",
    "Use",
    "Options",
    "How it differs from the authors' program",
    "Authors' checkpoints",
    "Citation",
)
STALE = "run: .venv/bin/python docs/figures.py"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(path), re.DOTALL)


@pytest.fixture(scope="module")
def figures() -> Iterator[ModuleType]:
    """docs/figures.py, imported as the script that it is."""
    sys.path.insert(0, str(ROOT / "docs"))
    import figures

    yield figures
    sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def wanted(figures: ModuleType) -> dict[Path, str]:
    """Every generated file and what the code gives for it now."""
    return figures.outputs()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_registered_family_has_a_page_with_its_models(family: str) -> None:
    page = PAGES / f"{family}.md"
    assert page.is_file(), f"{family} has no page: write {page.relative_to(ROOT)}"
    for name in model_names():
        if timm.model_entrypoint(name).__module__.endswith(f".{family}"):
            assert f"| `{name}` |" in read(page), f"{page.name} lacks {name}; {STALE}"
    assert f"({page.name})" in read(PAGES / "README.md")


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda page: page.stem)
def test_python_of_a_page_runs(page: Path) -> None:
    assert blocks(page, "python")
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(block, names)


@pytest.mark.parametrize("family", [f for f in FAMILIES if hasattr(import_module(f"leanvit.models.{f}"), "PAPER")])
def test_pages_of_papers_answer_the_same_questions(family: str) -> None:
    page = PAGES / f"{family}.md"
    found = re.findall(r"^## (.+)$", read(page), re.MULTILINE)
    assert [section for section in found if section in SECTIONS] == list(SECTIONS)
    assert blocks(page, "math")
    assert f"]({page.stem}.svg)" in read(page)
    assert len(blocks(page, "bibtex")) == 1


def test_every_family_of_the_authors_has_its_way_to_convert_on_a_page() -> None:
    told = set()
    for page in PAGES.glob("*.md"):
        for line in "".join(blocks(page, "console")).splitlines():
            program, verb, *arguments = shlex.split(line.removeprefix("$ "))
            assert (program, verb) == ("leanvit", "convert")
            told.add(parse(verb, arguments).family)
        told |= set(re.findall(r'from_official\("(\w+)"', read(page)))
        told |= set(re.findall(r"`(exmobilevit_\d+)`", read(page)))
    assert told == set(OFFICIAL)


def test_tables_and_figures_are_what_the_code_gives(wanted: dict[Path, str]) -> None:
    stale = [path.name for path, content in wanted.items() if not path.exists() or read(path) != content]
    assert not stale, STALE


def test_every_figure_is_drawn_by_the_script_and_shown_on_a_page(figures: ModuleType) -> None:
    drawn = {path.name for path in PAGES.glob("*.svg")}
    shown = {link for page in PAGES.glob("*.md") for link in re.findall(r"!\[[^]]+\]\(([^)]+)\)", read(page))}
    assert drawn == shown == set(figures.FIGURES)


def test_figures_are_valid_and_nothing_leaves_them(wanted: dict[Path, str]) -> None:
    for path, content in wanted.items():
        if path.suffix != ".svg":
            continue
        root = ElementTree.fromstring(content)
        width, height = map(float, root.attrib["viewBox"].split()[2:])
        for element in root.iter("{http://www.w3.org/2000/svg}rect"):
            x, y, w, h = (float(element.get(side, 0)) for side in ("x", "y", "width", "height"))
            assert 0 <= x <= x + w <= width, path.name
            assert 0 <= y <= y + h <= height, path.name


def test_equal_rows_are_drawn_once(figures: ModuleType) -> None:
    rows = [figures.Row(f"blocks.{i}", "MLP", "4 × 8", side="2", side_name=f"R{i}", back="←") for i in range(3)]
    first, *rest = figures.merged([*rows, figures.Row("head", "Linear", "10")])
    assert (first.name, first.side_name, first.count) == ("blocks.0 to 2", "R0 to R2", 3)
    assert [row.name for row in rest] == ["head"]


DEPLOY = ROOT / "docs" / "deploy.md"


def test_the_description_for_triton_is_that_of_a_bundle_s_file(shared_bundle: Path) -> None:
    (text,) = blocks(DEPLOY, "text")
    tensors = re.findall(r'put \[ \{ name: "(\w+)" data_type: TYPE_(\w+) dims: \[ ([\d, ]+) \]', text)
    graph = onnx.load(shared_bundle / "model.onnx").graph
    kinds = {onnx.TensorProto.UINT8: "UINT8", onnx.TensorProto.FLOAT: "FP32"}
    assert [(name, kind) for name, kind, _ in tensors] == [
        (tensor.name, kinds[tensor.type.tensor_type.elem_type]) for tensor in (graph.input[0], graph.output[0])
    ]
    for (_, _, dims), tensor in zip(tensors, (graph.input[0], graph.output[0]), strict=True):
        batch, *rest = tensor.type.tensor_type.shape.dim
        assert batch.dim_param, "Triton batches only where the first dimension is dynamic"
        assert len(dims.split(",")) == len(rest)


def test_the_configuration_for_openvino_model_server_has_keys_that_it_knows() -> None:
    (text,) = blocks(DEPLOY, "json")
    (model,) = json.loads(text)["model_config_list"]
    # "additionalProperties": false in the server's src/schema.cpp.
    known = {
        "name",
        "base_path",
        "batch_size",
        "model_version_policy",
        "shape",
        "nireq",
        "target_device",
        "plugin_config",
    }
    assert {"name", "base_path"} <= set(model["config"]) <= known
    assert model["config"]["base_path"].endswith(f"/{model['config']['name']}")


def test_the_container_has_what_the_package_asks_for_and_no_torch() -> None:
    (dockerfile,) = blocks(DEPLOY, "dockerfile")
    assert len(dockerfile.splitlines()) <= 20
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    known = {*project["dependencies"], *project["optional-dependencies"]["onnx"]}
    installed = re.findall(r'"([^",]+[<>=][^"]+)"', dockerfile)
    assert {re.split("[<>=]", name)[0] for name in installed} == {"onnxruntime", "numpy", "pillow"}
    assert set(installed) <= known


def test_commands_about_deploying_parse() -> None:
    lines = [line.split() for line in "".join(blocks(DEPLOY, "console")).splitlines() if "labels.jsonl" in line]
    for line in lines:
        arguments = (
            line[line.index("predict") + 1 :] if "predict" in line else ["/bundle", *line[line.index("clothes") + 1 :]]
        )
        assert parse("predict", arguments).resume
    assert len(lines) == 2


@pytest.mark.parametrize("page", MARKDOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not re.match(r"https?://|mailto:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), link


DATA = ROOT / "docs" / "data.md"


def test_the_page_about_data_runs_and_names_every_kind() -> None:
    names: dict[str, Any] = {}
    for block in blocks(DATA, "python"):
        exec(block, names)
    lines = [shlex.split(line.removeprefix("$ ")) for line in "".join(blocks(DATA, "console")).splitlines()]
    for program, verb, *arguments in lines:
        words = 2 if verb == "data" else 1
        assert program == "leanvit"
        parse(" ".join([verb, *arguments][:words]), [verb, *arguments][words:])
    for kind in KINDS:
        assert f"`{kind}:" in read(DATA)
    assert set(re.findall(r"^\| `([a-z0-9-]+):[A-Z]", read(DATA), re.MULTILINE)) <= {*KINDS, "fashion-mnist"}


def test_the_table_of_the_page_about_data_is_read(tmp_path: Path) -> None:
    (text,) = (block for block in blocks(DATA, "text") if block.startswith("path,"))
    path = tmp_path / "list.csv"
    path.write_text(text, encoding="utf-8")
    (tmp_path / "photos").mkdir()
    for name in re.findall(r"photos/[^\"\n]+?\.jpg", text):
        (tmp_path / name).touch()
    assert [len(load_split(str(path), part)) for part in ("train", "val")] == [2, 2]
