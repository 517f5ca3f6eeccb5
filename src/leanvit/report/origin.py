"""Section How this was made: command, machine, versions and files behind the page."""

from __future__ import annotations

from leanvit.report import svg
from leanvit.report.run import Run
from leanvit.report.svg import Markup, finite, tag
from leanvit.report.words import duration, versions


def origin_section(run: Run) -> Markup:
    """Command, machine, versions and files behind the page."""
    made, bench = run.get("demo") or run.get("analysis") or run.get("val"), run.get("benchmark")
    machine = made.get("machine") or bench.get("machine") or {}
    cores = finite(machine.get("cores"))
    computer = [machine.get("cpu"), f"{cores:.0f} cores" if cores else "", ", ".join(machine.get("features") or [])]
    return svg.facts(
        [
            ("Command", tag("code", made["command"]) if made.get("command") else None),
            ("Date", str(made.get("date") or bench.get("date") or "").replace("T", " ")),
            ("Duration", duration(made.get("seconds"))),
            ("Seed", made.get("seed", run.get("train").get("seed"))),
            ("Machine", "; ".join(str(part) for part in computer if part)),
            ("Versions", versions(made) or versions(bench) or versions(run.get("bundle"))),
            ("Files read", svg.lines(tag("code", name) for name in run.files)),
        ]
    )
