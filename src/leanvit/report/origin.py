"""Section How this was made: command, machine, versions and files that the page is made from."""

from __future__ import annotations

from markupsafe import Markup

from leanvit.report import html
from leanvit.report.run import Run
from leanvit.report.words import duration, finite, versions


def origin_section(run: Run) -> Markup:
    """Command, machine, versions and files that the page is made from."""
    made = run.get("optimize") or run.get("demo") or run.get("analysis") or run.get("val")
    bench = run.get("benchmark")
    machine = made.get("machine") or bench.get("machine") or {}
    cores = finite(machine.get("cores"))
    computer = [machine.get("cpu"), f"{cores:.0f} cores" if cores else "", ", ".join(machine.get("features") or [])]
    return html.facts(
        [
            ("Command", html.code(made["command"]) if made.get("command") else None),
            ("Date", str(made.get("date") or bench.get("date") or "").replace("T", " ")),
            ("Duration", duration(made.get("seconds"))),
            ("Seed", made.get("seed", run.get("train").get("seed"))),
            ("Machine", "; ".join(str(part) for part in computer if part)),
            ("Versions", versions(made) or versions(bench) or versions(run.get("bundle"))),
            ("Files read", html.lines(html.code(name) for name in run.files)),
        ]
    )
