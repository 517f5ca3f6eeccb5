"""Networks without a classifier, from the file to a bundle that has proved itself; against timm and scikit-learn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import leanvit as package
from common import smooth
from leanvit.checkpoint import CheckpointInfo, preprocess_for, save_checkpoint
from leanvit.config import ExportOptions, MPTQConfig
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.errors import ConfigError, MissingDependencyError, ShapeError
from leanvit.export.gate.vectors import least_cosine, neighbours_kept
from leanvit.export.gate.verify import verify_bundle
from leanvit.files import read_json
from leanvit.runtime import vector_files
from leanvit.runtime.bundle import read_manifest, sign

Run = Callable[..., Any]
FAST = MPTQConfig(range_search=False, ratio_search=False)
WIDTH = 96


def make_network() -> Any:
    torch.manual_seed(0)
    network = timm.create_model("vit_micro", num_classes=0, depth=2).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return network


@pytest.fixture(scope="module")
def images() -> ImageSet:
    return load_split("digits", "val").subset(np.arange(0, 350, 4))


def vectors_of(network: Any, images: ImageSet) -> np.ndarray:
    with torch.inference_mode():
        found = [network(to_input(x, preprocess_for(network))) for x, _ in Loader(images, preprocess_for(network), 32)]
    return torch.cat(found).numpy()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a network without labels."""
    network, folder = make_network(), tmp_path_factory.mktemp("embed") / "run"
    info = CheckpointInfo("vit_micro", (), preprocess_for(network), kwargs={"depth": 2}, task="embed")
    save_checkpoint(folder / "model.safetensors", network, info)
    return folder


@pytest.fixture(scope="module")
def bundle(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the network itself, without any description: it says that it has no classifier."""
    return package.export(make_network(), tmp_path_factory.mktemp("embed") / "bundle", images=images)


@pytest.fixture(scope="module")
def pictures(images: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        Image.fromarray(images.sources[number]).save(folder / f"{number:02}.png")
    return folder


def test_a_bundles_vectors_are_those_of_the_network(bundle: Path, pictures: Path, images: ImageSet) -> None:
    truth = vectors_of(make_network(), images)[:12]
    predictor = package.Predictor(bundle)
    found = np.stack([predictor.predict(path) for path in sorted(pictures.iterdir())])
    assert (found.shape, found.dtype) == ((12, WIDTH), np.float32)
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-4)
    graph = onnx.load(bundle / "model.onnx").graph
    assert [output.name for output in graph.output] == ["embeddings"]
    manifest = read_manifest(bundle)
    assert (manifest.task, manifest.labels, manifest.answers) == ("embed", (), {"normalize": False})
    assert verify_bundle(bundle)["passed"]


def test_val_quantize_export_verify_and_report(checkpoint: Path, tmp_path: Path, leanvit: Run) -> None:
    quantized, bundle = tmp_path / "quantized", tmp_path / "bundle"
    data = ("--data", "digits")
    found = json.loads(leanvit("val", checkpoint, *data, "--json").out)
    split = load_split("digits", "val")
    voters = KNeighborsClassifier(10, metric="cosine", weights=lambda apart: np.exp((1 - apart) / 0.07))
    voted = voters.fit(vectors_of(make_network(), split).astype(np.float64), split.labels).predict(None)
    assert found["knn_top1"] == pytest.approx((voted == split.labels).mean(), abs=0.003)

    done = leanvit("quantize", checkpoint, *data, "--calibration-images", 32, "--no-range-search",
                   "--no-ratio-search", "--output", quantized)  # fmt: skip
    assert done.code == 0, done.err
    report = read_json(quantized / "quantize.json")
    assert report["float_metrics"]["knn_top1"] == found["knn_top1"]
    assert "accuracy" not in report
    done = leanvit("export", quantized, *data, "--max-drop", 3, "--min-speedup", 0, "--normalize", "--output", bundle)
    assert done.code == 0, done.err
    checked = leanvit("verify", bundle, "--model", quantized, *data, "--json")
    assert checked.code == 0, checked.err
    rows = {row["name"]: row["passed"] for row in json.loads(checked.out)["checks"]}
    assert {"golden cosine", "cosine", "neighbours", "knn_top1", "knn_top1 drop", "embeddings"} <= set(rows)
    assert all(rows.values())
    assert not {"label order", "golden labels", "agreement", "predicted labels"} & set(rows)
    measured = json.loads(leanvit("val", bundle, *data, "--json").out)
    assert measured["knn_top1"] == pytest.approx(read_json(bundle / "bundle.json")["accuracy"]["value"])
    assert leanvit("report", bundle).code == 0
    assert "knn_top1" in (bundle / "report.html").read_text(encoding="utf-8")


def test_corrupted_and_shifted_images_are_measured(bundle: Path, tmp_path: Path, leanvit: Run) -> None:
    done = leanvit("val", bundle, "--data", "digits", "--limit", 60, "--shifts", 1, "--corruptions", "contrast",
                   "--severities", 5, "--output", tmp_path / "val")  # fmt: skip
    assert done.code == 0, done.err
    found = read_json(tmp_path / "val" / "val.json")
    assert (found["task"], found["metric"], found["metrics"]["images"]) == ("embed", "knn_top1", 60)
    assert found["corruptions"]["rows"][0]["name"] == "contrast"
    assert [row["shifts"] for row in found["shifts"]["rows"]] == [1, 8]


def test_an_image_that_can_not_be_read_is_left_out_and_named(bundle: Path, image_folder: Any, leanvit: Run) -> None:
    folder = image_folder("many", cat=4, dog=5)
    (folder / "cat" / "2.png").write_bytes(b"no image")
    for split in ("train", "val"):
        (folder / split).mkdir()
        for label in ("cat", "dog"):
            (folder / split / label).symlink_to(folder / label)
    found = leanvit("val", bundle, "--data", folder, "--bad-images", "skip", "--json")
    values = json.loads(found.out)
    assert values["images"] == 8
    assert [Path(name).name for name in values["left_out"]] == ["2.png"]


# --- quantized in Python, and what is refused ---


def test_a_quantized_network_keeps_that_it_embeds(images: ImageSet, tmp_path: Path) -> None:
    network = make_network()
    x = torch.cat([to_input(x, preprocess_for(network)) for x, _ in Loader(images, preprocess_for(network), 64)])
    quantized = package.quantize(network, x[:64], FAST)
    exported = package.export(quantized, tmp_path / "b", ExportOptions(min_speedup=0, normalize=True))
    manifest = read_manifest(exported)
    assert (manifest.task, manifest.labels, manifest.profile) == ("embed", (), "w8a8")
    found = package.Predictor(exported).predict(smooth(40, 30, seed=1))
    assert np.linalg.norm(found.astype(np.float64)) == pytest.approx(1, abs=1e-6)


def test_maps_instead_of_vectors_are_refused(tmp_path: Path) -> None:
    network = timm.create_model("vit_micro", num_classes=0, depth=1, global_pool="", class_token=True).eval()
    with pytest.raises(ShapeError, match=r"returns \(\d+, 50, 96\) .* expected a vector an image"):
        package.export(network, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_normalize_is_of_embeddings_and_embed_is_not_trained(micro_model: Any, tmp_path: Path, leanvit: Run) -> None:
    with pytest.raises(ConfigError, match="normalize does not fit task classify, expected embed"):
        package.export(micro_model, tmp_path / "b", ExportOptions(normalize=True))
    refused = leanvit("train", "--task", "embed", "--data", "digits", "--output", tmp_path / "run")
    assert refused.code == 2
    assert "whose networks are taken as they are" in refused.error


# --- the gate ---


def test_the_gate_refuses_vectors_that_point_elsewhere(bundle: Path, tmp_path: Path) -> None:
    other = make_network()
    with torch.no_grad():
        other.norm.weight.mul_(torch.linspace(0.5, 1.5, WIDTH))
    wrong = package.export(other, tmp_path / "other")
    broken = Path(shutil.copytree(bundle, tmp_path / "broken"))
    manifest = read_manifest(broken)
    shutil.copy(wrong / "model.onnx", broken / "model.onnx")
    sign(broken, manifest)
    failed = {row["name"] for row in verify_bundle(broken)["checks"] if row["passed"] is False}
    assert "golden cosine" in failed


def test_neighbours_kept_counts_images_whose_nearest_moved() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(200, 64)).astype(np.float32)
    noise = rng.normal(size=truth.shape).astype(np.float32)
    assert neighbours_kept(truth, 5 * truth, 80) == 1
    assert neighbours_kept(truth, truth + 1e-3 * noise, 35) == 1
    # Random vectors: the nearest other one stays by chance alone.
    assert neighbours_kept(truth, noise, 35) < 0.2
    # What exceeds the noise that is asked for is no tie, however much of it there is.
    assert neighbours_kept(truth, truth + 0.5 * noise, 35) < 0.9
    swapped = truth.copy()
    swapped[:40] = truth[40:80]
    assert neighbours_kept(truth, swapped, 80) < 0.99


def test_least_cosine_is_the_angle_of_the_noise() -> None:
    rng = np.random.default_rng(0)
    for db in (20.0, 35.0, 60.0):
        truth = rng.normal(size=(2000, 8))
        noise = rng.normal(size=truth.shape)
        noise *= (
            (10 ** (-db / 20))
            * np.linalg.norm(truth, axis=1, keepdims=True)
            / np.linalg.norm(noise, axis=1, keepdims=True)
        )
        found = truth + noise
        cosine = (truth * found).sum(1) / np.linalg.norm(truth, axis=1) / np.linalg.norm(found, axis=1)
        assert cosine.min() >= least_cosine(db) - 1e-12
        assert cosine.min() < least_cosine(db) + 0.2 * (1 - least_cosine(db))


# --- vectors as files ---


@pytest.mark.parametrize("ending", ["npy", "parquet", "jsonl"])
def test_vectors_are_written_by_ending_and_searched(
    ending: str, bundle: Path, pictures: Path, images: ImageSet, tmp_path: Path, leanvit: Run
) -> None:
    file = tmp_path / f"vectors.{ending}"
    done = leanvit("predict", bundle, pictures, "--output", file, "--batch-size", 5)
    assert done.code == 0, done.err
    truth = vectors_of(make_network(), images)[:12].astype(np.float64)
    paths = [str(path) for path in sorted(pictures.iterdir())]
    rows, names = read_back(file)
    assert names == paths
    np.testing.assert_allclose(rows, truth, rtol=1e-3, atol=1e-4)
    beside = {"vectors.paths.jsonl"} if ending == "npy" else set()
    assert {path.name for path in tmp_path.iterdir()} == {file.name} | beside

    unit = truth / np.linalg.norm(truth, axis=1, keepdims=True)
    order = np.argsort(-(unit @ unit[3]))[:4]
    found = leanvit("predict", bundle, paths[3], "--against", file, "--top-k", 4, "--format", "jsonl")
    near = json.loads(found.out)["nearest"]
    assert [one["path"] for one in near] == [paths[i] for i in order]
    assert [one["cosine"] for one in near] == pytest.approx((unit @ unit[3])[order], abs=1e-4)
    text = leanvit("predict", bundle, paths[3], "--against", file).out
    assert text.startswith(f"{paths[3]}: {paths[3]} 1.0000, ")
    assert text.count(", ") == 4


def read_back(file: Path) -> tuple[np.ndarray, list[str]]:
    """With the readers of others."""
    if file.suffix == ".npy":
        lines = file.with_name("vectors.paths.jsonl").read_text(encoding="utf-8").splitlines()
        return np.load(file), [json.loads(line)["path"] for line in lines]
    if file.suffix == ".parquet":
        import pandas

        table = pandas.read_parquet(file)
        return np.stack(table["embedding"].to_list()), table["path"].to_list()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return np.array([line["embedding"] for line in lines]), [line["path"] for line in lines]


def test_an_image_that_can_not_be_read_has_no_row(bundle: Path, pictures: Path, tmp_path: Path, leanvit: Run) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = sorted(pictures.iterdir())[:2]
    done = leanvit("predict", bundle, good[0], tmp_path / "bad.png", good[1], "--output", tmp_path / "vectors.npy")
    assert done.code == 6
    rows, names = read_back(tmp_path / "vectors.npy")
    assert (rows.shape, names) == ((2, WIDTH), [str(path) for path in good])
    searched = leanvit("predict", bundle, tmp_path / "bad.png", good[1], "--against", tmp_path / "vectors.npy")
    assert searched.code == 6
    assert searched.out.startswith(f"{good[1]}: {good[1]} 1.0000")


def test_numbers_without_names_are_called_by_their_row(
    bundle: Path, pictures: Path, tmp_path: Path, leanvit: Run
) -> None:
    query = pictures / "03.png"
    rows = np.zeros((3, WIDTH))
    rows[1] = package.Predictor(bundle).predict(query)
    np.save(tmp_path / "mine.npy", rows)
    found = leanvit("predict", bundle, query, "--against", tmp_path / "mine.npy", "--top-k", 1)
    assert found.out == f"{query}: row 1 1.0000\n"


def test_what_does_not_fit_is_refused_in_a_sentence(
    bundle: Path, shared_bundle: Path, pictures: Path, tmp_path: Path, leanvit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = pictures / "00.png"
    np.save(tmp_path / "narrow.npy", np.ones((4, 5)))
    (tmp_path / "broken.npy").write_bytes(b"nothing")
    (tmp_path / "lines.jsonl").write_text('{"path": "a"}\n')
    known = ("predict", bundle, query)
    refused = {
        ("--against", tmp_path / "narrow.npy"): (2, "holds vectors of 5 numbers, the bundle returns 96"),
        ("--against", tmp_path / "broken.npy"): (3, "no vectors can be read"),
        ("--against", tmp_path / "lines.jsonl"): (3, "line 1: no JSON with path and embedding"),
        ("--against", tmp_path / "none.npy"): (3, "is no file, expected vectors as .npy, .parquet or .jsonl"),
        ("--against", query): (3, "ends in none of them"),
        ("--top-k", 3): (2, "top_k does not fit task embed"),
        ("--format", "csv"): (2, "format csv does not fit task embed"),
        ("--output", tmp_path / "v.npy", "--format", "text"): (2, "format text does not fit output"),
        ("--output", tmp_path / "v.npy", "--against", tmp_path / "narrow.npy"): (2, "Give --output near.jsonl"),
    }
    for flags, (code, words) in refused.items():
        found = leanvit(*known, *flags)
        assert (found.code, words in found.error) == (code, True), found.err
    other = leanvit("predict", shared_bundle, query, "--against", tmp_path / "narrow.npy")
    assert other.code == 2
    assert "against does not fit task classify" in other.error

    def missing(module: str) -> Any:
        raise MissingDependencyError(f"{module} is not installed")

    monkeypatch.setattr(vector_files, "require", missing)
    without = leanvit(*known, "--output", tmp_path / "v.parquet")
    assert without.code == 4
    assert "pyarrow is not installed" in without.error


def test_what_brings_pyarrow_is_an_extra() -> None:
    import tomllib

    from common import ROOT
    from leanvit.errors import how_to_install

    assert how_to_install("pyarrow") == 'pip install "leanvit[parquet]"'
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert any(entry.startswith("pyarrow") for entry in extras["parquet"])
