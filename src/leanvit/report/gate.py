"""Section Verification gate: the checklist that the bundle was held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leanvit.report import html
from leanvit.report.html import join
from leanvit.report.run import Run
from leanvit.report.words import Json

_STATES = {True: "passed", False: "failed", None: "not verified"}


def _state(passed: Any) -> bool | None:
    return passed if isinstance(passed, bool) else None


def count_checks(checks: Sequence[Json]) -> str:
    """'7 passed, 0 failed, 1 not verified'."""
    states = [_state(check.get("passed")) for check in checks]
    return ", ".join(f"{states.count(state)} {word}" for state, word in _STATES.items())


def gate_section(run: Run) -> Markup | None:
    """The checklist that the bundle was held against."""
    checks = run.get("verify").get("checks") or []
    if not checks:
        return None
    passed = bool(run.get("verify").get("passed"))
    rows = []
    for check in checks:
        hint = check.get("hint") if check.get("passed") is not True else None
        todo = [html.mark(f"To do: {hint}", "mute")] if hint else []
        found = html.lines([check.get("found") or "", *todo])
        state = _state(check.get("passed"))
        rows.append([check["name"], html.state(state, _STATES[state]), found, check.get("expected")])
    verdict = html.state(passed, "The gate is passed." if passed else "The gate is not passed.")
    caption = "What the bundle had to prove when it was written. The same checks run again with: leanvit verify."
    return join(
        [
            html.paragraph(verdict, f" {count_checks(checks)}.", css="verdict"),
            html.table(caption, ("Check", "State", "Found", "Expected"), rows, "llll"),
        ]
    )
