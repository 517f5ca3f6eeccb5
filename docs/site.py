"""What the site adds to the pages (a hook of mkdocs): every verb's flags, and files that pages link outside of docs,
notebooks as pages that show them.

mkdocs runs the functions named `on_...`, as its documentation says.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

from leanvit.cli import VERBS, parse

ROOT = Path(__file__).parents[1]
OUTSIDE = re.compile(r"\]\((?:\.\./)+(benchmarks|examples)/([^)]+)\)")
"""A link from a page to a results file or an example."""

NOTEBOOK = ".ipynb"

TASKS = ("detect", "segment", "semantic", "pose")
"""Tasks of `train` that have flags of their own."""


def on_files(files: Files, config: Any) -> Files:
    """Add pages made here, and the files that pages link to."""
    for name, content in (("reference/verbs.md", verbs()), *_pages_of_the_root()):
        files.append(File.generated(config, name, content=content))
    for linking in sorted((ROOT / "docs").rglob("*.md")):
        for room, name in OUTSIDE.findall(linking.read_text(encoding="utf-8")):
            path = f"{room}/{name}"
            if files.get_file_from_path(path) is None:
                files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
                if path.endswith(NOTEBOOK):
                    page, text = path.replace(NOTEBOOK, ".md"), shown(ROOT / path)
                    files.append(File.generated(config, page, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of docs lead to the copies in the site, those to notebooks to the pages that show them."""
    up = "../" * page.file.src_uri.count("/")
    return OUTSIDE.sub(lambda link: f"]({up}{link[1]}/{link[2].replace(NOTEBOOK, '.md')})", markdown)


def shown(path: Path) -> str:
    """A notebook as a page: its text, its code, and the outputs that are stored in it."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source.replace("](../../docs/", "](../../"))
            continue
        parts.append(f"```python\n{source}\n```")
        printed = [line for output in cell["outputs"] for line in output.get("text", ())]
        if printed:
            parts.append(f"```text\n{''.join(printed).rstrip()}\n```")
        drawn = (output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {}))
        parts += [f"![What this cell draws](data:image/png;base64,{''.join(picture.split())})" for picture in drawn]
    return "\n\n".join([*parts, f"[The notebook itself]({path.name})"]) + "\n"


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
