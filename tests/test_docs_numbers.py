"""No figure of README.md and docs is written by hand: what looks measured is a made block, or named here with why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = r"(?<![\w.,/-])\d[\d,]*(?:\.\d+)?"
UNIT = r"(?:m?s|h|(?:micro)?seconds?|minutes?|hours?|[kMG]i?B|dB|times|points?|(?:images|requests)(?:/s| a second))\b|%"
MEASURED = re.compile(
    rf"{NUMBER}(?:,? (?:to|and|or|±) [\d.,]*\d)?\s?(?:{UNIT})"  # 1.7 times, 3 to 5 s
    rf"|{NUMBER}x\b(?! \d)"  # 1.81x
    r"|(?<![\w.,/-])(?:0\.\d\d+|\d\d\.\d{1,2})\b(?!\.?\d|\.\w)"  # 0.9142, 88.60
)
NOT_PROSE = (
    r"<!-- made by benchmarks/tables.py: (\w+) -->.*?<!-- end of \1 -->",  # tests/test_readme.py compares
    r"<!-- variants: .*?<!-- end of variants -->",  # tests/test_docs.py compares
    r"^( *)```.*?^\1```",
    r"^\| corruption \|.*?\n\n",  # tests/evaluation/test_evaluation.py compares
    r"(?<=\n\n)(?: {4}[^\n]*\n)+",
    r"(``?)[^`\n]+\1",
)
"""Text in which numbers are compared by another test, or shown as a command prints them."""

REMEDY = (
    "measured by hand? Let a benchmark write it into benchmarks/results and make the sentence from that file in "
    "benchmarks/tables_*.py; or say it without a number; or, where nobody measured it, name it in ALLOWED"
)

ALLOWED: dict[str, dict[str, tuple[str, ...]]] = {
    "README.md": {"formula": ("one image of 359 is 0.28 points",)},
    "docs/analyze.md": {
        "threshold": ("more than 3 times the median", "pixels that hold 50% and 95%", "beyond 512 MiB"),
        "published": ("the paper reports 0.68 points",),
    },
    "docs/architectures.md": {
        "configuration": ("1% of the labels are 600", "10% are learned for 8 epochs, 100% for one")
    },
    "docs/bundle.md": {
        "threshold": ("for 35 dB", "for 20 dB", "than 38 dB", "for 3 dB", "than 20 dB", "80 dB for float, 35 dB for"),
    },
    "docs/compose.md": {"configuration": ("left 60% is for", "right 35% for")},
    "docs/data.md": {"default": ("fits into 4 GiB",)},
    "docs/embeddings.md": {"formula": ("cosine / 0.07", "0.99984 at 35 dB"), "threshold": ("left aside | 99%",)},
    "docs/evaluate.md": {"formula": ("top-5 is 100%",), "default": ("memory (4 GiB at", "up to 2 GiB")},
    "docs/load.md": {"default": ("until 60% are left", "tries 70%")},
    "docs/measured/README.md": {"formula": ("is 0.01 points", "20 dB is an error", "Below 10 dB")},
    "docs/models/exmobilevit.md": {"configuration": ("adds 1% to the",), "published": ("about 0.68 points",)},
    "docs/models/remvit.md": {"default": ("would exceed 8 MiB",)},
    "docs/models/revit.md": {"default": ("would exceed 512 MiB",)},
    "docs/models/vitae.md": {"published": ("that gives 84.8",)},
    "docs/optimize.md": {"default": ("70% of the tokens", "must gain 3%"), "formula": ("need not add up to 100%",)},
    "docs/quantize.md": {"configuration": ("at least 80% of each side",)},
    "docs/scale.md": {"configuration": ("takes 20 images a second for a core",)},
    "docs/scale_serve.md": {"configuration": ("sleeps for 0.3 s",)},
    "docs/serve.md": {
        "threshold": ("16 MiB | 413", "16 times", "and 32 KiB"),
        "configuration": ("a picture of 10 MB",),
    },
    "docs/tasks.md": {"threshold": ("less than 38 dB", "asks for 3 dB and 5% of the objects")},
    "docs/timm_networks.md": {"threshold": ("asks for 80 dB", "and for 35 dB")},
    "docs/train.md": {"default": ("up to 4 GiB",)},
    "docs/web.md": {"threshold": ("(35 dB for W8A8)",)},
}
"""By page and why: phrases with numbers that nobody measured here."""


def measured(text: str, allowed: list[str]) -> Iterator[tuple[int, str]]:
    """Line and words of what looks measured in the prose of a page, but for the allowed phrases."""
    prose = text
    for pattern in NOT_PROSE:
        prose = re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), prose, flags=re.DOTALL | re.MULTILINE)
    prose = prose.replace("\n", " ")
    spans = [match.span() for phrase in allowed for match in re.finditer(re.escape(phrase), prose)]
    for match in MEASURED.finditer(prose):
        if not any(first <= match.start() and match.end() <= last for first, last in spans):
            yield text.count("\n", 0, match.start()) + 1, match[0]


def phrases(page: str) -> list[str]:
    return [phrase for group in ALLOWED.get(page, {}).values() for phrase in group]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_figure_is_written_by_hand(page: Path) -> None:
    name, text = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8")
    assert not [f"{name}:{line}: {words!r}" for line, words in measured(text, phrases(name))], REMEDY


def test_every_phrase_that_may_stand_does() -> None:
    for name in ALLOWED:
        text = " ".join((ROOT / name).read_text(encoding="utf-8").split("\n"))
        assert [phrase for phrase in phrases(name) if phrase not in text] == [], name


@pytest.mark.parametrize(
    "words",
    ["it is 1.7 times as fast", "took 3 to 5 s", "1,626 images a second", "28\ndB", "1.81x", "AP50 0.9142", "4%"],
)
def test_a_measurement_is_seen(words: str) -> None:
    assert [line for line, _ in measured(f"# Page\n\nHere {words}.\n", [])] == [3]


def test_what_nobody_measured_is_not_seen() -> None:
    text = "8 bits, 224 px, 28 x 28, 1.24.1, 2026-11-30, 10.0.0.5:80, 3 seeds, `4 ms`\n\n    76 s\n\n```\n2 MB\n```\n"
    assert not list(measured(text, []))
