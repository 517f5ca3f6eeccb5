"""What docs/analyze.md and docs/evaluate.md show: the commands of their examples, and what these write.

    OMP_NUM_THREADS=1 python benchmarks/insight.py      (2 minutes of one core; to benchmarks/results/insight.json)

A case that is measured again takes the place of the stored one.
"""

from __future__ import annotations

import argparse
import shlex
import tempfile
from pathlib import Path
from typing import Any

from leanvit.cli import main as leanvit
from leanvit.files import read_json, write_json
from measure import facts, merged

RESULTS = Path(__file__).parent / "results" / "insight.json"
VAL = "--data fashion-mnist --limit 500 --threads 1 --corruptions all --severities 3 --shifts 2"
CASES = {
    "layers": "analyze vit_micro.fmnist revit_micro.fmnist --data fashion-mnist --images 256 --batch-size 64",
    "scales": "analyze exmobilevit_micro.fmnist --data fashion-mnist --parts shortcut --accuracy-images 2000",
    "revit": f"val revit_micro.fmnist {VAL}",
    "vit": f"val vit_micro.fmnist {VAL}",
}
"""Commands, as the pages have them."""

WRITTEN = {"analyze": "analysis.json", "val": "val.json"}
LEFT_OUT = ("predicted", "labels", "attention", "rollout", "machine", "versions", "command", "confusion", "throughput")
"""What no page shows, or what the row says itself."""


def kept(found: Any) -> Any:
    """What a command wrote, without what is left out, at whatever depth."""
    if isinstance(found, dict):
        return {key: kept(value) for key, value in found.items() if key not in LEFT_OUT}
    return [kept(value) for value in found] if isinstance(found, list) else found


def measure(case: str) -> dict[str, Any]:
    """Run the command of a case; a row."""
    command = shlex.split(CASES[case])
    with tempfile.TemporaryDirectory() as folder:
        code = leanvit([*command, "--output", folder])
        if code:
            raise SystemExit(f"leanvit {CASES[case]}: exit code {code}")
        found = read_json(Path(folder) / WRITTEN[command[0]])
    return {"case": case, "command": f"leanvit {CASES[case]}", "found": kept(found), "facts": facts()}


def main() -> None:
    """Measure the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    for case in parser.parse_args().cases:
        write_json(RESULTS, {"version": 1, "results": merged(RESULTS, [measure(case)], ("case",))})


if __name__ == "__main__":
    main()
