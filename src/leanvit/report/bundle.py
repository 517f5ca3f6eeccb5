"""Section Bundle: input, labels and files of the artifact."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from leanvit.report import html
from leanvit.report.html import join
from leanvit.report.metrics import bundle_metric_text, is_task, metrics_tables, names_of
from leanvit.report.run import Run
from leanvit.report.words import Json, accuracy_text, fixed, ratio, significant, versions

LABELS_SHOWN = 60


def bundle_section(run: Run) -> Markup | None:
    """What the artifact is: input, labels, files."""
    manifest = run.get("bundle")
    if not manifest:
        return None
    accuracy = manifest.get("accuracy") or {}
    counted = f"{accuracy_text(accuracy)} of {accuracy.get('data')}"
    value = bundle_metric_text(accuracy) if is_task(manifest) else counted
    measured = f"{value}, measured in {accuracy.get('runtime')}"
    simulated = html.mark("simulated", "badge") if manifest.get("simulated") else None
    labels = manifest.get("labels") or []
    rest = labels[LABELS_SHOWN:]
    more = html.details(f"{len(rest)} more", html.chips(rest)) if rest else None
    folder = next(path.parent for path in run.files.values() if path.name == "bundle.json")
    files = [[name, _file_size(folder / name), html.code(sha)] for name, sha in (manifest.get("files") or {}).items()]
    facts = html.facts(
        [
            ("Architecture", manifest.get("architecture")),
            ("Profile", join([manifest.get("profile"), " ", simulated])),
            ("Metric" if is_task(manifest) else "Accuracy", measured if accuracy else "not measured"),
            ("Input", ", ".join(f"{key}: {value}" for key, value in (manifest.get("input") or {}).items())),
            ("Preprocessing", _preprocessing(manifest.get("preprocess") or {})),
            ("ONNX opset", manifest.get("opset")),
            ("Versions", versions(manifest)),
            (f"{len(labels)} labels", join([html.chips(labels[:LABELS_SHOWN]), more])),
        ]
    )
    caption = "Files and their digests. Every load compares them, byte for byte."
    table = html.table(caption, ("File", "Size", "SHA-256"), files, "lrl") if files else None
    metrics = accuracy.get("metrics") if is_task(manifest) else None
    shown = metrics_tables("bundle", metrics, accuracy.get("metric"), names_of(folder)) if metrics else None
    return join([facts, shown, table])


def _file_size(path: Path) -> str:
    size = path.stat().st_size if path.is_file() else None
    return "–" if size is None else significant(size / 1e6, " MB") if size >= 1e5 else significant(size / 1e3, " kB")


def _preprocessing(values: Json) -> str | None:
    if not values:
        return None
    mean, std = (", ".join(significant(v) for v in values.get(key) or ()) for key in ("mean", "std"))
    size = " × ".join(fixed(side) for side in values.get("input_size") or ())
    share = ratio(values.get("crop_pct"), 0.01)
    kept = {"squash": "both sides squashed", "letterbox": "whole picture at the top left, the rest grey"}
    crop = kept.get(str(values.get("crop_mode")), f"centre crop of {fixed(share, 1, '%')}")
    return (
        f"{size} pixels, {values.get('interpolation')}, {crop}; mean {mean} and standard deviation {std} of R, G, B "
        "in units where 255 is 1, applied inside the graph"
    )
