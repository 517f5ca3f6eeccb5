"""Tables and sentences about networks: what each structure adds, speed and memory of families, accuracy of tasks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from statistics import mean, stdev
from typing import Any

import architectures
import timm_networks as timm_lines
from leanvit.checkpoint import load_checkpoint
from leanvit.models._pretrained import weights_file
from tables_common import RESULTS, days, machine_words, markdown, results, span, where

SHARES = (0.01, 0.1, 1.0)
"""Of the labels, in architectures.json."""

TWINS = {
    "ReViT": ("revit_micro", "revit_micro_alone"),
    "ReSwin": ("reswin_micro", "reswin_micro_alone"),
    "ExMobileViT": ("exmobilevit_micro", "mobilevit_micro_twin"),
    "ViTAE": ("vitae_micro", "vit_micro_for_vitae_micro"),
    "ViTAEv2": ("vitaev2_micro", "vit_micro_for_vitaev2_micro"),
}
"""Pairs of architectures.json: a network with a structure, and the same without."""


def structures() -> str:
    """Every network of architectures.json beside its twin."""
    found = results("architectures.json")
    when = days(row["date"] for row in found["rows"])
    return architectures.table(found["rows"]) + (
        f"\n\nMeans and standard deviations over seeds {', '.join(map(str, found['seed']))}; {when}, "
        f"{found['threads']} thread of {machine_words(found['machine'])}."
    )


@functools.cache
def _means(key: str) -> dict[tuple[str, float], float]:
    rows = results("architectures.json")["rows"]
    names = {(row["model"], row["fraction"]) for row in rows}
    return {name: mean(r[key] for r in rows if (r["model"], r["fraction"]) == name) for name in names}


def _gain(pair: str, share: float) -> float:
    top1, (ours, twin) = _means("top1"), TWINS[pair]
    return top1[ours, share] - top1[twin, share]


def structures_convolution() -> str:
    """What convolution inside the block adds."""
    least, tenth, whole = (span([_gain("ViTAE", share), _gain("ViTAEv2", share)], 0) for share in SHARES)
    return (
        f"**What shows: convolution inside the block.** ViTAE and ViTAEv2 are {least} points above a ViT of their "
        f"size at 1% of the labels, {tenth} at 10% and {whole} at 100%, many times what seeds change: the papers' "
        "claim that convolutional bias learns from little data holds at this size."
    )


def structures_residual() -> str:
    """What residual attention and the shortcut add."""
    least, tenth, whole = (f"{-_gain('ReViT', share):.1f}" for share in SHARES)
    rows = results("architectures.json")["rows"]
    seeds = [
        stdev(r["top1"] for r in rows if (r["model"], r["fraction"]) == (model, share))
        for model in TWINS["ReViT"] for share in SHARES
    ]  # fmt: skip
    swin = [abs(_gain("ReSwin", share)) for share in (SHARES[0], SHARES[2])]
    shortcut = max(abs(_gain("ExMobileViT", share)) for share in SHARES)
    shifted, (ours, twin) = _means("shifted_top1"), TWINS["ExMobileViT"]
    assert all(shifted[ours, share] > shifted[twin, share] for share in SHARES), "the sentence no longer holds"
    return (
        f"**What does not: residual attention and the shortcut.** ReViT is {least} points below its twin at 1% of the "
        f"labels, {tenth} at 10% and {whole} at 100%, where seeds differ by {span(seeds, 1)}. ReSwin is "
        f"{_gain('ReSwin', SHARES[1]):.1f} points above its twin at 10% and within {max(swin):.1f} otherwise. "
        f"ExMobileViT is within {shortcut:.1f} points of its twin everywhere; under shifts it is the better of the "
        "two at every share, by less than seeds differ. None is steadier or more diverse in its last layer by more "
        "than the spread."
    )


def structures_shifts() -> str:
    """What shifts cost, and how alike tokens are after the last layer."""
    shifted, diverse = _means("shifted_top1"), _means("diversity")
    windows = ("reswin_micro", "exmobilevit_micro", "vitae_micro", "vitaev2_micro")
    plain = ("vit_micro_for_vitae_micro", "vit_micro_for_vitaev2_micro")
    worse, better = (
        span([shifted[model, share] for model in models for share in SHARES], 0)
        for models in ((*windows, "reswin_micro_alone", "mobilevit_micro_twin"), (*plain, *TWINS["ReViT"]))
    )
    cells, vit = (
        span([diverse[model, share] for model in models for share in SHARES], 2)
        for models in (("vitae_micro", "vitaev2_micro"), plain)
    )
    return (
        "**What no paper says**: windows, strides and convolutions stand a shift far worse than plain attention "
        f"({worse}% of shifted images against {better}%), at 28 pixels and with a recipe whose crops shift little. And "
        f"the tokens of ViTAE and ViTAEv2 are nearly alike after the last layer ({cells}; the plain ViT's {vit})."
    )


def families() -> str:
    """Time of our networks over that of timm's nearest."""
    rows = sorted(results("models.json")["results"], key=lambda row: (row["ours"], -row["batch_size"]))
    lines = [
        (f"`{row['ours']}`", f"`{row['peer']}`", row["batch_size"],
         *(f"{row[key]:.2f}" for key in ("ratio", "ratio_fused", "ratio_to_unfused_attention", "training_ratio",
                                         "fuse_gain")),
         f"{row['plain_product_share']:.0%}")
        for row in rows
    ]  # fmt: skip
    header = ("ours", "peer", "batch", "as built", "fused", "to unfused", "training step", "fuse gain", "products")
    facts = rows[0]["inference_facts"]
    return markdown(header, lines, 2) + (
        f"\n\n{days(row['inference_facts']['date'] for row in rows)}, {machine_words(facts['machine'])}, torch "
        f"{facts['versions']['torch']}, seed {facts['seed']}, {rows[0]['inference_rounds']} rounds."
    )


def resolution() -> str:
    """ReViT-S in its forms as images grow."""
    rows = {(row["model"], row["side"]): row for row in results("resolution.json")["results"]}
    forms = ("revit_linear", "revit_quadratic", "revit_definition")
    lines = []
    for side in sorted(side for model, side in rows if model == forms[0]):
        linear, quadratic, definition = (rows[form, side] for form in forms)
        lines.append(
            (side, f"{linear['seconds']:.2f}", f"{quadratic['seconds']:.2f}",
             *(f"{row['added_megabytes']:.0f}" for row in (linear, quadratic, definition)),
             f"{linear['added_megabytes'] / quadratic['added_megabytes']:.2f}")
        )  # fmt: skip
    header = ("side, px", "linear, s", "quadratic, s", "linear, MiB", "quadratic, MiB", "definition, MiB",
              "linear / quadratic memory")  # fmt: skip
    facts = rows[forms[0], 224]["facts"]
    when = days(row["facts"]["date"] for row in rows.values())
    return markdown(header, lines, 0) + f"\n\n{when}, {machine_words(facts['machine'])}, seed {facts['seed']}."


def growth() -> str:
    """How far both forms of ReViT agree, and how ViTAEv2-S grows with its image."""
    contract = results("resolution.json")["contract"]
    apart = max(found["max_logit_difference"] for name, found in contract.items() if name.startswith("revit"))
    grown = contract["vitaev2_growth"]
    return (
        f"Logits of both differ by at most {apart:.1e}. ViTAEv2-S from 224 to 896 px, 16 times the pixels: time "
        f"{grown['seconds']:.1f} times, memory {grown['added_megabytes']:.1f} times. Its multiply-adds grow "
        f"{grown['macs']:.1f} times, because the last two stages attend over the whole map."
    )


BACKBONES = {"vit_small_patch16_224": "vit_small_patch16_224, fused attention"}
"""Rows of features.json that need a word more."""


def backbones() -> str:
    """Peak memory of backbones for the tasks, and how it grows with the pixels."""
    rows = results("features.json")["results"]
    sizes = [(found["height"], found["width"]) for found in rows[0]["memory"]]
    lines = [
        (
            BACKBONES.get(row["name"], row["name"]),
            *(f"{found['megabytes']:.0f}" for found in row["memory"]),
            f"{row['exponent']:.2f}",
        )
        for row in rows
    ]
    header = ("backbone", *(f"{height} x {width}, MiB" for height, width in sizes), "exponent")
    return markdown(header, lines) + (
        f"\n\n{days(row['date'] for row in rows)}, {machine_words(rows[0]['machine'])}, seed {rows[0]['seed']}."
    )


TASK_CASES = {
    "segment": "vitaev2_micro, Mask R-CNN",
    "segment exmobilevit_micro": "exmobilevit_micro, Mask R-CNN",
    "segment revit_micro": "revit_micro, Mask R-CNN",
    "segment resnet18": "timm's resnet18 from random weights, Mask R-CNN",
    "semantic": "vitaev2_micro, semantic FPN",
    "pose": "vitaev2_micro, pose",
}
"""Rows of the table of tasks: cases of tasks.json and what they are."""

METRICS = {
    "segment": {"box_AP50": "box AP50", "mask_AP50": "mask AP50"},
    "semantic": {"miou": "mIoU"},
    "pose": {"pck@0.1": "PCK@0.1"},
}


def task_results() -> str:
    """Detectors, a semantic network and a pose network: accuracy before and after quantization, speed and size."""
    found = {row["case"]: row for row in results("tasks.json")["results"]}
    lines = [line for case, said in TASK_CASES.items() for line in _task(said, found[case])]
    header = ("network", "metric", "float", "W8A8, executed", "points lost", "speed ratio, 1 thread", "2 threads",
              "size", "CPU-minutes")  # fmt: skip
    facts = found["segment"]["facts"]
    when = days(row["facts"]["date"] for row in found.values())
    return markdown(header, lines, 2) + (
        f"\n\nFiles and times: {when}, {machine_words(facts['machine'])}, onnxruntime "
        f"{facts['versions']['onnxruntime']}, seed {facts['seed']}, one run each. Pose is counted on "
        f"{found['pose']['float']['objects']:,} garments, the others on {found['segment']['float']['pictures']} "
        "pictures."
    )


def _task(said: str, row: dict[str, Any]) -> list[tuple[str, ...]]:
    """Lines of a case, one a metric."""
    lines = []
    for index, (key, name) in enumerate(METRICS[row["task"]].items()):
        before, after = row["float"][key], row["w8a8"]["metrics"][key]
        costs: tuple[str, ...] = ("",) * 4
        if index == 0:
            speed = (", ".join(f"{one['ratio']:.2f}" for one in row["speed"][threads] if "w8a8" in one["name"])
                     for threads in ("1", "2"))  # fmt: skip
            size = row["w8a8"]["bytes"] / row["fp32"]["bytes"]
            costs = (*speed, f"{size:.2f}", f"{row['cpu_seconds'] / 60:.1f}")
        lost = f"{100 * (before - after):+.2f}"
        lines.append((said if index == 0 else "", name, f"{before:.4f}", f"{after:.4f}", lost, *costs))
    return lines


MICRO = ("deit", "exmobilevit", "reswin", "revit", "swin", "vit", "vitae", "vitaev2")


def micro_accuracy() -> str:
    """Accuracy of the micro models, as the packed weights say it."""
    lines, dates = [], []
    for name in (f"{family}_micro" for family in MICRO):
        path = weights_file(name)
        model, info = load_checkpoint(path)
        said = info.metrics
        parameters = sum(parameter.numel() for parameter in model.parameters())
        right = f"{said['correct']:,} of {said['images']:,}"
        size = f"{path.stat().st_size / 1e6:.2f} MB"
        lines.append((f"`{name}`", f"{parameters:,}", size, right, f"{said['minutes']:.0f}"))
        dates.append(said["date"])
    header = ("model", "parameters", "file", "right of the test images", "minutes, one thread")
    return markdown(header, lines) + (
        f"\n\nTrained and packed {days(dates)} with seed 0 by `OMP_NUM_THREADS=1 python benchmarks/train_micro.py "
        "NAME`; each file says its figures (`leanvit.checkpoint.load_checkpoint`)."
    )


def timm_networks() -> str:
    """Networks of timm through export, quantization and gate."""
    found = results("timm_networks.json")
    rows = found["rows"]
    listed = len(timm_lines.read_list(RESULTS.parent / "timm_networks.txt"))
    passed, refused = sum(row["ok"] for row in rows), sum(not row["ok"] and row.get("refused", False) for row in rows)
    commits = ", ".join(sorted({str(row["commit"])[:9] for row in rows}))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "leanvit")
    return timm_lines.table(rows) + (
        f"\n\nPassed: {passed} of the {listed} listed; refused in a sentence: {refused}; failed otherwise: "
        f"{len(rows) - passed - refused}; not measured yet: {listed - len(rows)}. {where(found)}, "
        f"seed {found['seed']}, leanvit {commits}, {versions}."
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (structures, structures_convolution, structures_residual, structures_shifts, families, resolution,
                     growth, backbones, task_results, micro_accuracy, timm_networks)
}  # fmt: skip
