"""Maps of `features_only` at 640 x 800: are their strides 4, 8, 16, 32, and is memory linear in pixels?

    OMP_NUM_THREADS=1 python benchmarks/features.py --output benchmarks/results/features.json

Shapes are those of one forward through `leanvit.tasks.features.Features`, beside what `feature_info.reduction()` says.
Memory is what one float32 forward (batch 1, no gradients, random weights) adds to a process of its own, after a forward
at 64 x 64 has loaded the code: the median of three processes. The exponent is the slope of log memory over log pixels,
of all sizes and of the two largest alone: 1 is linear, and what a forward takes whatever the size makes it less. The
ViT stands beside the backbones for contrast: once as timm runs it, once with its attention written out, which is
quadratic. The smallest size is 320 x 416: sides are multiples of 32.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers import set_fused_attn

from leanvit.files import write_json
from leanvit.progress import note
from leanvit.tasks.features import STRIDES, BackboneConfig, Features, check_strides
from measure import SEED, facts, in_fresh_process, merged, run_with_peak

SHOWN = (640, 800)
ROUNDS = 3
SIZES = ((320, 416), SHOWN, (1280, 1600))
LIMIT_MEGABYTES = 8 << 10
WARM = (64, 64)


@dataclass(frozen=True)
class Case:
    """A backbone; fused: attention by torch's own kernel where the model has one."""

    architecture: str
    fused: bool = True

    @property
    def name(self) -> str:
        """For the table."""
        return self.architecture if self.fused else f"{self.architecture}, attention written out"


CASES = [
    Case("vitaev2_small"),
    Case("remvitv2_tiny"),
    Case("reswin_tiny_patch4_window7_224"),
    Case("exmobilevit_928"),
    Case("vit_small_patch16_224"),
    Case("vit_small_patch16_224", fused=False),
]


def build(case: Case, size: tuple[int, int]) -> Features:
    """The backbone with random weights, in eval mode."""
    set_fused_attn(case.fused)
    torch.manual_seed(SEED)
    return Features(BackboneConfig(case.architecture, size)).eval()


@torch.no_grad()
def look(case: Case, size: tuple[int, int]) -> dict[str, Any]:
    """What the backbone says of its strides, and the shapes of its maps and of the levels made of them."""
    features = build(case, size)
    check_strides(features)
    x = torch.zeros(1, 3, *size)
    own, levels = features.own(x), features(x)
    reductions = list(features.backbone.feature_info.reduction())
    said = [tuple(math.ceil(side / reduction) for side in size) for reduction in reductions]
    return {
        "reductions": reductions,
        "own": [list(each.shape[1:]) for each in own],
        "as_said": [tuple(each.shape[-2:]) for each in own] == said,
        "levels": {stride: list(each.shape[1:]) for stride, each in zip(STRIDES, levels, strict=True)},
        "level_from_map": dict(zip(STRIDES, features.sources, strict=True)),
    }


@torch.no_grad()
def weigh(case: Case, size: tuple[int, int]) -> dict[str, float]:
    """Megabytes (MiB) that one forward adds, and the peak of the process."""
    torch.set_num_threads(1)
    build(case, WARM)(torch.zeros(1, 3, *WARM))
    features, x = build(case, size), torch.zeros(1, 3, *size)
    _, added, peak = run_with_peak(lambda: features(x))
    return {"pixels": size[0] * size[1], "megabytes": round(added, 1), "peak_megabytes": round(peak, 1)}


def exponent(memory: list[dict[str, float]]) -> float:
    """Slope of log memory over log pixels by least squares; 2, the worst that is expected, for less than two sizes."""
    if len(memory) < 2:
        return 2.0
    pixels, megabytes = (np.log([row[key] for row in memory]) for key in ("pixels", "megabytes"))
    return float(np.polyfit(pixels, megabytes, 1)[0])


_SPREAD = {"least_megabytes": min, "most_megabytes": max}


def measure(case: Case) -> dict[str, Any]:
    """Shapes and memory of one backbone; sizes that would take more than the limit are left out, and named."""
    memory: list[dict[str, float]] = []
    skipped = []
    for size in SIZES:
        grown = (size[0] * size[1] / memory[-1]["pixels"]) ** exponent(memory) if memory else 0.0
        if memory and memory[-1]["megabytes"] * grown > LIMIT_MEGABYTES:
            skipped.append(list(size))
            continue
        rounds = [in_fresh_process(weigh, case, size) for _ in range(ROUNDS)]
        memory.append({"height": size[0], "width": size[1], **sorted(rounds, key=itemgetter("megabytes"))[ROUNDS // 2]})
        memory[-1] |= {key: pick(each["megabytes"] for each in rounds) for key, pick in _SPREAD.items()}
    shapes = in_fresh_process(look, case, SHOWN)
    named = {"name": case.name, "model": case.architecture, "size": list(SHOWN)}
    slopes = {"exponent": round(exponent(memory), 3), "last_exponent": round(exponent(memory[-2:]), 3)}
    return {**named, **shapes, "memory": memory, "skipped": skipped, **slopes, **facts()}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: strides, then memory at every size and how it grows."""
    heads = [f"{height} x {width}, MiB (MiB a megapixel)" for height, width in SIZES]
    lines = [
        f"| backbone | strides of its maps | levels | {' | '.join(heads)} | exponent | of the last step |",
        f"|---|---|---|{'---:|' * (len(heads) + 2)}",
    ]
    for row in rows:
        found = {(m["height"], m["width"]): f"{m['megabytes']:.0f} ({_per_megapixel(m):.0f})" for m in row["memory"]}
        cells = [found.get(size, "skipped") for size in SIZES]
        strides = ", ".join(map(str, row["reductions"])) + ("" if row["as_said"] else " (not so)")
        levels = ", ".join(map(str, row["levels"]))
        cells += [f"{row[key]:.2f}" for key in ("exponent", "last_exponent")]
        lines.append(f"| {row['name']} | {strides} | {levels} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _per_megapixel(memory: dict[str, float]) -> float:
    return memory["megabytes"] / memory["pixels"] * 1e6


def main() -> int:
    """Measure every backbone and print the table; 1 where maps have other shapes than `reduction()` says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--output", type=Path, help="JSON file of the rows, written after every backbone")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if case.name not in options.cases:
            continue
        rows.append(measure(case))
        note(f"{case.name}: {rows[-1]['memory']}, exponent {rows[-1]['exponent']}")
        if options.output:
            write_json(options.output, {"results": merged(options.output, rows[-1:], ("name",))})
    print(table(rows))
    return 0 if all(row["as_said"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
