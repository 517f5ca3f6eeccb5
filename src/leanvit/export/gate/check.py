"""One line of the gate's verdict, what a list of them means, and how it is told. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leanvit.errors import VerificationError
from leanvit.progress import print_json, print_table


@dataclass(frozen=True)
class Check:
    """One line of verify.json; passed is None where the check could not be made."""

    name: str
    passed: bool | None
    found: str
    expected: str
    hint: str = ""


def run_steps(steps: Iterable[Callable[[], list[Check]]]) -> list[Check]:
    """The checks of every step, in order; one that raises is a check that failed, and the next are still made."""
    checks: list[Check] = []
    for step in steps:
        try:
            checks += step()
        except Exception as error:  # a damaged file makes the runtime and NumPy raise what they like
            found = " ".join(str(error).split())[:300] or type(error).__name__
            checks.append(Check("run", False, found, "the bundle runs", "Export the model again."))
    return checks


def verdict(checks: Iterable[Check]) -> dict[str, Any]:
    """The gate's verdict as JSON values: {"passed": bool, "checks": [...]}."""
    # NumPy's booleans are no JSON, and `is False` is not true of them.
    return verdict_of([asdict(c) | {"passed": c.passed if c.passed is None else bool(c.passed)} for c in checks])


def verdict_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The verdict over checks that are JSON values already: passed where none failed."""
    return {"passed": all(row["passed"] is not False for row in rows), "checks": rows}


def print_verdict(result: dict[str, Any], where: str | Path, *, as_json: bool = False) -> None:
    """Every check of a gate's verdict on standard output, as a table or as JSON."""
    if as_json:
        print_json(result)
        return
    words = {True: "passed", False: "FAILED", None: "not verified"}
    rows = [[c["name"], words[c["passed"]], c["found"], c["expected"]] for c in result["checks"]]
    print_table(f"verify {where}", ["check", "result", "found", "expected"], rows)


def require_passed(result: dict[str, Any], where: str | Path) -> None:
    """Raise VerificationError naming the failed checks, where any failed."""
    failed = [c for c in result["checks"] if c["passed"] is False]
    if failed:
        first = failed[0]
        others = f" (and {', '.join(c['name'] for c in failed[1:])})" if len(failed) > 1 else ""
        raise VerificationError(
            f"{where}: check '{first['name']}'{others} failed: {first['found']}, expected {first['expected']}. "
            f"{first['hint']}".rstrip()
        )
