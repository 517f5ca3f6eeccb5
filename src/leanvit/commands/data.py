"""leanvit data inspect, leanvit data compose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.progress import print_json, print_table

if TYPE_CHECKING:
    from leanvit import config as configs


_SIDES = ("width", "height")


def inspect(config: configs.DataInspectConfig) -> int:
    """Look at every image of a data set."""
    from leanvit.inspection import PAGE_NAME, require_readable, run
    from leanvit.runtime.task_of import CLASSIFY

    result = run(config)
    if config.json:
        print_json(result)
    else:
        (_print_inspection if config.task == CLASSIFY else _print_task_inspection)(result)
        print(f"page {Path(config.output) / PAGE_NAME}")
    require_readable(result)
    return errors.EXIT_OK


def compose(config: configs.DataComposeConfig) -> int:
    """Compose annotated practice pictures."""
    from leanvit.data.compose.compose import describe, run

    print(describe(run(config), config))
    return errors.EXIT_OK


def _print_inspection(result: dict[str, Any]) -> None:
    rows = []
    for split, part in result["parts"].items():
        sides = [[part[side][key] for key in ("min", "median", "max")] if part[side] else [] for side in _SIDES]
        sizes = [" / ".join(f"{value:g}" for value in values) for values in sides]
        kinds = ", ".join(f"{name} {count}" for name, count in part["modes"].items())
        rows.append([split, str(part["images"]), *sizes, kinds, str(len(part["corrupt"]))])
    columns = ["part", "images", "width: min / median / max", "height", "modes", "can't be read"]
    print_table(result["data"], columns, rows)
    balance, copies = result["balance"], result["duplicates"]
    ends = [f"{balance[end]['images']} of '{balance[end]['class']}'" for end in ("largest", "smallest")]
    ratio = f"{balance['ratio']:.2f}" if balance["ratio"] else "none"
    print(f"{len(result['classes'])} classes, readable training images from {ends[0]} to {ends[1]}, ratio {ratio}")
    kinds = f"{copies['leaks']} from training into another part, {copies['contradictions']} with different classes"
    print(f"{copies['extra']} duplicates, in {len(copies['groups'])} groups: {kinds}")


def _print_task_inspection(result: dict[str, Any]) -> None:
    from leanvit.inspection import PROBLEMS_SHOWN

    rows = []
    for split, part in result["parts"].items():
        sides = [" / ".join(f"{v:g}" for v in (part[side] or {}).values()) for side in ("width", "height")]
        counts = [str(part[key]) for key in ("images", "objects", "crowds")]
        rows.append([split, *counts, *sides, str(len(part["problems"])), str(len(part["corrupt"]))])
    sizes = ["width: min / median / max", "height"]
    columns = ["part", "pictures", "objects", "crowds", *sizes, "problems", "can't be read"]
    print_table(f"{result['data']}, {result['task']}", columns, rows)
    shares = result["task"] == "semantic"
    rows = [[name, *(_of_class(part, name, shares) for part in result["parts"].values())] for name in result["classes"]]
    print_table("share of pixels" if shares else "objects", ["class", *result["parts"]], rows)
    copies = result["duplicates"]
    print(f"{copies['extra']} duplicates, in {len(copies['groups'])} groups: {copies['leaks']} are in both parts")
    problems = [problem for part in result["parts"].values() for problem in part["problems"]]
    for problem in problems[:PROBLEMS_SHOWN]:
        print(f"problem: {problem}")
    if len(problems) > PROBLEMS_SHOWN:
        print(f"{len(problems) - PROBLEMS_SHOWN} more problems: inspect.json names them all")


def _of_class(part: dict[str, Any], name: str, shares: bool) -> str:
    """A dash where this part has no such class, which stands among its problems."""
    value = (part["pixels"]["shares"] if shares else part["per_class"]).get(name)
    return "–" if value is None else f"{value:.2%}" if shares else str(value)
