"""leanvit sweep: a verb with every combination of some options, and one table of what they reached."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.progress import print_table

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.SweepConfig) -> int:
    """Run a sweep and print its table. Raises PartialError where runs failed."""
    from leanvit.passed_over import few
    from leanvit.scale import sweep

    results = sweep.run(config)
    _print(results)
    path = Path(config.output) / sweep.RESULTS_NAME
    print(f"results {path}")
    bad = [row for row in results["runs"] if row["exit_code"] != errors.EXIT_OK]
    for row in bad:
        print(f"- {row['name']}: {row['error']}")
    if bad:
        raise errors.PartialError(
            f"partly done: {len(bad)} of {len(results['runs'])} runs did not end with exit code 0: "
            f"{few([row['name'] for row in bad])}. Each has its log in {config.output}; give the same command again to "
            "run those that failed once more."
        )
    return errors.EXIT_OK


def _print(results: dict[str, Any]) -> None:
    rows = results["runs"]
    keys = list(results["grid"])
    names = list(dict.fromkeys(name for row in rows for name in row["numbers"]))
    same = [name for name in names if len(rows) > 1 and len({_text(row, name) for row in rows}) == 1]
    told = [name for name in names if name not in same]
    table = [
        [*(str(row["values"][key]) for key in keys), str(row["exit_code"]), *(_text(row, name) for name in told)]
        for row in rows
    ]
    print_table(f"{results['verb']}, {len(rows)} runs", [*keys, "exit code", *told], table)
    if same:
        print(f"the same in all runs: {', '.join(f'{name} {_text(rows[0], name)}' for name in same)}")


def _text(row: dict[str, Any], name: str) -> str:
    value = row["numbers"].get(name, "")
    return f"{value:.6g}" if isinstance(value, float) else str(value)
