"""The parser of the command line on configurations made for it: every type of field, and what each mistake is told."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import pytest

from leanvit.config import option
from leanvit.config.parser import parse_arguments
from leanvit.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A verb with a field of every type."""

    source: str = option(MISSING, "Where from.", positional=True)
    rest: list[str] = option([], "More of them.", positional=True)
    must: int = option(MISSING, "What has no default.")
    number: int = option(3, "Whole number.")
    share: float = option(0.5, "Half of 100%.")
    maybe: float | None = option(None, "Perhaps a number.")
    name: str | None = option(None, "Perhaps a name.")
    kind: Literal["a", "b"] = option("a", "One of two.")
    opset: Literal[21, 23] = option(23, "One of two numbers.")
    pair: tuple[float, float] = option((0.0, 1.0), "Two numbers.")
    sizes: tuple[int, ...] = option((1,), "Numbers.")
    kinds: list[Literal["a", "b"]] = option([], "Some of two.", tasks=("detect",))
    light: bool = option(True, "On unless switched off.")
    heat: bool = option(False, "Off unless switched on.")
    version: int = option(1, "Version of this configuration's format.")


def toy(line: str) -> Toy:
    return parse_arguments("toy", Toy, line.split())


def test_every_type_is_read_from_text() -> None:
    found = toy(
        "S r1 r2 --must 4 --number -7 --share 1e-3 --maybe -2.5e-1 --name n --kind b --opset 21 --pair -1 0.5 "
        "--sizes 8 16 --kinds b a --no-light --heat"
    )
    assert found == Toy(
        source="S", rest=["r1", "r2"], must=4, number=-7, share=0.001, maybe=-0.25, name="n", kind="b", opset=21,
        pair=(-1.0, 0.5), sizes=(8, 16), kinds=["b", "a"], light=False, heat=True,
    )  # fmt: skip


def test_what_is_not_given_has_its_default() -> None:
    assert toy("S --must 4") == Toy(source="S", must=4)


@pytest.mark.parametrize(
    "line",
    [
        "S r --must 4 --number 5", "--must 4 S --number 5 r", "--must=4 --number=5 S r", "--heat --no-heat --must 4 S "
        "--number=5 r", "--must 4 --number 5 -- S r", "--number 9 --must 4 --number 5 S r",
    ],
)  # fmt: skip
def test_order_and_spelling_do_not_matter_and_the_last_wins(line: str) -> None:
    assert toy(line) == Toy(source="S", rest=["r"], must=4, number=5)


def test_after_two_dashes_everything_is_positional() -> None:
    assert toy("--must 4 S -- --odd -x").rest == ["--odd", "-x"]


def test_null_is_no_value_also_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("source: F\nmust: 1\nmaybe: 2.5\nname: x\nheat: true\nsizes: [2, 3]\n")
    assert toy(f"--config {path} --maybe null --name null") == Toy(source="F", must=1, heat=True, sizes=(2, 3))
    found = toy(f"--must 2 --config={path} --no-heat --sizes 5")
    assert (found.source, found.must, found.heat, found.sizes, found.maybe) == ("F", 2, False, (5,), 2.5)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("S", "no --must given, expected one. Run: leanvit toy --help"),
        ("--must 4", "no source given, expected one. Run: leanvit toy --help"),
        ("S --must x", "--must is wrong: expected int. Got value: x Run: leanvit toy --help"),
        ("S --must 4.5", "--must is wrong: expected int. Got value: 4.5 Run: leanvit toy --help"),
        ("S --must 4 --maybe x", "--maybe is wrong: expected float. Got value: x Run: leanvit toy --help"),
        ("S --must 4 --kind c", "--kind is wrong: expected one of a, b. Got value: c Run: leanvit toy --help"),
        ("S --must 4 --opset 22", "--opset is wrong: expected one of 21, 23. Got value: 22 Run: leanvit toy --help"),
        ("S --must 4 --kinds a c", "--kinds is wrong: expected one of a, b. Got value: c Run: leanvit toy --help"),
        ("S --must 4 --sizes 1 x", "--sizes is wrong: expected int. Got value: x Run: leanvit toy --help"),
        ("S --must 4 --pair 1", "argument --pair: expected 2 arguments Run: leanvit toy --help"),
        ("S --must 4 --number --heat", "argument --number: expected one argument Run: leanvit toy --help"),
        ("S --must 4 --nubmer 5", "unknown flag --nubmer. Did you mean '--number'? Run: leanvit toy --help"),
        ("S --must 4 --num 5", "unknown flag --num. Did you mean '--number'? Run: leanvit toy --help"),
        ("S --must 4 --no-number", "unknown flag --no-number. Did you mean '--number'? Run: leanvit toy --help"),
        ("S --must 4 --share nan", "leanvit toy: share is nan, expected a finite number"),
    ],
)
def test_a_mistake_is_told_with_its_flag(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        toy(line)
    assert str(caught.value) == message


def test_help_shows_choices_defaults_and_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        toy("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "usage: leanvit toy SOURCE [REST ...] [options]", "--kind {a,b} One of two. (default: a)",
        "--opset {21,23}", "--light, --no-light On unless switched off. (default: on)",
        "--heat Off unless switched on.",
        "Half of 100%. (default: 0.5)", "(default: 0.0 1.0)", "for detect: --kinds [{a,b} ...]",
    ):  # fmt: skip
        assert words in text
    assert "--version" not in text
    assert "--no-heat" not in text


def test_it_needs_the_standard_library_only_and_yaml_for_a_file() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('yaml', 'jsonargparse', 'numpy', 'torch', 'rich')))\n"
        "from leanvit.cli import parse; print(parse('predict', ['B', 'x', '--top-k', '2']).top_k)\n"
        "try: parse('predict', ['B', '--config', 'c.yaml'])\n"
        "except Exception as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["2", "yaml is not installed. Run: pip install pyyaml"]
