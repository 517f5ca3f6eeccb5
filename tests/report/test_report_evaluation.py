"""The report of an evaluation: every part that was measured, true to its numbers, whatever is missing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leanvit.evaluation import calibration, class_scores, confusion_matrix
from leanvit.report.svg import WIDTH
from pages import MACHINE, SCRIPT, VERSIONS, Page, draw, replaced, rows_of

SECTIONS = ["Accuracy", "Each class", "Confusion", "Calibration", "Corrupted images", "Shifted images"]


def val_values(classes: int = 4, images: int = 200, wrong: float = 0.3) -> dict[str, Any]:
    """A val.json as leanvit val writes it."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, images)
    predicted = np.where(rng.random(images) < wrong, rng.integers(0, classes, images), labels)
    matrix = confusion_matrix(labels, predicted, classes)
    names = [f"class {i}" for i in range(classes)]
    found = calibration(rng.uniform(0.4, 1, images), labels == predicted)
    correct = int(matrix.trace())
    return {
        "schema_version": 1, "command": "leanvit val model --shifts 2", "date": "2026-11-24T20:00:00+00:00",
        "machine": MACHINE, "versions": VERSIONS, "seed": 3, "model": "runs/a", "kind": "checkpoint",
        "architecture": "revit_micro", "runtime": "PyTorch, cpu", "data": "digits", "split": "val", "limit": images,
        "input_size": [28, 28], "left_out": ["broken.png"], "top1": 100 * correct / images, "top5": 99.0,
        "loss": 0.4321, "images": images, "correct": correct, "balanced_accuracy": 71.25,
        "classes": [vars(entry) for entry in class_scores(matrix, names)],
        "confusion": [[i, j, int(matrix[i, j])] for i in range(classes) for j in range(classes) if matrix[i, j]],
        "calibration": {"ece": found.ece, "bins": [vars(entry) for entry in found.bins]},
        "throughput": {"images_per_second": 512.0, "images": images, "batch_size": 64, "threads": 1,
                       "runtime": "PyTorch, cpu", "simulated": True},
        "corruptions": {
            "parameters": "CIFAR-10-C", "seed": 3, "mean_top1": 50.0,
            "rows": [{"name": name, "severity": severity, "top1": 70.0 - 10 * severity - shift, "loss": 1.0, "ece": 0.1,
                      "images": images, "correct": 1}
                     for name, shift in (("shot_noise", 0.0), ("contrast", 5.0)) for severity in (1, 3)],
        },
        "shifts": {
            "pixels": 2, "padding": "edge", "consistency": 81.5,
            "rows": [{"distance": d, "shifts": 8 if d else 1, "top1": 70.0 - d, "agreement": 100.0 - 9 * d,
                      "consistency": 100.0 - 9.25 * d} for d in range(3)],
        },
        "complete": True,
    }  # fmt: skip


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("val"), {"val.json": val_values()})


def test_every_part_has_its_section_and_the_page_its_title(full: str) -> None:
    page = Page(full)
    assert page.headings() == [*SECTIONS, "How this was made"]
    assert ("h1", "revit_micro on digits") in page.texts
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    shown = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(shown) == full.count("<desc") == 6
    assert "leanvit val model --shifts 2" in page.text()


def test_numbers_are_those_of_the_file(full: str) -> None:
    values = val_values()
    text = Page(full).text()
    for words in (
        f"{values['top1']:.2f}% ({values['correct']} of 200 images)", "99.00%", "71.25%", "0.4321 nats",
        "512 images/s in this process, batch 64, 1 thread, simulated", "200 images drawn by seed 3",
        "1 images that could not be read", f"Expected calibration error {values['calibration']['ece']:.4f}",
    ):  # fmt: skip
        assert words in text
    rows = rows_of(full)
    assert ["shot noise", "60.00", "40.00"] in rows
    assert ["contrast", "55.00", "35.00"] in rows
    assert ["2", "8", "68.00", "82.00", "81.50"] in rows
    first = values["classes"][0]
    numbers = [first["images"], first["predicted"], first["correct"]]
    assert ["class 0", *map(str, numbers), f"{first['recall']:.2f}", f"{first['precision']:.2f}"] in rows
    true, called, images = max((c for c in values["confusion"] if c[0] != c[1]), key=lambda cell: cell[2])
    share = 100 * images / values["classes"][true]["images"]
    assert [f"class {true}", f"class {called}", str(images), f"{share:.1f}"] in rows


def test_cells_of_the_confusion_are_where_and_as_strong_as_they_should_be(full: str) -> None:
    chart = next(svg for svg in re.findall(r"<svg.*?</svg>", full) if "confusion-chart-title" in svg)
    area = r'<rect x="([\d.]+)" y="([\d.]+)"[^>]*class="(s\d)" fill-opacity="([\d.]+)">'
    found = re.findall(area + r"<title>class (\d) called class (\d): (\d+) of (\d+)", chart)
    assert sorted([int(i), int(j), int(n)] for *_, i, j, n, _ in found) == sorted(val_values()["confusion"])
    columns = {j: {float(x) for x, *_, called, _, _ in found if called == j} for j in "0123"}
    assert all(len(places) == 1 for places in columns.values())
    assert sorted(columns, key=lambda j: min(columns[j])) == list("0123")
    for x, y, css, opacity, i, j, n, total in found:
        assert (css == "s1") == (i == j)
        assert float(opacity) == pytest.approx(0.12 + 0.68 * int(n) / int(total), abs=0.006)
        assert float(x) <= WIDTH
        assert (float(x) - min(columns["0"]) == pytest.approx(float(y) - 22, abs=0.02)) == (i == j)


def test_bars_of_the_reliability_diagram_are_as_high_as_their_accuracy(full: str) -> None:
    chart = next(svg for svg in re.findall(r"<svg.*?</svg>", full) if "reliability-title" in svg)
    bars = re.findall(
        r'<rect y="([\d.]+)" height="([\d.]+)"[^>]*><title>confidence ([\d.]+), accuracy ([\d.]+), (\d+)', chart
    )
    filled = [entry for entry in val_values()["calibration"]["bins"] if entry["images"]]
    assert [int(images) for *_, images in bars] == [entry["images"] for entry in filled]
    for (y, height, *_), entry in zip(bars, filled, strict=True):
        assert float(y) + float(height) == pytest.approx(286, abs=0.02)
        assert float(height) == pytest.approx(266 * entry["accuracy"], abs=0.02)


@pytest.mark.parametrize("missing", ["corruptions", "shifts", "calibration", "confusion", "classes", "throughput"])
def test_what_was_not_measured_is_not_drawn(missing: str, tmp_path: Path) -> None:
    values = val_values()
    del values[missing]
    headings = Page(draw(tmp_path, {"val.json": values})).headings()
    gone = {"corruptions": ["Corrupted images"], "shifts": ["Shifted images"], "calibration": ["Calibration"],
            "confusion": ["Confusion"], "classes": ["Each class", "Confusion"], "throughput": []}[missing]  # fmt: skip
    assert headings == [name for name in [*SECTIONS, "How this was made"] if name not in gone]


@pytest.mark.parametrize("classes", [1, 2, 20, 21, 1000])
def test_any_number_of_classes_is_drawn(classes: int, tmp_path: Path) -> None:
    values = val_values(classes, 400)
    text = draw(tmp_path, {"val.json": values})
    page = Page(text)
    assert ("Confusion" in page.headings()) == (classes > 1)
    assert ("confusion-chart-title" in text) == (1 < classes <= 20)
    chart = next(svg for svg in re.findall(r"<svg.*?</svg>", text) if "recall-title" in svg)
    assert chart.count("images</text>") == min(classes, 20)
    assert sum(row[0].startswith("class ") and len(row) == 6 for row in rows_of(text)) == classes


def test_a_model_that_is_always_right_has_no_mistakes_to_list(tmp_path: Path) -> None:
    assert "No image is called by a wrong name." in draw(tmp_path, {"val.json": val_values(wrong=0.0)})


def test_a_severity_that_was_cut_short_is_left_out_of_the_mean(tmp_path: Path) -> None:
    values = val_values()
    values["complete"] = False
    values["corruptions"]["rows"].pop()
    text = draw(tmp_path, {"val.json": values})
    assert ["contrast", "55.00", "–"] in rows_of(text)
    assert "interrupted: not all that was asked for is measured" in text
    chart = next(svg for svg in re.findall(r"<svg.*?</svg>", text) if "severity-title" in svg)
    assert [len(points.split()) for points in re.findall(r'points="([^"]+)"', chart)] == [2, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
def test_numbers_that_are_not_finite_are_dashes(bad: float | None, tmp_path: Path) -> None:
    values = replaced(val_values(), lambda value: bad if isinstance(value, float) else value)
    page = Page(draw(tmp_path, {"val.json": values}))
    assert page.headings() == [*SECTIONS, "How this was made"]
    attributes = " ".join(
        value for tag, a in page.elements if tag != "meta" for key, value in a.items() if key != "fill"
    )
    assert not re.search(r"\b(nan|inf|infinity|none)\b", attributes + " " + page.text(), re.IGNORECASE)


def test_no_string_becomes_markup(tmp_path: Path) -> None:
    values = replaced(val_values(), lambda value: value + SCRIPT if isinstance(value, str) else value)
    text = draw(tmp_path, {"val.json": values})
    assert SCRIPT not in text
    assert SCRIPT in Page(text).text()
