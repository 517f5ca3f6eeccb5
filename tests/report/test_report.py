"""The report: one page, well-formed, self-contained, escaped, and true to the files of its run."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanvit.errors import BundleError, DataError
from leanvit.report import duration, interval, write_report
from leanvit.report import svg as _svg
from leanvit.report.bit_plan import split_sites
from leanvit.report.pixels import png_uri
from pages import MACHINE, SCRIPT, VERSIONS, Page, draw, make_run, picture, replaced, rows_of

HEADINGS = {
    "demo.json": "Result",
    "train/train.json": "Training",
    "quantize-w8a8/quantize.json": "Quantization",
    "attention.json": "Attention through the depth",
    "bundle/bundle.json": "Bundle",
    "bundle/verify.json": "Verification gate",
    "benchmark.json": "Benchmark",
}


def demo_values() -> dict[str, Any]:
    rows = [
        ("PyTorch eager, float32", 98.33, 353, 2732204, 3.13, 820.4, 1.0, False),
        ("ONNX Runtime, float32", 98.33, 353, 2801004, 0.971, 3011.0, 3.67, False),
        ("ONNX Runtime, W8A8 (SQ-b)", 98.05, 352, 792204, 0.412, 6120.7, 7.46, False),
        ("W4A4 (SQ-b), simulated", 91.36, 328, 421000, None, None, None, True),
    ]
    keys = ("name", "accuracy", "correct", "bytes", "latency_ms", "throughput", "speedup", "simulated")
    return {
        "command": "leanvit demo --output runs/demo --epochs 40 --seed 0",
        "date": "2026-11-24T03:36:12+00:00",
        "seed": 0,
        "seconds": 187.4,
        "machine": MACHINE,
        "versions": VERSIONS,
        "table": [dict(zip(keys, row, strict=True)) | {"images": 359} for row in rows],
    }


def train_values(epochs: int = 40) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    history = []
    for epoch in range(1, epochs + 1):
        loss = 0.52 + 1.75 * math.exp(-epoch / 4) + generator.normal(0, 0.012)
        val = 0.058 + 1.9 * math.exp(-epoch / 3.1) + abs(generator.normal(0, 0.02))
        top1 = 98.4 - 62 * math.exp(-epoch / 2.6) - abs(generator.normal(0, 0.5))
        history.append(
            {
                "epoch": epoch,
                "lr": 3e-3 * 0.5 * (1 + math.cos(math.pi * epoch / (epochs + 1))),
                "train_loss": loss,
                "train_top1": min(100.0, 99.2 - 75 * math.exp(-epoch / 3.6) + generator.normal(0, 0.3)),
                "val_loss": val,
                "val_top1": round(top1 * 3.59) / 3.59,
                "seconds": 3.4,
            }
        )
    top = max(history, key=lambda row: (row["val_top1"], -row["val_loss"]))
    return {
        "architecture": "revit_micro",
        "parameters": 677291,
        "data": "digits",
        "train_images": 1438,
        "val_images": 359,
        "autocast": "bfloat16",
        "device": "cpu",
        "seed": 0,
        "left_out": {"train": [], "val": []},
        "best": {"top1": top["val_top1"], "top5": 100.0, "loss": top["val_loss"], "images": 359, "correct": 353},
        "history": history,
    }


def site_names(blocks: int, prefix: str = "blocks") -> list[tuple[str, str]]:
    roles = (("attn.qkv", "linear"), ("attn.qk", "matmul"), ("attn.av", "matmul"), ("attn.proj", "linear"),
             ("mlp.fc1", "linear"), ("mlp.fc2", "linear"))  # fmt: skip
    inner = [(f"{prefix}.{block}.{role}", kind) for block in range(blocks) for role, kind in roles]
    return [("patch_embed.proj", "conv2d"), *inner, ("head", "linear")]


def quantize_values(bits: int, blocks: int = 6) -> dict[str, Any]:
    generator = np.random.default_rng(bits)
    sites = []
    for index, (name, kind) in enumerate(site_names(blocks)):
        wide = 8 if kind == "conv2d" or name == "head" else bits
        level = 6.02 * bits - 8 - 0.12 * index + generator.normal(0, 2.2) + (9 if name.endswith("av") else 0)
        sites.append(
            {
                "name": name,
                "kind": kind,
                "weight_bits": wide,
                "activation_bits": wide,
                "macs": int(generator.integers(100_000, 3_000_000)),
                "sqnr_db": float(level),
            }
        )
    return {
        "config": {"weight_bits": bits, "activation_bits": bits, "smoothing": "sq-b", "version": 1},
        "calibration": {"images": 256, "mean": -0.61, "std": 1.13, "neighbour_correlation": 0.87},
        "sites": sites,
        "smoothing_left_out": ["norm: its output is also read by aten.mean.dim"],
        "rotation": {
            "taken": False,
            "noise_db": {"rotated": -14.31, "as it is": -15.08},
            "left_out": ["stages.0.norm1: conv2d in stages.0 reads it"],
        },
        "unquantized": [],
        "float_bytes": 2732204,
        "quantized_bytes": 792204 if bits == 8 else 421000,
        "average_weight_bits": float(bits) + 0.04 * (8 - bits),
        "bitops": 42.4e6 * bits * bits,
        "accuracy": {"top1": 98.05 if bits == 8 else 91.36, "images": 359, "correct": 352 if bits == 8 else 328},
    }


def attention_values(layers: int = 6, side: int = 32, grid: int = 8) -> dict[str, Any]:
    generator = np.random.default_rng(3)
    ys, xs = np.mgrid[0:grid, 0:grid] + 0.5
    images = []
    for label, predicted in (("0", "0"), ("3", "3"), ("5", "9"), ("8", "8")):
        cells = np.kron(generator.integers(0, 256, (8, 8)), np.ones((side // 8, side // 8)))
        pixels = np.repeat(cells[..., None], 3, axis=2).astype(int)
        maps = []
        for layer in range(layers):
            width = grid / (1.2 + 0.9 * layer)
            bump = np.exp(-((xs - generator.uniform(2, 6)) ** 2 + (ys - generator.uniform(2, 6)) ** 2) / width**2)
            values = 0.4 + bump * (1 + layer) + 0.2 * generator.random((grid, grid))
            maps.append((values / values.sum()).tolist())
        images.append({"label": label, "predicted": predicted, "image": pixels.tolist(), "maps": maps})
    return {"images": images}


def bundle_values() -> dict[str, Any]:
    return {
        "architecture": "revit_micro",
        "profile": "w8a8",
        "labels": ["0", "1", SCRIPT, "3", "4", '5" onload="x', "6 & 7", "7", "8", "9"],
        "preprocess": {
            "input_size": [32, 32],
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
        },
        "minimum_sqnr_db": 35.0,
        "accuracy": {"data": "digits", "images": 359, "correct": 352, "top1": 98.05, "runtime": "onnxruntime"},
        "input": {"name": "images", "dtype": "uint8", "layout": "NHWC", "channels": "RGB", "batch": "dynamic"},
        "opset": 21,
        "versions": VERSIONS,
        "simulated": False,
        "files": dict.fromkeys(("model.onnx", "golden.npz", "verify.json"), 8 * "0123abcd"),
        "sha256": 64 * "f",
        "schema_version": 1,
    }


def verify_values(failed: bool = False) -> dict[str, Any]:
    checks = [
        ("integrity", True, "3 files match", "SHA-256 of every file", ""),
        ("onnx", True, "valid, opset 21", "onnx.checker accepts it", "Report this model."),
        ("finite weights", True, "0 tensors with NaN or infinity []", "0 tensors with NaN or infinity", "Train again."),
        ("golden images at batch 1", True, "52.3 dB", "at least 35 dB against the model", "Export again."),
        ("golden labels", True, "16 of 16 equal, 0 clear ones differ", "0 differ", ""),
        ("calibration images", True, "256 images", "at least 32", "Give more calibration images."),
        ("accuracy drop", not failed, "98.05% in the runtime against 98.33% in float, +0.28 points on 359 images",
         "at most 1.0 points", "Quantize with more bits, more calibration images, or raise --max-drop."),
        ("agreement", None, "no labelled images given", "labelled images", "Give --data."),
    ]  # fmt: skip
    keys = ("name", "passed", "found", "expected", "hint")
    return {"passed": not failed, "checks": [dict(zip(keys, check, strict=True)) for check in checks]}


def benchmark_values() -> dict[str, Any]:
    targets = [
        ("PyTorch eager, float32", "torch", "float32", (3.13, 39.0), 2732204),
        ("ONNX Runtime, fp32", "onnxruntime", "fp32", (0.971, 10.63), 2801004),
        ("ONNX Runtime, w8a8", "onnxruntime", "w8a8", (0.412, 5.228), 792204),
    ]
    results = [
        {
            "name": name,
            "runtime": runtime,
            "precision": precision,
            "batch_size": batch,
            "median_ms": medians[index],
            "p10_ms": 0.94 * medians[index],
            "p90_ms": 1.21 * medians[index],
            "images_per_second": 820.4 if (index, name[0]) == (1, "P") else 1e3 * batch / medians[index],
            "ratio": targets[0][3][index] / medians[index],
            "bytes": size,
        }
        for index, batch in enumerate((1, 32))
        for name, runtime, precision, medians, size in targets
    ]
    machine = MACHINE | {"system": "Linux x86_64"}
    return {"machine": machine, "date": "2026-11-24T03:36:02+00:00", "threads": 2, "rounds": 15, "results": results}


def all_files() -> dict[str, Any]:
    return {
        "demo.json": demo_values(),
        "train/train.json": train_values(),
        "quantize-w8a8/quantize.json": quantize_values(8),
        "quantize-w4a4/quantize.json": quantize_values(4),
        "attention.json": attention_values(),
        "bundle/bundle.json": bundle_values(),
        "bundle/verify.json": verify_values(),
        "benchmark.json": benchmark_values(),
    }


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("run"), all_files())


def test_a_full_run_has_every_section_in_order(full: str) -> None:
    assert Page(full).headings() == [*HEADINGS.values(), "How this was made"]


@pytest.mark.parametrize("name", HEADINGS)
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "top level"])
def test_a_folder_with_one_file_gives_only_its_section(tmp_path: Path, name: str, flat: bool) -> None:
    page = Page(draw(tmp_path, {Path(name).name if flat else name: all_files()[name]}))
    assert page.headings() == [HEADINGS[name], "How this was made"]
    assert [link["href"] for link in page.all("a")] == [f"#{s['id']}" for s in page.all("section")]


def test_the_page_is_well_formed_and_its_references_resolve(full: str) -> None:
    page = Page(full)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = [a["aria-labelledby"].split() for _, a in page.elements if "aria-labelledby" in a]
    wanted += [[link["href"].removeprefix("#")] for link in page.all("a")]
    assert {name for names in wanted for name in names} <= set(ids)


def test_pictures_and_tables_have_words(full: str) -> None:
    page = Page(full)
    shown = [svg for svg in page.all("svg") if svg.get("aria-hidden") != "true"]
    assert len(shown) == 8
    assert all(svg["role"] == "img" and len(svg["aria-labelledby"].split()) == 2 for svg in shown)
    assert full.count("<desc") == len(shown)
    assert len(page.all("img")) == 4 * 7 + 1
    assert all(image["alt"] for image in page.all("img"))
    assert full.count("<figcaption>") == len(page.all("figure")) == 6
    assert full.count("<caption>") + len([t for t in page.all("table") if "aria-label" in t]) == len(page.all("table"))
    assert all(head["scope"] in ("col", "row", "colgroup") for head in page.all("th"))


def test_the_page_loads_nothing(full: str) -> None:
    page = Page(full)
    assert not {"script", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            assert attributes.get(key, "#")[:5] in ("#", "data:") or attributes[key][0] == "#", (tag, attributes)
    style = "".join(text for tag, text in page.texts if tag == "style") + "".join(
        a.get("style", "") for _, a in page.elements
    )
    assert "url(" not in style
    assert "@import" not in style
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_a_label_with_markup_is_shown_as_text(full: str) -> None:
    assert SCRIPT not in full
    labels = [text for tag, text in Page(full).texts if tag == "li"]
    assert SCRIPT in labels
    assert '5" onload="x' in labels


def test_no_string_of_any_file_becomes_markup(tmp_path: Path) -> None:
    attack = "'\"></title></style></svg><img src=x onerror=alert(1)><script>alert(1)</script>"
    files = replaced(all_files(), lambda value: value + attack if isinstance(value, str) else value)
    page = Page(draw(tmp_path, files))
    assert "script" not in {tag for tag, _ in page.elements}
    assert all(not key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert all(image["src"].startswith("data:image/png") for image in page.all("img"))
    assert attack in page.text()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None], ids=str)
def test_numbers_that_are_not_finite_are_dashes(tmp_path: Path, bad: float | None) -> None:
    files = replaced(all_files(), lambda value: bad if isinstance(value, float) else value)
    files["bundle/verify.json"]["checks"] = files["bundle/verify.json"]["checks"][:2]
    text = draw(tmp_path, files)
    page = Page(text)
    assert page.headings() == [*HEADINGS.values(), "How this was made"]
    attributes = " ".join(value for tag, a in page.elements if tag != "meta" for k, value in a.items() if k != "src")
    assert not re.search(r"\b(nan|inf|infinity|none)\b", attributes + " " + page.text(), re.IGNORECASE)
    assert ["ONNX Runtime, W8A8 (SQ-b)", "–", "352 / 359"] in [row[:3] for row in rows_of(text)]


def test_the_result_table_shows_the_numbers_of_the_run(full: str) -> None:
    rows = rows_of(full)
    _, *cells = next(row for row in rows if row[0] == "ONNX Runtime, W8A8 (SQ-b)")
    assert cells == ["98.05", "352 / 359", "96.0 to 99.1", "0.792", "0.29", "0.412", "6,121", "7.46×"]
    assert next(row for row in rows if row[0].startswith("W4A4 (SQ-b)"))[-3:] == ["–", "–", "–"]
    assert "98.05% of 359 images correct, −0.28 points" in full
    assert "with 29% of its size and 7.46 times its throughput" in full
    assert "Throughput at batch 32, images/s" in full
    assert full.count('class="pick"') == 1


def test_a_row_that_only_a_flag_calls_simulated_is_marked(tmp_path: Path) -> None:
    demo = demo_values()
    demo["table"][-1]["name"] = "W4A4"
    page = Page(draw(tmp_path, {"demo.json": demo}))
    assert ("span", "simulated") in page.texts
    assert ("text", "not measured") in page.texts


def test_bars_are_as_long_as_their_numbers(full: str) -> None:
    chart = next(svg for svg in re.findall(r"<svg.*?</svg>", full) if "throughput-title" in svg)
    widths = [float(width) for width in re.findall(r'<rect [^>]*?width="([\d.]+)"', chart)]
    rates = [row["throughput"] for row in demo_values()["table"][:3]]
    assert np.allclose(np.array(widths) / widths[0], np.array(rates) / rates[0], rtol=0.01)


def test_the_curve_marks_the_epoch_whose_weights_are_kept(full: str) -> None:
    train = train_values()
    top = max(train["history"], key=lambda row: (row["val_top1"], -row["val_loss"]))
    assert f"{top['val_top1']:.2f}% at epoch {top['epoch']}" in full
    assert f"{top['val_loss']:.3f} at epoch {top['epoch']}" in full


@pytest.mark.parametrize("epochs", [0, 1, 2, 400])
def test_training_of_any_length_is_drawn(tmp_path: Path, epochs: int) -> None:
    train = train_values(max(1, epochs))
    train["history"] = train["history"][:epochs]
    page = Page(draw(tmp_path, {"train.json": train}))
    assert page.headings()[0] == "Training"
    assert len(page.all("polyline")) == (4 if epochs else 0)  # two curves in each of two panels


@pytest.mark.parametrize("blocks", [0, 5, 20])
def test_every_site_of_every_plan_has_a_bar_and_bits(tmp_path: Path, blocks: int) -> None:
    files = {f"quantize-w{b}a{b}/quantize.json": quantize_values(b, blocks) for b in (8, 4)}
    text = draw(tmp_path, files)
    for site, _ in site_names(blocks):
        for plan in ("W8A8", "W4A4"):
            assert len(re.findall(rf"<rect [^>]*><title>{re.escape(site)}, {plan}: [−\d.]+ dB</title>", text)) == 1
        assert len(re.findall(rf'title="{re.escape(site)}: weights \d, activations \d bits"', text)) == 2


def test_sites_that_one_plan_leaves_in_float_are_marked(tmp_path: Path) -> None:
    report = quantize_values(4)
    report["sites"] = [site for site in report["sites"] if site["name"] != "blocks.2.mlp.fc1"]
    report["unquantized"] = ["aten.einsum.default at blocks.2"]
    text = draw(tmp_path, {"quantize-a/quantize.json": quantize_values(8), "quantize-b/quantize.json": report})
    assert 'title="blocks.2.mlp.fc1: float"' in text
    assert "not quantized, because no quantizer supports it: aten.einsum.default at blocks.2" in text
    assert "not smoothed with sq-b: norm: its output is also read by aten.mean.dim" in text
    assert "residual stream not rotated: stages.0.norm1: conv2d in stages.0 reads it" in text
    assert "residual stream not rotated: noise behind norms −14.31 dB, −15.08 dB as it is" in text


def test_a_site_without_a_level_is_not_called_the_lowest(tmp_path: Path) -> None:
    report = quantize_values(8, 1)
    for site, level in zip(report["sites"], (None, 40.0, 12.5, 30.0, 31.0, 32.0, 33.0, 34.0), strict=True):
        site["sqnr_db"] = level
    text = draw(tmp_path, {"quantize.json": report})
    assert "lowest: W8A8 12.5 dB" in text
    assert "12.5 at blocks.0.attn.qk" in text
    assert "patch_embed.proj, W8A8:" not in text


def test_exact_and_negative_levels_stay_inside_the_chart(tmp_path: Path) -> None:
    report = quantize_values(8, 1)
    for site, level in zip(report["sites"], (200.0, -200.0, -3.5, 0.0, 41.0), strict=False):
        site["sqnr_db"] = level
    text = draw(tmp_path, {"quantize.json": report})
    for x, width in re.findall(r'<rect [^>]*?class="s1" x="([\d.-]+)"[^>]*? width="([\d.]+)"', text):
        assert 0 <= float(x) <= float(x) + float(width) <= _svg.WIDTH
    assert "patch_embed.proj, W8A8: exact" in text


def test_attention_shows_the_pixels_and_the_maps(full: str) -> None:
    images = attention_values()["images"]
    shown = [image for image in Page(full).all("img") if image["alt"].startswith("Input")]
    assert np.array_equal(picture(shown[0]["src"]), np.array(images[0]["image"]))
    last = np.array(images[0]["maps"][-1])
    drawn = picture(shown[6]["src"]).astype(int)
    assert drawn.shape == (8, 8, 3)
    row, column = np.unravel_index(last.argmax(), last.shape)
    assert f"most at row {row + 1}, column {column + 1}" in shown[6]["alt"]
    assert drawn[row, column, 1] == drawn[..., 1].max()  # green rises with the value in viridis
    assert "label 5, predicted 9, wrong" in shown[14]["alt"]


def test_even_attention_has_full_spread_and_one_focus_the_least(tmp_path: Path) -> None:
    focus = np.zeros((4, 4))
    focus[1, 2] = 1.0
    entry = attention_values()["images"][0] | {"maps": [np.full((4, 4), 1 / 16).tolist(), focus.tolist()]}
    text = draw(tmp_path, {"attention.json": {"images": [entry]}})
    assert "layer 1<br>spread 100%" in text
    assert "layer 2<br>spread 6%" in text


def test_the_gate_names_states_in_words_and_hints_only_where_needed(tmp_path: Path, full: str) -> None:
    assert "7 passed, 0 failed, 1 not verified" in full
    assert "To do: Give --data." in full
    assert "Report this model." not in full
    text = draw(tmp_path, {"verify.json": verify_values(failed=True)})
    assert "The gate is not passed." in text
    states = {row[0]: row[1] for row in rows_of(text) if len(row) == 4}
    assert (states["integrity"], states["accuracy drop"], states["agreement"]) == ("passed", "failed", "not verified")
    assert "raise --max-drop" in text


def test_many_labels_are_all_there_but_folded(tmp_path: Path) -> None:
    manifest = bundle_values() | {"labels": [f"class {i}" for i in range(1000)]}
    page = Page(draw(tmp_path, {"bundle.json": manifest}))
    assert [text for tag, text in page.texts if tag == "li"] == manifest["labels"]
    assert ("summary", "940 more") in page.texts


def test_the_benchmark_says_what_ratios_refer_to(full: str) -> None:
    assert "Ratio is the median of the first target, PyTorch eager, float32," in full
    row = next(row for row in rows_of(full) if row[:2] == ["ONNX Runtime, w8a8", "32"])
    assert row[2:7] == ["5.23", "4.91 to 6.33", "6,121", "7.46×", "0.792"]


def test_output_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"demo.json": demo_values()})
    assert write_report(run) == run / "report.html"
    other = tmp_path / "new" / "page.html"
    assert write_report(str(run), str(other)) == other
    assert other.read_bytes() == (run / "report.html").read_bytes()


def test_a_missing_folder_an_empty_one_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no such folder, expected a run folder\. Check the path"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"none of the known files found, expected one or more of demo\.json, train"):
        write_report(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file, expected a run folder"):
        write_report(tmp_path / "file")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("demo.json", [1, 2], "holds a JSON list, expected an object"),
        ("demo.json", {"table": [{"accuracy": 1.0}]}, "KeyError: 'name'"),
        ("attention.json", {"images": [{"image": [[0]], "maps": []}]}, r"shape \(1, 1\), not \(height, width, 3\)"),
        ("train.json", {"history": 3}, "can't be drawn"),
    ],
)
def test_a_file_of_another_shape_is_one_clear_line(tmp_path: Path, name: str, values: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        draw(tmp_path, {name: values})
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert not (tmp_path / "report.html").exists()


def test_a_damaged_file_keeps_the_report_that_was_there(tmp_path: Path) -> None:
    before = draw(tmp_path, {"demo.json": demo_values()})
    (tmp_path / "benchmark.json").write_text('{"results": [', encoding="utf-8")
    with pytest.raises(BundleError, match=r"benchmark\.json: not valid JSON"):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_the_report_needs_neither_torch_nor_pillow() -> None:
    code = "import sys, leanvit.report; print({'torch', 'timm', 'PIL', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@given(st.floats(-1e12, 1e12), st.floats(-1e12, 1e12), st.integers(3, 12))
def test_ticks_cover_the_range_rise_and_are_few(a: float, b: float, count: int) -> None:
    low, high = min(a, b), max(a, b)
    values = _svg.ticks(low, high, count)
    assert values[0] <= low
    assert values[-1] >= high
    assert 2 <= len(values) <= count
    assert all(x < y for x, y in itertools.pairwise(values))
    steps = np.diff(values)
    assert np.allclose(steps, steps[0], rtol=1e-6)


def test_ticks_are_round_and_their_labels_differ() -> None:
    assert _svg.ticks(0.0, 0.3, 4) == [0.0, 0.1, 0.2, 0.3]
    assert _svg.ticks(35.2, 99.1) == [20.0, 40.0, 60.0, 80.0, 100.0]
    assert _svg.tick_texts([-0.5, 0.0, 0.5]) == ["−0.5", "0.0", "0.5"]
    assert _svg.tick_texts([0.0, 5000.0]) == ["0", "5,000"]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_png_holds_the_pixels(height: int, width: int, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert np.array_equal(picture(png_uri(pixels)), pixels)


@pytest.mark.parametrize(
    ("site", "place"),
    [
        ("blocks.3.attn.qkv", ("blocks.3", "attn.qkv")),
        ("head", ("", "head")),
        ("layers.1.blocks.0.mlp.fc1", ("layers.1.blocks.0", "mlp.fc1")),
    ],
)
def test_sites_fall_into_blocks(site: str, place: tuple[str, str]) -> None:
    swin = [name for layer in range(3) for name, _ in site_names(2, f"layers.{layer}.blocks")]
    vit = [name for name, _ in site_names(4)]
    assert split_sites(vit if site in vit else swin)[site] == place


def test_the_interval_is_wilsons() -> None:
    low, high = interval(0, 10) or (math.nan, math.nan)
    assert low == pytest.approx(0.0, abs=1e-9)
    assert high == pytest.approx(27.75, abs=0.01)
    assert interval(None, 10) is None
    assert interval(0, 0) is None


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (41.2, 187.4, None)] == ["41 s", "3 min 7 s", "–"]


def open_in_browser(page: Path, profile: Path) -> tuple[str, list[str]]:
    """The DOM after loading and every line that the page wrote to the console."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        message = "Chromium is not installed. Run: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--v=0",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr", f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]  # fmt: skip
    done = subprocess.run([chromium, *flags], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.browser
def test_the_page_opens_in_a_browser_without_a_console_error(tmp_path: Path) -> None:
    report = write_report(make_run(tmp_path / "run", all_files()))
    dom, console = open_in_browser(report, tmp_path / "profile")
    assert console == []
    assert Page(dom).headings() == [*HEADINGS.values(), "How this was made"]


@pytest.mark.browser
def test_the_policy_of_the_page_blocks_scripts_and_says_so(tmp_path: Path) -> None:
    """Shows that the test above would see an error, and that injected code would not run."""
    report = write_report(make_run(tmp_path / "run", {"demo.json": demo_values()}))
    code = "<script>document.querySelector('h1').textContent = 'taken'</script></body>"
    report.write_text(report.read_text(encoding="utf-8").replace("</body>", code), encoding="utf-8")
    dom, console = open_in_browser(report, tmp_path / "profile")
    assert len(console) == 1
    assert "Content Security Policy" in console[0]
    assert "taken</h1>" not in dom
