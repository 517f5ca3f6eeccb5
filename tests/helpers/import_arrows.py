"""Imports between the rooms of the package, read from the source: which run against the order, and which in a circle.

    python tests/helpers/import_arrows.py    lists both; exit code 1 where there is one

Imports inside functions count, those below TYPE_CHECKING do not: they are never run.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "leanvit"


@dataclass(frozen=True)
class Arrow:
    """One import: `source` (a file of the package, at a line) needs `target` (a module or name, dotted)."""

    source: str
    line: int
    target: str

    @property
    def source_room(self) -> str:
        return Path(self.source).parts[0].removesuffix(".py")

    @property
    def target_room(self) -> str:
        return self.target.split(".")[1]


def read(package: Path) -> list[Arrow]:
    """All imports of the package's own modules, in the order of files and lines."""
    return [arrow for file in sorted(package.rglob("*.py")) for arrow in _arrows(package, file)]


def _arrows(package: Path, file: Path) -> Iterator[Arrow]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.dump(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    source = str(file.relative_to(package))
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
            names = [_file_of(package, f"{node.module}.{name.name}") for name in node.names]
        elif isinstance(node, ast.Import):
            names = [_file_of(package, name.name) for name in node.names if name.name.startswith(f"{PACKAGE}.")]
        else:
            continue
        yield from (Arrow(source, node.lineno, name) for name in dict.fromkeys(names))


def _file_of(package: Path, name: str) -> str:
    """The module that `name` is, or is a member of: an import of leanvit.report.svg needs no other file of report."""
    parts = name.split(".")
    while len(parts) > 2 and not _exists(package.joinpath(*parts[1:])):
        parts.pop()
    return ".".join(parts)


def _exists(path: Path) -> bool:
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def listed(arrows: list[Arrow]) -> list[str]:
    """Arrows as a person reads them."""
    return [f"{arrow.source}:{arrow.line} imports {arrow.target}" for arrow in arrows]


def circles(arrows: list[Arrow]) -> list[list[str]]:
    """Groups of files that need each other, each sorted (strongly connected components of more than one file)."""
    needs: dict[str, set[str]] = defaultdict(set)
    for arrow in arrows:
        needs[_module(arrow.source)].add(arrow.target)
    reached = {module: _reach(module, needs) for module in list(needs)}
    groups = {
        frozenset({module} | {other for other in reached[module] if module in reached.get(other, ())})
        for module in reached
        if module in reached[module]
    }
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _module(source: str) -> str:
    return ".".join((PACKAGE, *Path(source).with_suffix("").parts)).removesuffix(".__init__")


def _reach(module: str, needs: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(needs[module])
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += needs.get(current, ())
    return found


def main() -> int:
    """List what runs against the order in pyproject.toml, and circles of files."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    order = next(contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers")
    rank = {line.strip("()").removeprefix(f"{PACKAGE}."): place for place, line in enumerate(order)}
    arrows = read(ROOT / "src" / PACKAGE)
    known = [arrow for arrow in arrows if arrow.source_room in rank and arrow.target_room in rank]
    back = [arrow for arrow in known if rank[arrow.source_room] > rank[arrow.target_room]]
    print(f"{len(arrows)} imports, {len(back)} run back", *listed(back), sep="\n  ")
    print(f"{len(circles(arrows))} circles", *(" <-> ".join(circle) for circle in circles(arrows)), sep="\n  ")
    return 1 if back or circles(arrows) else 0


if __name__ == "__main__":
    sys.exit(main())
