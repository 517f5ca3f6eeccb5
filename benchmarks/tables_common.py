"""What the tables of benchmarks/tables.py share: results files, Markdown, and where and when something was measured."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@functools.cache
def results(name: str) -> Any:
    """The values of a results file."""
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A table. words: how many columns at the left hold words; numbers are set to the right."""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine_words(machine: dict[str, Any] | str) -> str:
    """A machine of a results file in words."""
    if isinstance(machine, str):  # as results of November 2026 have it
        return machine
    vnni = "with" if "avx512_vnni" in machine["features"] else "without"
    return f"{machine['cores']} cores ({machine['cpu']} {vnni} VNNI)"


def day(text: str) -> str:
    """An ISO date and time as a day."""
    return f"{date.fromisoformat(text[:10]):%-d %B %Y}"


def days(texts: Iterable[str]) -> str:
    """The first and the last of some days."""
    found = sorted(texts)
    first, last = day(found[0]), day(found[-1])
    return first if first == last else f"{first} to {last}"


def where(facts: dict[str, Any], *, threads: bool = False) -> str:
    """When and on what something was measured. threads: with how many, too."""
    on = machine_words(facts["machine"])
    return f"{day(facts['date'])}, {facts['threads']} thread of {on}" if threads else f"{day(facts['date'])}, {on}"


def span(values: Iterable[float], places: int) -> str:
    """The least and the greatest of some values, or one where both are the same when rounded."""
    found = sorted(values)
    first, last = f"{found[0]:.{places}f}", f"{found[-1]:.{places}f}"
    return first if first == last else f"{first} to {last}"
