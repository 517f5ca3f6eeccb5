"""Tables of README.md from the results files, so that no number is written by hand.

python benchmarks/tables.py      (writes README.md again; tests/test_readme.py compares)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
VIT = "vit_small_patch16_224"
FILES = (
    ("float", "fp32", "ONNX Runtime"),
    ("**leanvit, w8a8**", "w8a8", "ONNX Runtime"),
    ("ONNX Runtime's dynamic quantization", "ort-dynamic", "ONNX Runtime"),
    ("ONNX Runtime's static quantization", "ort-static", "ONNX Runtime"),
    ("float", "fp32", "OpenVINO"),
    ("**leanvit, profile openvino**", "openvino-w8a8", "OpenVINO"),
    ("NNCF", "nncf", "OpenVINO"),
)
"""Rows of the README's table: what it is called there, the file's name in deploy.json, the runtime."""


def vit_small() -> str:
    """A ViT-S at 224 px: our files and the peers' in the same run."""
    found = json.loads((ROOT / "benchmarks/results/deploy.json").read_text(encoding="utf-8"))["results"]
    rows = {(r["name"], r["batch_size"]): r for r in found if r["model"] == VIT}
    lines = [
        "| file | runs in | size | 1 image | speed, batch 1 | batch 8 | near the float outputs |",
        "|---|---|" + "---:|" * 5,
    ]
    for said, name, runtime in FILES:
        one, eight = (rows[f"{name}, {runtime}", batch] for batch in (1, 8))
        near = "the same" if one["sqnr_db"] > 100 else f"{one['sqnr_db']:.0f} dB"
        lines.append(
            f"| {said} | {runtime} | {one['bytes'] / 1e6:.0f} MB | {one['median_ms']:.1f} ms | {one['ratio']:.2f}x | "
            f"{eight['ratio']:.2f}x | {near} |"
        )
    return "\n".join([*lines, "", _measured([row for row in rows.values() if row["facts"]])])


def _measured(rows: list[dict[str, Any]]) -> str:
    """Where and when rows were measured."""
    facts = rows[0]["facts"]
    machine = facts["machine"]
    day = date.fromisoformat(facts["date"][:10])
    vnni = "with" if "avx512_vnni" in machine["features"] else "without"
    return (
        f"`{VIT}` with random weights, {machine['cores']} cores ({machine['cpu']} {vnni} VNNI), "
        f"{facts['threads']} threads, in turns in one run, {day:%d %B %Y}, seed {facts['seed']}: "
        "`python benchmarks/deploy.py`. Speed is against float in ONNX Runtime at the same batch size."
    )


TABLES: dict[str, Callable[[], str]] = {"vit_small": vit_small}


def written(text: str) -> str:
    """A page with its tables made again."""

    def table(match: re.Match[str]) -> str:
        return f"<!-- made by benchmarks/tables.py: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end of {match[1]} -->"

    return re.sub(r"<!-- made by benchmarks/tables.py: (\w+) -->\n.*?<!-- end of \1 -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Write the README again."""
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
