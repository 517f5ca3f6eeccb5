"""Where a W8A8 file's time goes in ONNX Runtime, and how near its integer products come to what the machine can do.

    python benchmarks/roofline.py --models vit_small_patch16_224 vitaev2_small

The file is that of benchmarks/deploy.py (random weights, seed 0), batch 8. What is measured is what
`leanvit benchmark --by-operation` tells (leanvit.kernels): medians of 20 runs, milliseconds by operation. Rate is
multiply-adds of integer products over their time. The machine's rate is the best that ONNX Runtime's integer product
reaches on large square matrices with as many threads, measured in the same process.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from deploy import write_files
from leanvit import kernels
from leanvit.files import write_json
from measure import facts

BATCH = 8


def measure(name: str, threads: int) -> dict[str, Any]:
    """One row: a model's profile and its rate beside the machine's."""
    with tempfile.TemporaryDirectory(prefix="leanvit-roofline-") as folder:
        files, held_out = write_files(name, Path(folder), ["fp32", "w8a8"])
        found = kernels.profile(files["w8a8"], "onnxruntime", held_out[:BATCH], threads)
    rate, machine = found.rate(), kernels.machine_rate(threads)
    if rate is None:
        raise RuntimeError(f"{name}: its w8a8 file has no integer products")
    return {
        "milliseconds": {operation: spent for (operation, _), spent in found.milliseconds.items()},
        "multiply_adds": sum(count for key, count in found.multiply_adds.items() if key[1]),
        "int8_share_of_multiply_adds": found.share(found.multiply_adds),
        "integer_milliseconds": sum(found.milliseconds[key] for key in found.multiply_adds if key[1]),
        "model": name, "threads": threads, "rate": rate, "machine_rate": machine, "share_of_machine": rate / machine,
        "facts": facts(),
    }  # fmt: skip


def table(row: dict[str, Any]) -> str:
    """A row as Markdown: the operations that take 1% and more."""
    times = row["milliseconds"]
    total = sum(times.values())
    lines = [
        f"{row['model']}, {row['threads']} threads, batch {BATCH}: integer products run at {row['rate']:.0f} billion "
        f"multiply-adds a second, {row['share_of_machine']:.0%} of the machine's {row['machine_rate']:.0f}, and take "
        f"{row['integer_milliseconds'] / total:.0%} of {total:.0f} ms.\n",
        "| operation | ms | share |\n|---|---:|---:|",
    ]
    for operation, milliseconds in sorted(times.items(), key=lambda pair: -pair[1]):
        if milliseconds >= total / 100:
            lines.append(f"| {operation} | {milliseconds:.1f} | {milliseconds / total:.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Profile the models that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224", "vitaev2_small"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "roofline.json"))
    options = parser.parse_args()
    rows = [measure(name, options.threads) for name in options.models]
    write_json(Path(options.output), {"version": 1, "results": rows})
    print("\n\n".join(map(table, rows)))


if __name__ == "__main__":
    main()
