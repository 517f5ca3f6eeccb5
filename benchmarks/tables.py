"""Tables, sentences and charts of README.md and docs from the results files, so that no number is written by hand.

    python benchmarks/tables.py      (writes the pages again; tests/test_readme.py compares)

A page holds `<!-- made by benchmarks/tables.py: NAME -->` and `<!-- end of NAME -->`; what lies between is made anew.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import tables_bits
import tables_claims
import tables_files
import tables_insight
import tables_networks
import tables_service
import tables_training

ROOT = Path(__file__).parents[1]
MODULES = (
    tables_files, tables_bits, tables_claims, tables_networks, tables_training, tables_service, tables_insight,
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {name: made for module in MODULES for name, made in module.TABLES.items()}
CHARTS: dict[str, Callable[[], str]] = tables_files.CHARTS
"""Drawings by their file below docs/measured."""


def pages() -> list[Path]:
    """All pages that may hold tables."""
    return [ROOT / "README.md", ROOT / "LEADERBOARD.md", *sorted((ROOT / "docs").rglob("*.md"))]


def made(text: str) -> list[str]:
    """Names of the tables that a page holds."""
    return re.findall(r"<!-- made by benchmarks/tables.py: (\w+) -->", text)


def written(text: str) -> str:
    """A page with its tables made again."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- made by benchmarks/tables.py: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end of {match[1]} -->"

    return re.sub(r"<!-- made by benchmarks/tables.py: (\w+) -->\n.*?<!-- end of \1 -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Write all pages and drawings again."""
    for page in pages():
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
    for name, draw in CHARTS.items():
        (ROOT / "docs" / "measured" / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
