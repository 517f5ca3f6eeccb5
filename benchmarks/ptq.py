"""Accuracy of MPTQ on the micro models, trained on Fashion-MNIST (10,000 real test images).

    python benchmarks/ptq.py                      default table: paper and best, nine settings, all models
    python benchmarks/ptq.py --modes best learned --settings W4A4 W3A3      what learning adds where bits are few
    python benchmarks/ptq.py --ablation           the paper's ablation at W4A4, and `best` without each of its passes
    python benchmarks/ptq.py --ablation --outliers   the same of ViT and DeiT with outliers as large networks have
    python benchmarks/ptq.py --random-plans 20    Greedy MP at 5 bits beside uniform 5 and random plans of equal cost
    python benchmarks/ptq.py --search             Greedy MP beside the plain greedy search: evaluations and loss

Calibration images are drawn from the training split, by seed; accuracy is of all test images, given as a count. Rows
are written to --output one by one; those that a file already has are not measured again, so a killed run goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn

import leanvit.models
from leanvit.bench import machine
from leanvit.checkpoint import preprocess_for
from leanvit.config import BEST_PASSES, Budget, MPTQConfig
from leanvit.config.quantization import MODES
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import load_split
from leanvit.files import read_json, write_json
from leanvit.quant import quantize
from leanvit.quant.costs import Costs, stepped
from leanvit.quant.graph import QuantGraph, end_sites, trace
from leanvit.quant.greedy_mp import allocate, begin, greedy_mp
from leanvit.quant.journal import Journal
from leanvit.quant.losses import kl_from_logits
from leanvit.quant.mptq import prepare
from leanvit.quant.plan import Plan, parts_of
from outliers import add_outliers

RESULTS = Path(__file__).parent / "results"
WEIGHTS = Path(leanvit.models.__file__).parent / "weights"
SETTINGS: dict[str, dict[str, Any]] = {
    "W8A8": {"weight_bits": 8, "activation_bits": 8},
    "W6A6": {"weight_bits": 6, "activation_bits": 6},
    "W4A4": {"weight_bits": 4, "activation_bits": 4},
    "W3A4": {"weight_bits": 3, "activation_bits": 4},
    "W3A3": {"weight_bits": 3, "activation_bits": 3},
    "W2A4": {"weight_bits": 2, "activation_bits": 4},
    "MP 5": {"budget": Budget(average_bits=5)},
    "MP 4": {"budget": Budget(average_bits=4)},
    "full W8A8": {"weight_bits": 8, "activation_bits": 8, "scope": "full"},
    "full W4A4": {"weight_bits": 4, "activation_bits": 4, "scope": "full"},
    "full MP 6": {"budget": Budget(average_bits=6), "scope": "full"},
}
HEAD_SCALE = 10.0
WITH_BLOCKS = ("deit_micro", "vit_micro")
"""Models that outliers can be put into."""

W4A4 = SETTINGS["W4A4"]
NAIVE = {"smoothing": "none", "ratio_search": False}
ABLATION: dict[str, dict[str, Any]] = {
    "min-max": {**W4A4, **NAIVE, "range_search": False},
    "none": {**W4A4, **NAIVE},
    "SmoothQuant": {**W4A4, "smoothing": "sq", "ratio_search": False},
    "SQ-b": {**W4A4, "ratio_search": False},
    "SQ-b + OPT-m": W4A4,
    "SQ-b + OPT-m + Greedy MP": SETTINGS["MP 4"],
    "best": {**W4A4, "mode": "best"},
    **{
        f"best without {name}": {**W4A4, "mode": "best", "passes": tuple(p for p in BEST_PASSES if p != name)}
        for name in BEST_PASSES
    },
}


class Results:
    """Rows in a JSON file, written after each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = read_json(path)["rows"] if path.is_file() else []

    def find(self, **key: Any) -> dict[str, Any] | None:
        """The row with these values, or None."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """Append a row, on disk at once."""
        row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.rows.append(row)
        write_json(self.path, {"version": 1, "machine": machine(), "torch": torch.__version__, "rows": self.rows})


@torch.no_grad()
def logits_of(module: nn.Module, images: Tensor) -> Tensor:
    """The logits (B, classes) of images; the mean of several classifiers (DeiT)."""
    logits = module(images)
    return sum(logits) / len(logits) if isinstance(logits, (tuple, list)) else logits


class Bench:
    """One model with its float self, its images, and what has been measured of it."""

    def __init__(self, name: str, args: argparse.Namespace, results: Results) -> None:
        self.name, self.args, self.results = name, args, results
        self.model = timm.create_model(name, pretrained=True).eval()
        if args.outliers:
            add_outliers(self.model, head_scale=HEAD_SCALE)
        self.preprocess = preprocess_for(self.model)
        self.train = load_split("fashion-mnist", "train")
        test = load_split("fashion-mnist", "val")
        chosen = np.arange(min(args.images, len(test)))
        self.batches = [(to_input(p, self.preprocess), y) for p, y in Loader(test.subset(chosen), self.preprocess, 250)]
        self.truth = [logits_of(self.model, images) for images, _ in self.batches]
        key = {"model": name, "method": "float", "images": len(chosen)}
        if not results.find(**key):
            self._write({**key, "setting": "float", "seed": None, "correct": self.judge(self.model)[0]})

    def calibration(self, seed: int, count: int | None = None) -> Tensor:
        """Training images for one seed, (N, 3, H, W)."""
        chosen = np.random.default_rng(seed).permutation(len(self.train))[: count or self.args.calibration]
        loader = Loader(self.train.subset(chosen), self.preprocess, 128)
        return torch.cat([to_input(pixels, self.preprocess) for pixels, _ in loader])

    def judge(self, module: nn.Module) -> tuple[int, float]:
        """How many test images a network gets right, and the KL divergence of its outputs from the float ones there."""
        right, total, count = 0, 0.0, 0
        for (images, labels), truth in zip(self.batches, self.truth, strict=True):
            logits = logits_of(module, images)
            right += int((logits.argmax(1) == labels).sum())
            total += len(labels) * kl_from_logits(truth, logits)
            count += len(labels)
        return right, total / count

    def measure(self, method: str, setting: str, seed: int, config: MPTQConfig, plan: Plan | None = None) -> Plan:
        """One row: quantize, count, write; returns the plan. A row that is there is not measured again."""
        images = sum(len(y) for _, y in self.batches)
        key = {"model": self.name, "method": method, "setting": setting, "seed": seed, "images": images}
        key["calibration"] = self.args.calibration
        found = self.results.find(**key)
        if found:
            return {name: (bits[0], bits[1]) for name, bits in found["plan"].items()} if "plan" in found else {}
        quantized = quantize(self.model, self.calibration(seed), config, plan=plan)
        report = quantized.report
        correct, test_kl = self.judge(quantized.module)
        row = {
            **key,
            "correct": correct,
            "test_kl": test_kl,
            "kl": report["calibration"]["kl_divergence"],
            "seconds": round(report["seconds"], 1),
            "average_bits": report["average_bits"],
            "quantized_bytes": report["quantized_bytes"],
            "evaluations": report["search"]["evaluations"] if report["search"] else None,
        }
        if config.budget is not None:
            row["plan"] = {name: list(bits) for name, bits in quantized.plan.items()}
        self._write(row)
        return quantized.plan

    def _write(self, row: dict[str, Any]) -> None:
        row["top1"] = 100 * row["correct"] / row["images"]
        self.results.add(row)
        extra = f" kl {row['kl']:.4f} test {row['test_kl']:.4f} {row['seconds']:.0f} s" if "kl" in row else ""
        print(
            f"{row['model']} {row['method']} {row['setting']} seed {row['seed']}: {row['top1']:.2f}{extra}", flush=True
        )


def default_table(bench: Bench, seed: int) -> None:
    """Each mode at every setting."""
    for setting in bench.args.settings:
        for method in bench.args.modes:
            bench.measure(method, setting, seed, MPTQConfig(**SETTINGS[setting], mode=method, seed=seed))


def ablation(bench: Bench, seed: int) -> None:
    """The paper's passes one by one, then `best` without each of its own."""
    for method in bench.args.methods:
        bench.measure(method, "ablation", seed, MPTQConfig(**ABLATION[method], seed=seed))


def random_plans(bench: Bench, seed: int) -> None:
    """Greedy MP at 5 bits beside uniform 5 bits and random plans that cost as much."""
    five = MPTQConfig(weight_bits=5, activation_bits=5, seed=seed)
    bench.measure("uniform", "average 5", seed, five)
    budget = Budget(average_bits=5)
    bench.measure("Greedy MP", "average 5", seed, replace(five, budget=budget))
    graph = trace(bench.model, bench.calibration(seed)[:2], five.scope)
    for number in range(bench.args.random_plans):
        plan = random_plan(graph, budget, np.random.default_rng([seed, number]))
        bench.measure(f"random {number}", "average 5", seed, five, plan)


def random_plan(graph: QuantGraph, budget: Budget, generator: np.random.Generator) -> Plan:
    """From 8 bits down by one at random operands until the budget holds."""
    ends = end_sites(graph)
    free = [name for name in graph.sites if name not in ends]
    plan: Plan = {name: (8 if 0 in parts_of(site) else 0, 8) for name, site in graph.sites.items()}
    costs = Costs(graph, budget, free)
    candidates = [(name, part) for name in free for part in parts_of(graph.sites[name])]
    while costs.of(plan) > costs.limit:
        name, part = candidates[generator.integers(len(candidates))]
        plan[name] = stepped(plan[name], part, max(2, plan[name][part] - 1))
    return plan


class TimeIsUpError(Exception):
    """The plain search has had its seconds."""


def search(bench: Bench, seed: int) -> None:
    """Evaluations and loss of Greedy MP beside the plain search, on the same images and quantizers."""
    args = bench.args
    key = {"model": bench.name, "method": "search", "seed": seed, "calibration": args.search_images}
    key["setting"] = f"average {args.search_average:g}"
    if bench.results.find(**key):
        return
    levels = tuple(args.search_levels)
    config = MPTQConfig(budget=Budget(average_bits=args.search_average, levels=levels), seed=seed)
    images = bench.calibration(seed, args.search_images)
    prepared = prepare(trace(bench.model, images, config.scope), [images], config)
    started = time.monotonic()
    plan, report = allocate(prepared.graph, prepared.images, config, prepared.choices)
    seconds = time.monotonic() - started
    journal = Journal(None, prepared.graph, prepared.images, config)
    problem, start = begin(prepared.graph, prepared.images, config, prepared.choices, journal)
    ours = problem.losses.loss(plan)
    count, latest, started = 0, dict(start.plan), time.monotonic()

    def loss(values: Plan) -> float:
        nonlocal count, latest
        if time.monotonic() - started > args.search_seconds:
            raise TimeIsUpError
        count, latest = count + 1, values
        return problem.losses.loss(values)

    row: dict[str, Any] = {
        **key,
        "levels": list(levels),
        "evaluations": report["evaluations"],
        "loss": ours,
        "seconds": round(seconds, 1),
        "finished": True,
    }
    try:
        reached = greedy_mp(start.plan, list(problem.candidates), levels, problem.costs, loss)
        plain = problem.losses.loss(reached)
        row |= {"plain_loss": plain, "loss_ratio": ours / plain}
    except TimeIsUpError:
        row |= {"finished": False, "plain_cost_reached": problem.costs.of(latest)}
    row |= {
        "plain_evaluations": count,
        "evaluation_share": report["evaluations"] / max(count, 1),
        "plain_seconds": round(time.monotonic() - started, 1),
    }
    bench.results.add(row)
    print(row, flush=True)


def markdown(results: Results, models: list[str]) -> str:
    """Tables of all rows: top-1 by model, averaged over seeds; then the searches."""
    rows = [r for r in results.rows if r["model"] in models and "top1" in r]
    kinds = list(dict.fromkeys((r["method"], r["setting"]) for r in rows if not r["method"].startswith("random")))
    known = [m for m in models if any(r["model"] == m for r in rows)]
    names = " | ".join(model.removesuffix("_micro") for model in known)
    lines = [f"| mode | bits | seeds | {names} | mean loss | KL | test KL | seconds |", "|---" * (len(known) + 7) + "|"]
    floats = {r["model"]: r["top1"] for r in rows if r["method"] == "float"}
    for method, setting in kinds:
        cells, losses = [], []
        mine = [r for r in rows if (r["method"], r["setting"]) == (method, setting)]
        for model in known:
            tops = [r["top1"] for r in mine if r["model"] == model]
            cells.append(f"{mean(tops):.2f}" if tops else "")
            losses += [floats[model] - mean(tops)] if tops else []
        measured = [r for r in mine if "kl" in r]
        kl, test_kl = (
            f"{mean(r[of] for r in mine if of in r):.4f}" if any(of in r for r in mine) else ""
            for of in ("kl", "test_kl")
        )
        seconds = f"{mean(r['seconds'] for r in measured):.0f}" if measured else ""
        seeds = len({r["seed"] for r in mine if r["seed"] is not None}) or ""
        lines.append(
            f"| {method} | {setting} | {seeds} | {' | '.join(cells)} | "
            f"{mean(losses):.2f} | {kl} | {test_kl} | {seconds} |"
        )
    drawn: dict[str, list[float]] = {}
    for row in rows:
        if row["method"].startswith("random"):
            drawn.setdefault(row["model"], []).append(row["top1"])
    lines += [
        f"\n{model}: {len(tops)} random plans: best {max(tops):.2f}, mean {mean(tops):.2f}, worst {min(tops):.2f}"
        for model, tops in drawn.items()
    ]
    searches = [r for r in results.rows if r["method"] == "search" and r["model"] in models]
    if searches:
        lines += ["", "| Model | Budget | Evaluations | plain | share | Loss | plain | ratio |", "|---" * 8 + "|"]
    for r in searches:
        plain = f"{r['plain_loss']:.5f} | {r['loss_ratio']:.3f}" if r["finished"] else "not finished | "
        lines.append(
            f"| {r['model']} | {r['setting']} | {r['evaluations']} | {r['plain_evaluations']} | "
            f"{r['evaluation_share']:.1%} | {r['loss']:.5f} | {plain} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure what was asked for and print the table."""
    packed = sorted(path.name.split(".")[0] for path in WEIGHTS.glob("*.fmnist.safetensors"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=packed, choices=packed, metavar="MODEL", help=", ".join(packed))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="choices of the calibration images")
    parser.add_argument("--images", type=int, default=10_000, help="test images")
    parser.add_argument("--calibration", type=int, default=128, help="calibration images")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--modes", nargs="+", default=["paper", "best"], choices=MODES, metavar="MODE")
    parser.add_argument("--ablation", action="store_true", help="the ablation instead of the default table")
    parser.add_argument("--outliers", action="store_true", help="put outliers into the models, which change no answer")
    parser.add_argument("--methods", nargs="+", default=list(ABLATION), choices=list(ABLATION), metavar="METHOD")
    parser.add_argument("--random-plans", type=int, nargs="?", const=20, default=0, help="compare with so many")
    parser.add_argument("--search", action="store_true", help="compare with the plain greedy search (two models)")
    parser.add_argument("--search-images", type=int, default=32)
    parser.add_argument("--search-average", type=float, default=5.0)
    parser.add_argument("--search-levels", type=int, nargs="+", default=[8, 7, 6, 5, 4, 3, 2])
    parser.add_argument("--search-seconds", type=float, default=1800, help="longest plain search of one model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--table", action="store_true", help="measure nothing, print the table of what is there")
    parser.add_argument("--output", type=Path, help="JSON of the rows; default: benchmarks/results/ptq[_...].json")
    args = parser.parse_args()
    if args.outliers:
        args.models = [name for name in args.models if name in WITH_BLOCKS]
        if not (args.ablation and args.models):
            parser.error(f"--outliers goes with --ablation and models of {', '.join(WITH_BLOCKS)}")
    torch.set_num_threads(args.threads)
    chosen = (
        (ablation, "ptq_outliers.json" if args.outliers else "ptq_ablation.json") if args.ablation
        else (random_plans, "ptq_random.json") if args.random_plans
        else (search, "ptq_search.json") if args.search
        else (default_table, "ptq.json")
    )  # fmt: skip
    results = Results(args.output or RESULTS / chosen[1])
    if not args.table:
        models = args.models[:2] if args.search else args.models
        for seed in args.seeds[:1] if args.search else args.seeds:
            for name in models:
                chosen[0](Bench(name, args, results), seed)
    print(markdown(results, args.models))


if __name__ == "__main__":
    main()
