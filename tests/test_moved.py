"""Import paths of 0.1 lead to the same objects, with a warning that names the new path; public names are pinned."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import leanvit
from leanvit import _moved


@pytest.mark.parametrize("new", sorted({*_moved.MOVED.values(), *_moved.NAMES_OF_RUNTIME.values()}))
def test_every_new_path_is_a_module(new: str) -> None:
    assert importlib.import_module(new).__name__ == new


OLD_IMPORTS = [
    ("from leanvit.scenes.coco import read_coco as found", "leanvit.scenes.coco", "annotations.coco.read_coco"),
    ("from leanvit.datasets import load_split as found", "leanvit.datasets", "data.sets.load_split"),
    (
        "import leanvit.engines; found = leanvit.engines.open_engine",
        "leanvit.engines",
        "runtime.engines.open_engine",
    ),
    ("from leanvit.runtime import Predictor as found", "leanvit.runtime.Predictor", "runtime.predictor.Predictor"),
    ("from leanvit.export.bundle import sign as found", "leanvit.export.bundle", "runtime.bundle.sign"),
    (
        "from leanvit.inspection.examine import look as found",
        "leanvit.inspection.examine",
        "inspection.labelled.look",
    ),
    ("from leanvit.downstream.train import run as found", "leanvit.downstream.train", "train.loop.run"),
    ("from leanvit.tasks.segment import Segmenter as found", "leanvit.tasks.segment", "tasks.semantic.Segmenter"),
    ("from leanvit._svg import line_chart as found", "leanvit._svg", "report.svg.line_chart"),
    ("from leanvit.data import epoch_order as found", "leanvit.data.epoch_order", "data.loader.epoch_order"),
    (
        "import leanvit.imaging; found = leanvit.imaging.find_images",
        "leanvit.imaging.find_images",
        "image_paths.find_images",
    ),
    ("from leanvit.distill import Teacher as found", "leanvit.distill", "train.distill.Teacher"),
]
"""A statement that binds `found`, the old path that it warns of, the new one."""

FORKED = """
import importlib, os, sys, warnings
import onnx, onnxruntime, timm, torchvision  # imported once for all; nothing of leanvit is

for index, (statement, module, name) in enumerate(STATEMENTS):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            exec(statement)
        assert found is getattr(importlib.import_module(module), name)
        print(*(f"{index} {w.message}" for w in caught if w.category is FutureWarning), sep="\\n")
        sys.stdout.flush()
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{statement}: see above")
"""


def test_an_old_import_gives_the_new_object_and_says_where_it_is() -> None:
    """Each in a process that has imported nothing of leanvit before: a module warns once."""
    places = [f"leanvit.{new}".rpartition(".") for _, _, new in OLD_IMPORTS]
    statements = [(row[0], place[0], place[2]) for row, place in zip(OLD_IMPORTS, places, strict=True)]
    code = f"STATEMENTS = {statements!r}\n{FORKED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    for index, ((_, old, _), (place, _, name)) in enumerate(zip(OLD_IMPORTS, places, strict=True)):
        moved = f"{_moved.MOVED.get(old, place)}{'.' + name if old.endswith(name) else ''}"
        assert f"{index} {old} is {moved} now; the old path goes with leanvit 0.3" in said


@pytest.mark.parametrize("old", sorted(_moved.GONE))
def test_a_name_that_is_gone_says_what_to_use(old: str) -> None:
    module, _, name = old.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        place = importlib.import_module(module)
    with pytest.raises(ImportError, match=re.escape(f"{old} went with leanvit 0.1. Use ")):
        getattr(place, name)


@pytest.mark.parametrize("old", sorted(_moved.GONE_MODULES))
def test_a_module_that_is_gone_says_what_to_use(old: str) -> None:
    with pytest.raises(ImportError, match=re.escape(f"{old} went with leanvit 0.1. Use ")):
        importlib.import_module(old)


def test_a_predictor_still_ranks_prepared_images(shared_bundle: Path) -> None:
    predictor = leanvit.Predictor(shared_bundle)
    images = np.random.default_rng(0).integers(0, 256, (2, *predictor.size, 3), np.uint8)
    with pytest.warns(FutureWarning, match=re.escape("Predictor.top(images, top_k) is Predictor.predict")):
        found = predictor.top(images, 3)
    for row, logits in zip(found, predictor.logits(images), strict=True):
        assert [label for label, _ in row] == [predictor.labels[i] for i in np.argsort(-logits)[:3]]
        shares = np.exp(logits) / np.exp(logits).sum()
        assert [share for _, share in row] == pytest.approx(np.sort(shares)[::-1][:3], abs=1e-6)


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    for name in ("leanvit.imaging", "leanvit.data", "leanvit.config"):
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            importlib.import_module(name).nothing  # noqa: B018


@pytest.mark.parametrize("new", sorted(set(_moved.NAMES.values())))
def test_every_name_that_went_elsewhere_is_there(new: str) -> None:
    module, _, name = new.rpartition(".")
    assert hasattr(importlib.import_module(module), name)


def test_new_paths_warn_of_nothing() -> None:
    code = "import leanvit.runtime.predictor, leanvit.annotations.coco, leanvit.data.sets, leanvit.export.api"
    subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", code], check=True)


def test_the_public_names_are_pinned() -> None:
    assert leanvit.__all__ == [
        "Budget", "ExportOptions", "LoadOptions", "MPTQConfig", "OptimizeOptions", "Predictor", "QuantizedModel",
        "__version__", "export", "load", "optimize", "quantize",
    ]  # fmt: skip
    assert dir(leanvit) == leanvit.__all__
    for name in leanvit.__all__:
        assert getattr(leanvit, name) is not None


def test_export_is_a_function_with_a_signature_whatever_was_imported() -> None:
    from leanvit.export import api

    assert leanvit.export is api.export
    assert inspect.isfunction(leanvit.export)
    assert next(iter(inspect.signature(leanvit.export).parameters)) == "model"


def test_an_unknown_module_stays_unknown() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"leanvit\.nowhere"):
        importlib.import_module("leanvit.nowhere")
