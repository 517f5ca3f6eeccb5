"""README and docs: the commands run, the code runs, the table is one that the demo printed."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import leanvit.models  # noqa: F401 - registers our architectures
import tables
from common import ROOT
from leanvit.cli import VERBS, main, parse
from leanvit.commands.demo import next_commands
from leanvit.config import TrainConfig
from leanvit.runtime.bundle import load_golden

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("console")).splitlines()
    return [line[2:].split("  #")[0].strip() for line in lines if line.startswith("$ ")]


def test_tables_and_charts_are_those_of_the_results_files() -> None:
    named = []
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        assert tables.written(text) == text, f"{page.name}: run python benchmarks/tables.py"
        named += tables.made(text)
    assert sorted(named) == sorted(tables.TABLES)  # every table on one page only
    for name, draw in tables.CHARTS.items():
        assert (ROOT / "docs" / "measured" / name).read_text(encoding="utf-8") == draw()


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = [c.split()[1] for c in commands() if c.startswith("make ")]
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@torch.no_grad()
def tells_day_from_night() -> torch.nn.Module:
    """A network of random weights whose class 0 is the brighter one: the gate refuses labels in another order."""
    torch.manual_seed(0)
    model = timm.create_model("vit_micro", num_classes=2).eval()
    day, night = (torch.full((1, *model.pretrained_cfg["input_size"]), level) for level in (0.4, -0.5))
    lead = torch.stack([model(x)[0, 1] - model(x)[0, 0] for x in (day, night)])
    if lead[0] > lead[1]:
        model.head.weight.copy_(model.head.weight.flip(0))
        model.head.bias.copy_(model.head.bias.flip(0))
        lead = -lead
    model.head.bias[1] -= lead.mean()
    return model


def draw_pictures(folder: Path, level: int, count: int) -> None:
    """Soft pictures of a brightness, as JPEG."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(level)
    for index in range(count):
        coarse = generator.integers(level - 50, level + 50, (5, 7, 3)).astype(np.uint8)
        Image.fromarray(coarse).resize((70, 50)).save(folder / f"{index}.jpg")


def test_commands_for_own_images_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for label, level in (("day", 180), ("night", 60)):
        draw_pictures(tmp_path / "photos" / label, level, 30)
    torch.save(tells_day_from_night().state_dict(), tmp_path / "model.pth")
    verbs = [c for c in commands() if c.startswith("leanvit ")]
    assert [c.split()[1] for c in verbs] == ["optimize", "train", "quantize", "export", "predict"]
    for command in verbs:
        arguments = shlex.split(command.replace("vit_small_patch16_224", "vit_micro"))[1:]
        if arguments[0] == "train":
            arguments += ["--epochs", "2", "--batch-size", "8"]
        if arguments[0] in ("optimize", "quantize"):
            arguments += ["--calibration-images", "32"]
        if arguments[0] == "optimize":
            arguments += ["--minutes", "0.2"]  # as the README says; test_python_blocks_run tries all
        if arguments[0] == "export":
            arguments += ["--max-drop", "100"]
        assert main(arguments) == 0, capsys.readouterr().err
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 60
    assert (tmp_path / "runs" / "fast" / "bundle" / "bundle.json").is_file()


def test_python_blocks_run(demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    draw_pictures(tmp_path / "photos", 120, 40)
    (tmp_path / "photo.jpg").write_bytes(load_golden(demo_run / "bundle")[0][0])
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(block, names)
    assert (tmp_path / "runs" / "found" / "bundle" / "bundle.json").is_file()


def test_the_demo_suggests_commands_that_run(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    predict, verify, train = (shlex.split(command)[1:] for command in next_commands(demo_run))
    assert main(predict) == 0
    assert capsys.readouterr().out.count("%") == 3
    assert main(verify) == 0
    assert "FAILED" not in capsys.readouterr().out
    assert parse(train[0], train[1:]).data == "YOUR_FOLDER"


def test_suggested_program_is_one_that_the_shell_finds(demo_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    program = shlex.split(next_commands(demo_run)[0])[0]
    assert (Path.cwd() / program).resolve() == Path(sys.executable).with_name("leanvit").resolve()


def test_other_verbs_run_on_the_demo(demo_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["val", str(demo_run / "bundle")],
        ["val", str(demo_run / "train")],
        ["val", str(demo_run / "quantize-w4a4")],
        ["verify", str(demo_run / "bundle"), "--model", str(demo_run / "quantize-w8a8")],
        ["report", str(demo_run), "--output", str(tmp_path / "page.html")],
        ["models", "revit*"],
        ["doctor"],
        ["--version"],
    ):
        assert main(arguments) == 0, (arguments, capsys.readouterr().err)
    output = capsys.readouterr().out
    assert output.count("of 359 images") == 3
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_readme_names_every_verb() -> None:
    for verb in VERBS:
        assert f"`{verb}`" in README or f"leanvit {verb}" in README, verb


def test_readme_flags_are_flags() -> None:
    known = {"--" + f.name.replace("_", "-") for f in fields(TrainConfig)}
    (train,) = [c for c in commands() if c.startswith("leanvit train")]
    assert set(re.findall(r"--[a-z-]+", train)) <= known


def test_table_has_the_form_that_the_demo_writes(demo_run: Path) -> None:
    table = re.search(r"<!-- made by benchmarks/tables.py: demo -->\n(.*?)\n<!-- end of demo -->", README, re.DOTALL)
    assert table is not None
    ours, printed = table.group(1).splitlines(), (demo_run / "table.md").read_text().strip().splitlines()
    assert ours[:2] == printed[:2]
    for mine, theirs in zip(ours[2:6], printed[2:6], strict=True):
        assert mine.split("|")[1] == theirs.split("|")[1]
        assert mine.split("|")[3].strip().endswith("/359")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, .+, \d+ cores, seed \d+, \d+ s in all\.", ours[-2])
    assert "ONNX Runtime" in ours[-1]


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), f"{page.name}: {link}"
