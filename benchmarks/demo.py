"""The demo over three seeds: accuracy of float, W8A8 and W4A4, sizes and speed ratios.

make bench                       three seeds (about 12 minutes on 2 cores; results in benchmarks/results/demo.json)
python benchmarks/demo.py 0      one of them
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from leanvit.commands.demo import run_demo
from leanvit.config import DemoConfig
from leanvit.files import write_json

RESULTS = Path(__file__).parent / "results" / "demo.json"
SEEDS = (0, 1, 2)


def main() -> None:
    """Run the demo for each seed and write means and every run's table."""
    seeds = tuple(int(seed) for seed in sys.argv[1:]) or SEEDS
    with tempfile.TemporaryDirectory() as folder:
        results = [run_demo(DemoConfig(output=f"{folder}/{seed}", seed=seed, speed=seed == 0)) for seed in seeds]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    rows = []
    for index, row in enumerate(results[0]["table"]):
        same = [result["table"][index] for result in results]
        speedups = [r["speedup"] for r in same if r["speedup"] is not None]
        rows.append(
            {
                "name": row["name"],
                "mean_accuracy": statistics.mean(r["accuracy"] for r in same),
                "correct": [r["correct"] for r in same],
                "images": row["images"],
                "bytes": row["bytes"],
                "mean_speedup": statistics.mean(speedups) if speedups else None,
            }
        )
    write_json(RESULTS, {"commit": commit, "seeds": seeds, "summary": rows, "runs": results})
    for row in rows:
        speed = f"{row['mean_speedup']:.2f}x" if row["mean_speedup"] else "simulated"
        print(f"{row['name']:28} {row['mean_accuracy']:.2f}%  {row['bytes'] / 1e6:.2f} MB  {speed}")


if __name__ == "__main__":
    main()
