"""What the site adds to the pages (a hook of mkdocs): every verb's flags, and files that pages link outside of docs.

mkdocs runs the functions named `on_...`, as its documentation says.
"""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from leanvit.cli import VERBS, parse

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+(benchmarks|examples)/([^)]+)\)")
"""A link from a page to a results file or an example."""

TASKS = ("detect", "segment", "semantic", "pose")
"""Tasks of `train` that have flags of their own."""


def on_files(files: Files, config: Any) -> Files:
    """Add pages made here, and the files that pages link to."""
    for name, content in (("reference/verbs.md", verbs()), *_pages_of_the_root()):
        files.append(File.generated(config, name, content=content))
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for room, name in OUTSIDE.findall(page.read_text(encoding="utf-8")):
            path = f"{room}/{name}"
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs lead to the copies in the site."""
    up = "../" * page.file.src_uri.count("/")
    return OUTSIDE.sub(rf"]({up}\1/\2)", markdown)


def verbs() -> str:
    """A page with the help of every verb, as the command line prints it."""
    parts = ["# Verbs", "", "What `leanvit VERB --help` prints. Every flag is also a key of `--config file.yaml`."]
    for verb, (_, said) in VERBS.items():
        parts += ["", f"## {verb}", "", f"{said[0].upper()}{said[1:]}.", "", "```text", _help(verb), "```"]
        for task in TASKS if verb == "train" else ():
            parts += ["", f"### {verb} --task {task}", "", "```text", _help(verb, "--task", task), "```"]
    return "\n".join(parts) + "\n"


def _help(verb: str, *given: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        parse(verb, [*given, "--help"])
    return shown.getvalue().rstrip()


def _pages_of_the_root() -> list[tuple[str, str]]:
    """Pages that lie outside of docs; their links into docs, and to each other, are then beside them."""
    found = []
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", "LEADERBOARD.md", "LOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        found.append((name.lower(), re.sub(r"\]\(([A-Z]+\.md)\)", lambda link: f"]({link[1].lower()})", text)))
    return found
