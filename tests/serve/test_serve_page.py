"""The page of `leanvit serve` in headless Chromium: what the service answers is what is drawn, told and compared."""

from __future__ import annotations

import io
import os
import shutil
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from chromium import drive
from common import LABELS, ROOT
from hand_bundles import LABELS as HAND_LABELS
from hand_bundles import hand_bundle
from leanvit import Predictor
from leanvit.export.gate.golden import golden_set
from leanvit.runtime.bundle import read_manifest, sign
from serving import serving

pytestmark = pytest.mark.browser

TASKS = ("detect", "segment", "semantic", "pose")
BOXES = [(10.0, 5.0, 90.0, 70.0), (0.0, 0.0, 40.0, 40.0)]
PICTURE = ROOT / "docs" / "serve.png"
TOKEN = "open-sesame-0123456789"


@pytest.fixture(scope="module")
def bundles(shared_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A classifier, the same file with its labels in another order, and a bundle of each other task."""
    folder = tmp_path_factory.mktemp("served")
    shuffled = Path(shutil.copytree(shared_bundle, folder / "shuffled"))
    manifest = read_manifest(shuffled)
    sign(shuffled, replace(manifest, labels=LABELS[1:] + LABELS[:1]))
    images = golden_set(4, (48, 64))
    hand = {task: hand_bundle(folder / task, task, images) for task in TASKS}
    return {"first": shared_bundle, "second": shuffled, **hand}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("photos")
    for number, photo in enumerate([data.coffee()[30:361:2, 100:501:2], data.chelsea()]):
        Image.fromarray(photo).save(folder / f"{number}.jpg")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def told(
    bundles: dict[str, Path], photos: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What Chromium saw in all scenes."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "token").write_text(TOKEN, encoding="utf-8")
    (folder / "a.txt").write_text("no picture", encoding="utf-8")
    names = [f"{name}={path}" for name, path in bundles.items()]
    one = f"first={bundles['first']}"
    with serving(*names, "--threads", 1) as server, serving(one, "--token-file", folder / "token") as guarded:
        values = {
            "server": f"http://localhost:{server.port}/", "guarded": f"http://localhost:{guarded.port}/",
            "token": TOKEN,
            "photos": [str(path) for path in photos], "broken": [str(folder / "a.txt")], "tasks": TASKS,
            "boxes": "10 5 90 70 0 0 40 40", "picture": str(PICTURE) if os.environ.get("LEANVIT_SCREENSHOTS") else None,
        }  # fmt: skip
        yield drive("serve_page.mjs", values, folder)


def test_labels_are_those_of_predictor(told: dict[str, Any], bundles: dict[str, Path], photos: list[Path]) -> None:
    predictor = Predictor(bundles["first"])
    expected = {path.name: predictor.predict(path)[0][0] for path in photos}
    assert {card["name"]: card["first"] for card in told["classify"]["cards"]} == expected
    assert [name.split(" ")[0] for name in told["classify"]["models"]] == list(bundles)


def test_a_picture_tells_where_its_milliseconds_went(told: dict[str, Any]) -> None:
    for card in told["classify"]["cards"]:
        for step in ("decode and resize", "queue", "network", "together"):
            assert step in card["times"]


def test_two_bundles_stand_side_by_side_with_their_difference(told: dict[str, Any], photos: list[Path]) -> None:
    scene = told["classify"]
    assert scene["sides"] == ["first", "second"]
    assert len(scene["differences"]) == len(photos)
    # The second one has the labels of the first moved by one place.
    assert all("first label" in text and " here, label" in text for text in scene["differences"])


def test_what_the_bundle_proves_is_shown(told: dict[str, Any], bundles: dict[str, Path]) -> None:
    proof = told["classify"]["proof"]
    manifest = read_manifest(bundles["first"])
    for words in (manifest.architecture, "fp32", "passed", manifest.sha256[:12], "golden images"):
        assert words in proof


def test_the_page_is_usable_by_all(told: dict[str, Any]) -> None:
    for name in ("classify", "ways", "tasks", "token"):
        assert told[name]["violations"] == [], name
    assert told["ways"]["overflow"] <= 0
    order = [
        name for name in told["classify"]["order"] if name in ("model", "beside", "files", "Camera", "option-topK")
    ]
    assert order == ["model", "beside", "files", "Camera", "option-topK"]


def test_nothing_is_loaded_from_elsewhere_and_the_console_is_empty(told: dict[str, Any]) -> None:
    for name in ("classify", "tasks"):
        assert told[name]["said"] == {"console": [], "elsewhere": []}, name
    # The browser itself writes a line where the server refuses the file that is no picture.
    assert all("400" in text for text in told["ways"]["said"]["console"])


def test_pictures_are_pasted_dropped_and_taken_and_what_is_none_is_named(told: dict[str, Any]) -> None:
    cards = {card["name"]: card for card in told["ways"]["cards"]}
    first = next(card["first"] for card in told["classify"]["cards"] if card["name"] == "0.jpg")
    assert cards["paste.jpg"]["first"] == cards["drop.jpg"]["first"] == first
    assert cards["camera"]["first"] in LABELS
    assert "not an image" in cards["a.txt"]["problem"]


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks_are_drawn_and_told(
    task: str, told: dict[str, Any], bundles: dict[str, Path], photos: list[Path]
) -> None:
    scene = told["tasks"]["told"][task]
    found = Predictor(bundles[task]).predict(photos[0], **({"boxes": BOXES} if task == "pose" else {}))
    picture = np.asarray(Image.open(photos[0]).convert("RGB")).astype(int)
    drawn = np.asarray(Image.open(io.BytesIO(b64decode(scene["canvas"].partition(",")[2]))).convert("RGB")).astype(int)
    assert drawn.shape == picture.shape
    changed = np.abs(drawn - picture).max(axis=2) > 8
    if task == "semantic":
        shown = [line for line in scene["found"].splitlines() if line in HAND_LABELS]
        assert set(shown) == {HAND_LABELS[label] for label in np.unique(found)}
        assert changed.mean() > 0.8
    else:
        rows = [line for line in scene["found"].splitlines() if "\t" in line][1:]
        assert len(rows) == len(found) * (3 if task == "pose" else 1) > 0
        assert 0.01 < changed.mean() < 0.9


def test_a_server_with_a_token_asks_for_it(told: dict[str, Any]) -> None:
    scene = told["token"]
    assert scene["state"] == "token"
    assert "not its token" in scene["wrong"]
    assert scene["cards"][0]["first"] == next(c["first"] for c in told["classify"]["cards"] if c["name"] == "0.jpg")


def test_the_picture_of_the_docs_is_made_here(told: dict[str, Any]) -> None:
    """LEANVIT_SCREENSHOTS=1 lays it beside the page about it."""
    assert Image.open(PICTURE).width == 1100
