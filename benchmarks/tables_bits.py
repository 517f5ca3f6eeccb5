"""Tables of quantized accuracy on the micro models: modes, bits, passes and plans, from benchmarks/ptq.py's results."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean, median

import ptq
from tables_common import days, machine_words, markdown, results


def _table(file: str) -> str:
    """All rows of a file as benchmarks/ptq.py prints them, and where and when they were measured."""
    found = ptq.Results(ptq.RESULTS / file)
    machine = results(file)["machine"]
    models = sorted({row["model"] for row in found.rows})
    measured = [row for row in found.rows if row["method"] != "float"]
    seeds, counts = (sorted({row[key] for row in measured}) for key in ("seed", "calibration"))
    return ptq.markdown(found, models) + (
        f"\n\n{days(row['date'] for row in measured)}, {machine_words(machine)}, seeds {', '.join(map(str, seeds))}, "
        f"{', '.join(map(str, counts))} calibration images: `benchmarks/results/{file}`."
    )


def few_bits() -> str:
    """Each mode at every setting, 128 calibration images."""
    return _table("ptq.json")


def few_bits_1024() -> str:
    """The same with 1,024 calibration images, as published methods take."""
    return _table("ptq_1024.json")


def ablation() -> str:
    """The paper's passes one after the other, then mode best without each of its own."""
    return _table("ptq_ablation.json")


def outliers() -> str:
    """The same of networks with outliers."""
    return _table("ptq_outliers.json")


def plain_search() -> str:
    """Greedy MP beside the search that measures every candidate at every step."""
    return _table("ptq_search.json")


def random_plans() -> str:
    """Greedy MP beside uniform bits and random plans of equal cost."""
    found = results("ptq_random.json")
    measured = [row for row in found["rows"] if row["method"] != "float"]
    lines = []
    for model in sorted({row["model"] for row in measured}):
        own = [row for row in measured if row["model"] == model]
        plans = [row for row in own if row["method"].startswith("random") and row["seed"] == 0]
        tops = [row["top1"] for row in plans]
        cells = [
            f"{mean(row[key] for row in own if row['method'] == name):.{places}f}"
            for name in ("uniform", "Greedy MP") for key, places in (("top1", 2), ("kl", 4))
        ]  # fmt: skip
        spread = [f"{value:.2f}" for value in (max(tops), median(tops), min(tops))]
        lines.append([model, *cells, len(plans), *spread, f"{min(row['kl'] for row in plans):.4f}"])
    header = ("network", "uniform", "KL", "Greedy MP", "KL", "random plans", "best", "median", "worst", "least KL")
    when = days(row["date"] for row in measured)
    return markdown(header, lines) + (
        f"\n\n{when}, {machine_words(found['machine'])}, an average of 5 bits; uniform bits and Greedy MP are means of "
        "three seeds, random plans have seed 0: `benchmarks/results/ptq_random.json`."
    )


def cost() -> str:
    """What quantization takes, of networks at 224 px and of a detector."""
    lines = [
        (row["case"], row["model"], row["images"], f"{row['seconds']:.0f}", f"{row['peak_megabytes'] / 1024:.2f}",
         row["evaluations"] or "", days([row["date"]]), machine_words(row["machine"]))
        for row in results("ptq_cost.json")["results"]
    ]  # fmt: skip
    header = ("case", "network", "images", "seconds", "peak memory, GiB", "evaluations", "date", "machine")
    return markdown(header, lines, 2)


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (few_bits, few_bits_1024, ablation, outliers, random_plans, plain_search, cost)
}
