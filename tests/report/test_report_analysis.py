"""The page of an analysis: numbers as they are in the files, pictures as they are in the arrays, nothing as markup."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leanvit.errors import DataError
from leanvit.report import write_report
from pages import Page, picture, replaced, rows_of

SECTIONS = [
    "Models",
    "Attention maps",
    "Attention of every head",
    "Attention rollout",
    "Attention distance",
    "Token diversity",
    "Token norms",
    "Residual weight of attention",
    "What each scale contributes to the classifier",
    "Effective receptive field",
    "Cost against resolution",
    "How this was made",
]


def model_values(name: str, scale: float = 1.0) -> dict[str, Any]:
    return {
        "name": name,
        "architecture": name,
        "parameters": 459466,
        "input_size": [28, 28],
        "predicted": ["Bag", "Dress"],
        "done": ["distance"],
        "left_out": {},
        "distance": {"layers": [{"name": f"blocks.{i}.attn", "heads": [scale * (i + 1.25), scale * (i + 2.25)],
                                 "mean": scale * (i + 1.75), "uniform": 14.44} for i in range(3)]},
        "norms": {"sink_times": 3.0, "layers": [
            {"name": f"blocks.{i}", "median": 5.0, "largest": 40.0, "times": 8.0, "sinks": 1.5} for i in range(3)]},
        "diversity": {"layers": [{"name": f"blocks.{i}", "diversity": 0.9 - 0.1 * i, "residual": 0.8}
                                 for i in range(3)]},
        "alpha": {"mode": "learned", "alpha": [0.25, 0.25], "first": [0.75, 0.5625]},
        "shortcut": {"images": 1000, "strides": [8, 16], "rows": [
            {"without": [], "channels": 0, "correct": 910, "top1": 91.0},
            {"without": [8], "channels": 32, "correct": 640, "top1": 64.0}]},
        "field": {"area50": 0.171, "area95": 0.805},
        "cost": {"rows": [
            {"side": 28, "macs": 25225152, "activation_bytes": 153600, "latency_ms": None, "latency_iqr_ms": None},
            {"side": 56, "macs": 132758592, "activation_bytes": 605184, "latency_ms": 2.5, "latency_iqr_ms": 0.1},
            {"side": 57, "error": "can't take 57 x 57 pixels"}]},
    }  # fmt: skip


def values_of(*names: str) -> dict[str, Any]:
    models = [model_values(name, 1.0 + i) for i, name in enumerate(names)]
    return {"command": "leanvit analyze a", "date": "2026-11-24T03:36:12+00:00", "seed": 7, "data": "fashion-mnist",
            "images": 2, "labels": ["Bag", "Coat"], "models": models}  # fmt: skip


def arrays_of(models: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for index in range(models):
        arrays[f"{index}/pixels"] = generator.integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
        for layer in range(3):
            arrays[f"{index}/attention/{layer:03d}"] = generator.dirichlet(np.ones(49), (2, 2)).reshape(2, 2, 7, 7)
        arrays[f"{index}/rollout"] = generator.dirichlet(np.ones(49), 2).reshape(2, 7, 7)
        arrays[f"{index}/field"] = generator.random((28, 28))
    return arrays


def draw(folder: Path, values: dict[str, Any], arrays: dict[str, np.ndarray] | None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(json.dumps(values), encoding="utf-8")
    if arrays is not None:
        np.savez(folder / "analysis.npz", allow_pickle=False, **arrays)
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("run"), values_of("one", "two"), arrays_of(2))


def test_every_section_is_there_and_the_title_names_both_models(full: str) -> None:
    page = Page(full)
    assert page.headings() == SECTIONS
    assert ("h1", "one and two on fashion-mnist") in page.texts
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert all(image["alt"] for image in page.all("img"))
    assert ("code", "leanvit analyze a") in page.texts


def test_tables_show_the_numbers_of_the_files(full: str) -> None:
    rows = rows_of(full)
    assert ["two, 2", "blocks.1.attn", "5.50", "14.44", "4.5, 6.5"] in rows
    assert ["one, 3", "blocks.2", "0.700", "0.800"] in rows
    assert ["one, 3", "learned", "0.2500", "0.562"] in rows
    assert ["one", "8", "32", "64.00", "640 / 1,000", "−27.00"] in rows
    assert ["one", "none: as it is", "0", "91.00", "910 / 1,000", "0.00"] in rows
    assert ["two", "17.1%", "80.5%"] in rows
    assert ["one", "56", "0.133", "0.605", "2.50", "0.100", ""] in rows
    assert ["one", "57", "–", "–", "–", "–", "can&#39;t take 57 x 57 pixels"] in rows


def test_pictures_are_the_arrays(full: str) -> None:
    arrays, images = arrays_of(2), {image["alt"]: image["src"] for image in Page(full).all("img")}
    inputs = [
        picture(image["src"]) for image in Page(full).all("img") if image["alt"].startswith("Input 2, label Coat,")
    ]
    assert np.array_equal(inputs[0], arrays["0/pixels"][1])
    head = picture(images["two: layer 3, head 2"]).astype(int)
    share = arrays["1/attention/002"][0, 1]
    assert head.shape == (7, 7, 3)
    # Green rises with the value in viridis.
    assert np.corrcoef(head[..., 1].ravel(), share.ravel())[0, 1] > 0.95
    field = picture(images["one: effective receptive field"]).astype(int)
    assert np.corrcoef(field[..., 1].ravel(), np.sqrt(arrays["0/field"]).ravel())[0, 1] > 0.95
    assert sum(alt.endswith(": rollout") for alt in images) == 4


def test_curves_and_dots_of_both_models_are_drawn(full: str) -> None:
    chart = next(svg for svg in re.findall(r"<svg.*?</svg>", full) if "distance-chart-title" in svg)
    assert chart.count("<polyline") == 2 + 2 * 3 * 2
    assert chart.count('class="dot l1"') == chart.count('class="dot l2"') == 6


def test_one_model_without_arrays_gives_tables_and_charts(tmp_path: Path) -> None:
    page = Page(draw(tmp_path, values_of("one"), None))
    assert page.headings() == [s for s in SECTIONS if s not in SECTIONS[1:4]]
    assert "Pictures are drawn from analysis.npz" in page.text()


@pytest.mark.parametrize("part", ["distance", "diversity", "norms", "alpha", "shortcut", "field", "cost"])
def test_a_part_that_was_left_out_has_no_section(tmp_path: Path, part: str) -> None:
    values = values_of("one")
    del values["models"][0][part]
    values["models"][0]["left_out"][part] = "a reason"
    page = Page(draw(tmp_path, values, None))
    assert len(page.headings()) == len(SECTIONS) - 4
    assert f"{part}: a reason" in page.text()


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
def test_numbers_that_are_not_finite_are_dashes(tmp_path: Path, bad: float | None) -> None:
    values = replaced(values_of("one", "two"), lambda value: bad if isinstance(value, float) else value)
    arrays = {name: np.full_like(a, np.nan) if a.dtype == np.float64 else a for name, a in arrays_of(2).items()}
    page = Page(draw(tmp_path, values, arrays))
    assert not re.search(r"\b(nan|NaN|inf|Infinity|None)\b", page.text())


def test_no_string_becomes_markup(tmp_path: Path) -> None:
    attack = "'\"></title></style></svg><img src=x onerror=alert(1)><script>alert(1)</script>"
    values = values_of("one", "two")
    values["models"][1]["left_out"] = {"rollout": "reason"}
    files = replaced(values, lambda value: value + attack if isinstance(value, str) else value)
    page = Page(draw(tmp_path, files, arrays_of(2)))
    assert "script" not in {tag for tag, _ in page.elements}
    assert all(image["src"].startswith("data:image/png") for image in page.all("img"))
    assert attack in page.text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda values, arrays: values.pop("labels"), "KeyError: 'labels'"),
        (lambda values, arrays: values["models"][0].pop("name"), "KeyError: 'name'"),
        (lambda values, arrays: arrays.pop("0/pixels"), "KeyError: '0/pixels'"),
    ],
)
def test_a_file_of_another_shape_is_one_clear_line(tmp_path: Path, change: Any, words: str) -> None:
    values, arrays = values_of("one"), arrays_of(1)
    change(values, arrays)
    with pytest.raises(DataError, match=words):
        draw(tmp_path, values, arrays)
