"""The examples of docs/analyze.md and docs/evaluate.md, from insight.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tables_common import markdown, results, where


def _row(case: str) -> dict[str, Any]:
    return next(row for row in results("insight.json")["results"] if row["case"] == case)


def _where(case: str) -> str:
    facts = _row(case)["facts"]
    return f"{where(facts, threads=True)}, seed {facts['seed']}"


def insight_layers() -> str:
    """Distance and diversity of two networks by layer."""
    found = _row("layers")["found"]
    lines = []
    for index in range(len(found["models"][0]["diversity"]["layers"])):
        far, near = ([model[part]["layers"][index] for model in found["models"]] for part in ("distance", "diversity"))
        lines.append(
            (index + 1, *(f"{one['mean']:.2f} / {one['uniform']:.2f}" for one in far),
             *(f"{one[key]:.3f}" for key in ("diversity", "residual") for one in near))
        )  # fmt: skip
    header = ("layer", "distance / even: vit", "revit", "1 − cosine: vit", "revit", "residual: vit", "revit")
    torch = _row("layers")["facts"]["versions"]["torch"]
    return markdown(header, lines) + (
        f"\n\n{found['images']} of the 10,000 test images of Fashion-MNIST, {_where('layers')}, torch {torch}."
    )


def insight_networks() -> str:
    """What of the same run is one value a network."""
    models = _row("layers")["found"]["models"]
    alpha = models[1]["alpha"]
    fields: list[str] = []
    own: list[str] = []
    larger: list[str] = []
    for model in models:
        height, width = model["input_size"]
        small, large = (f"{model['field'][key]:.1%}" for key in ("area50", "area95"))
        fields.append(f"{small} / {large} of {height} × {width}")
        rows = {row["side"]: row for row in model["cost"]["rows"]}
        for times, cells, places in ((1, own, 1), (3, larger, 0)):
            cost = rows[times * height]
            cells.append(f"{cost['macs'] / 1e6:.{places}f}, {cost['activation_bytes'] / 1e6:.2f}")
    learned = f"{alpha['alpha'][0]:.3f} (from 0.5); the first layer's logits count {alpha['first'][-1]:.1%} in the last"
    lines = [
        ("alpha", "", learned),
        ("field, area of 50% / 95%", *fields),
        ("10⁶ multiply-adds, MB of activations at its own size", *own),
        ("the same at three times the side", *larger),
    ]
    return markdown(("of the network", *(model["architecture"] for model in models)), lines, 3)


def insight_heads() -> str:
    """How far heads look."""
    layers = [layer for model in _row("layers")["found"]["models"] for layer in model["distance"]["layers"]]
    apart = max(abs(head / layer["uniform"] - 1) for layer in layers for head in layer["heads"])
    return (
        "Nor does attention start locally and widen, as in large ViTs: every head of both looks as far as an even "
        f"one to within {math.ceil(100 * apart)}%, from the first layer on."
    )


def insight_scales() -> str:
    """Accuracy of a classifier without each of its scales."""
    shortcut = _row("scales")["found"]["models"][0]["shortcut"]
    lines = []
    for row in shortcut["rows"]:
        name = " and ".join(map(str, row["without"]))
        said = f"{name}: {row['channels']}" if name else "none"
        lines.append((said, f"{row['top1']:.2f}", f"{row['correct']:,}"))
    header = ("scales at zero (stride: channels)", "top-1, %", f"correct of {shortcut['images']:,}")
    return markdown(header, lines) + f"\n\n{_where('scales')}."


def insight_scales_alone() -> str:
    """What the classifier relies on."""
    shortcut = _row("scales")["found"]["models"][0]["shortcut"]
    rows = {tuple(row["without"]): row["top1"] for row in shortcut["rows"]}
    error = 100 * math.sqrt(rows[()] / 100 * (1 - rows[()] / 100) / shortcut["images"])
    assert abs(rows[()] - rows[4, 8]) < error, "the sentence no longer holds"
    return (
        "This classifier relies on the last scale. Without the early ones it answers as well, to within chance (a "
        f"standard error is {error:.2f} points), though alone they get {rows[16,]:.0f}%: they repeat what the last "
        "scale has."
    )


def evaluated() -> str:
    """Two networks by everything that `leanvit val` measures."""
    found = [_row(case)["found"] for case in ("revit", "vit")]
    worst = [min(one["classes"], key=lambda row: row["recall"]) for one in found]
    least = [min(one["corruptions"]["rows"], key=lambda row: row["top1"]) for one in found]
    moved = [one["shifts"]["rows"][1:] for one in found]
    images = found[0]["images"]
    lines: list[tuple[str, ...]] = [
        (f"top-1 (correct of {images})", *(f"{one['top1']:.2f}% ({one['correct']})" for one in found)),
        ("top-5", *(f"{one['top5']:.2f}%" for one in found)),
        ("mean over classes", *(f"{one['balanced_accuracy']:.2f}%" for one in found)),
        ("worst class: recall", *(f"{one['name']}: {one['recall']:.2f}%" for one in worst)),
        ("NLL, nats", *(f"{one['loss']:.4f}" for one in found)),
        ("ECE", *(f"{one['calibration']['ece']:.4f}" for one in found)),
        (f"top-1 corrupted, severity 3: mean of {len(found[0]['corruptions']['rows'])}",
         *(f"{one['corruptions']['mean_top1']:.2f}%" for one in found)),
        ("the same, lowest", *(f"`{one['name']}`: {one['top1']:.2f}%" for one in least)),
        ("top-1 shifted by 1, 2 pixels", *(", ".join(f"{row['top1']:.2f}%" for row in rows) for rows in moved)),
        ("consistency up to 1, 2 pixels", *(", ".join(f"{row['consistency']:.2f}%" for row in rows) for rows in moved)),
    ]  # fmt: skip
    names = [f"`{one['model']}`, {' × '.join(map(str, one['input_size']))}" for one in found]
    return markdown(("measure", *names), lines, 3) + (
        f"\n\nThe same {images} of Fashion-MNIST's 10,000 test images (drawn by seed 0) for both, {_where('vit')}, "
        "other work beside."
    )


def evaluated_words() -> str:
    """How sure the networks are, and what corruptions cost."""
    revit, vit = (_row(case)["found"] for case in ("revit", "vit"))
    sure = max(vit["calibration"]["bins"], key=lambda row: row["images"])
    rows = sorted(revit["corruptions"]["rows"], key=lambda row: row["top1"])
    assert {row["name"] for row in rows[:2]} == {"brightness", "contrast"}, "the sentence no longer holds"
    return (
        f"Both are trained with label smoothing and say less than they know: of the {sure['images']} images that the "
        f"ViT is {sure['low']:.0%} to {sure['high']:.0%} sure of it has {sure['accuracy']:.1%} right. Severity 3 "
        f"costs the ReViT {revit['top1'] - revit['corruptions']['mean_top1']:.1f} points in the mean, most of it in "
        "`brightness` and `contrast`, which put grey where training had black."
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (insight_layers, insight_networks, insight_heads, insight_scales, insight_scales_alone, evaluated,
                     evaluated_words)
}  # fmt: skip
