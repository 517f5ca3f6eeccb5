"""Section Verification gate: the checklist that the bundle was held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from leanvit.report import svg
from leanvit.report.run import Json, Run
from leanvit.report.svg import Markup, join, tag

_STATES = {
    True: ("passed", "yes", tag("polyline", points="2.5,8.5 6.5,12.5 13.5,4")),
    False: ("failed", "no", tag("path", d="M3.5 3.5l9 9M12.5 3.5l-9 9")),
    None: ("not verified", "open", tag("circle", cx=8, cy=8, r=5.5, stroke_dasharray="2.5 3")),
}


def _state(passed: Any) -> tuple[str, str, Markup]:
    return _STATES[passed if isinstance(passed, bool) else None]


def _verdict(passed: Any, text: str = "") -> Markup:
    word, css, shape = _state(passed)
    return tag("span", tag("svg", shape, viewBox="0 0 16 16", aria_hidden="true"), text or word, class_=f"state {css}")


def count_checks(checks: Sequence[Json]) -> str:
    """'7 passed, 0 failed, 1 not verified'."""
    words = [_state(check.get("passed"))[0] for check in checks]
    return ", ".join(f"{words.count(word)} {word}" for word, _, _ in _STATES.values())


def gate_section(run: Run) -> Markup | None:
    """The checklist that the bundle was held against."""
    checks = run.get("verify").get("checks") or []
    if not checks:
        return None
    passed = bool(run.get("verify").get("passed"))
    rows = []
    for check in checks:
        hint = check.get("hint") if check.get("passed") is not True else None
        todo = [tag("span", f"To do: {hint}", class_="mute")] if hint else []
        found = svg.lines([check.get("found"), *todo])
        rows.append([check["name"], _verdict(check.get("passed")), found, check.get("expected")])
    verdict = _verdict(passed, "The gate is passed." if passed else "The gate is not passed.")
    caption = "What the bundle had to prove when it was written. The same checks run again with: leanvit verify."
    return join(
        [
            tag("p", verdict, f" {count_checks(checks)}.", class_="verdict"),
            svg.table(caption, ("Check", "State", "Found", "Expected"), rows, "llll"),
        ]
    )
