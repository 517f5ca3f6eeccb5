"""`leanvit data inspect`: counts are those of the files, and every planted defect is found and named."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.utils.class_weight import compute_class_weight

from common import Outcome, save_image, smooth
from leanvit.cli import parse
from leanvit.config import load_yaml
from leanvit.inspection.labelled_page import THUMBNAIL
from pages import Page

Run = Callable[..., Outcome]
PLANTED = {"cat": 5, "dog": 3, "<eel> & co": 2}


@pytest.fixture
def planted(image_folder: Callable[..., Path]) -> Path:
    """train/ and val/ with one defect of each kind."""
    root = image_folder("pets/train", **PLANTED).parent
    image_folder("pets/val", **dict.fromkeys(PLANTED, 2))
    for seed, path in enumerate(sorted((root / "val").rglob("*.png")), 5000):
        save_image(path, smooth(40, 24, seed))  # image_folder draws the same pictures in both parts
    train = root / "train"
    cut = train / "dog" / "2.png"
    cut.write_bytes(cut.read_bytes()[:70])
    with Image.open(train / "cat" / "0.png") as image:
        image.save(train / "cat" / "copy.bmp")  # the same pixels in another lossless format
    shutil.copy(train / "cat" / "1.png", train / "dog" / "wrong.png")
    shutil.copy(train / "<eel> & co" / "0.png", root / "val" / "<eel> & co" / "leak.png")
    Image.fromarray(smooth(90, 50, seed=77)[:, :, 0]).save(train / "dog" / "grey.jpg")
    return root


@pytest.fixture
def inspected(planted: Path, tmp_path: Path, leanvit: Run) -> tuple[Outcome, dict[str, Any], str]:
    """Outcome, inspect.json and page of one inspection."""
    done = leanvit("data", "inspect", planted, "--output", tmp_path / "out")
    return done, *(reader(tmp_path / "out") for reader in (read_result, read_page))


def read_result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "inspect.json").read_text())


def read_page(folder: Path) -> str:
    return (folder / "inspect.html").read_text(encoding="utf-8")


def test_a_corrupt_file_is_named_everywhere_and_exits_6(
    inspected: tuple[Outcome, dict[str, Any], str], planted: Path, tmp_path: Path
) -> None:
    done, result, page = inspected
    bad = str(planted / "train" / "dog" / "2.png")
    assert done.code == 6
    assert f"1 of 20 images can't be read: {bad}; all others were looked at. " in done.error
    (corrupt,) = result["parts"]["train"]["corrupt"]
    assert corrupt["image"] == bad
    assert "damaged image" in corrupt["problem"]
    assert result["parts"]["val"]["corrupt"] == []
    assert "dog/2.png" in page
    assert f"page {tmp_path}/out/inspect.html" in done.out


def test_counts_are_those_of_the_files(inspected: tuple[Outcome, dict[str, Any], str], planted: Path) -> None:
    _, result, _ = inspected
    assert list(result["parts"]) == ["train", "val"]
    assert result["classes"] == sorted(PLANTED)
    for split, part in result["parts"].items():
        found = {folder.name: len(list(folder.iterdir())) for folder in sorted((planted / split).iterdir())}
        assert part["per_class"] == found
        assert part["images"] == sum(found.values())
    train = result["parts"]["train"]
    assert train["width"] == {"min": 32, "median": 32.0, "max": 50}
    assert train["height"] == {"min": 32, "median": 32.0, "max": 90}
    assert train["formats"] == {"PNG": 10, "BMP": 1, "JPEG": 1}
    assert train["modes"] == {"RGB": 11, "L": 1}
    assert result["parts"]["val"]["width"] == {"min": 24, "median": 24.0, "max": 32}


def test_balance_is_that_of_scikit_learn_over_the_readable_images(
    inspected: tuple[Outcome, dict[str, Any], str],
) -> None:
    _, result, _ = inspected
    readable = {"<eel> & co": 2, "cat": 6, "dog": 4}
    labels = [name for name, count in readable.items() for _ in range(count)]
    truth = compute_class_weight("balanced", classes=np.array(list(readable)), y=labels)
    found = result["balance"]
    np.testing.assert_allclose(list(found["weights"].values()), truth)
    assert list(found["weights"]) == list(readable)
    assert (found["largest"], found["smallest"], found["ratio"]) == (
        {"class": "cat", "images": 6}, {"class": "<eel> & co", "images": 2}, 3.0,
    )  # fmt: skip


def test_copies_leaks_and_contradictions_are_told_apart(
    inspected: tuple[Outcome, dict[str, Any], str], planted: Path
) -> None:
    done, result, page = inspected
    found = result["duplicates"]
    assert (found["extra"], found["leaks"], found["contradictions"]) == (3, 1, 1)

    def group(*names: str) -> list[str]:
        return sorted(str(planted / name) for name in names)

    assert [sorted(one["image"] for one in group_["images"]) for group_ in found["groups"]] == [
        group("train/<eel> & co/0.png", "val/<eel> & co/leak.png"),
        group("train/cat/1.png", "train/dog/wrong.png"),
        group("train/cat/0.png", "train/cat/copy.bmp"),
    ]
    assert [(g["leak"], g["contradiction"]) for g in found["groups"]] == [(True, False), (False, True), (False, False)]
    assert [one["part"] for one in found["groups"][0]["images"]] == ["train", "val"]
    assert "3 duplicates, in 3 groups: 1 from training into another part, 1 with different classes" in done.out
    assert html.escape("<eel> & co/leak.png") in page


def pictures(page: Page) -> dict[str, Image.Image]:
    """The pictures of a page by what is said of them."""
    shown = {image["alt"]: image["src"].partition("base64,")[2] for image in page.all("img")}
    return {said: Image.open(io.BytesIO(base64.b64decode(data))) for said, data in shown.items()}


def test_the_page_is_whole_loads_nothing_and_shows_the_pictures_of_each_class(
    inspected: tuple[Outcome, dict[str, Any], str], planted: Path
) -> None:
    page = Page(inspected[2])
    addresses = [a[key] for _, a in page.elements for key in ("src", "href") if key in a]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    shown_by_class = pictures(page)
    assert set(shown_by_class) == {f"Training images of class {name}" for name in PLANTED}
    cats = shown_by_class["Training images of class cat"]
    files = sorted((planted / "train" / "cat").iterdir())
    assert cats.size == (len(files) * (THUMBNAIL + 4) - 4, THUMBNAIL)
    for place, path in enumerate(files):
        with Image.open(path) as image:
            truth = image.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        shown = cats.crop((place * (THUMBNAIL + 4), 0, place * (THUMBNAIL + 4) + THUMBNAIL, THUMBNAIL))
        assert np.abs(np.asarray(shown).astype(int) - np.asarray(truth)).mean() < 6, path


def test_a_clean_set_exits_0_and_writes_its_config(tmp_path: Path, leanvit: Run) -> None:
    options = ["--output", tmp_path / "out", "--images-per-class", 3, "--json", "--val-fraction", 0.25]
    done = leanvit("data", "inspect", "digits", *options)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == read_result(tmp_path / "out")
    truth = np.bincount(load_digits().target)
    total = [
        result["parts"]["train"]["per_class"][str(d)] + result["parts"]["val"]["per_class"][str(d)] for d in range(10)
    ]
    assert total == truth.tolist()
    assert result["parts"]["val"]["images"] == sum(round(0.25 * count) for count in truth)
    assert result["parts"]["train"]["formats"] == {"array": result["parts"]["train"]["images"]}
    assert result["duplicates"]["extra"] == len(truth.repeat(truth)) - len(np.unique(load_digits().data, axis=0))
    assert load_yaml(tmp_path / "out" / "config.yaml")["data"] == "digits"
    shown = pictures(Page(read_page(tmp_path / "out")))
    assert {picture.width for picture in shown.values()} == {3 * THUMBNAIL + 8}


def test_the_contact_sheet_can_be_left_out_and_depends_on_the_seed_only(
    image_folder: Callable[..., Path], tmp_path: Path, leanvit: Run
) -> None:
    root = image_folder("set", a=30, b=30)

    def page(name: str, *options: object) -> str:
        assert leanvit("data", "inspect", root, "--output", tmp_path / name, *options).code == 0
        return read_page(tmp_path / name)

    assert page("one") == page("two")
    assert page("one") != page("other", "--seed", 1)
    assert "<img" not in page("none", "--images-per-class", 0)


def test_test_images_are_looked_at_where_they_are_a_part_of_their_own(
    image_folder: Callable[..., Path], tmp_path: Path, leanvit: Run
) -> None:
    root = image_folder("set/train", a=2, b=2).parent
    image_folder("set/val", a=2, b=2)
    image_folder("set/test", a=3, b=2)
    assert leanvit("data", "inspect", root, "--output", tmp_path / "out").code == 0
    result = read_result(tmp_path / "out")
    assert {split: part["images"] for split, part in result["parts"].items()} == {"train": 4, "val": 4, "test": 5}
    assert result["duplicates"]["leaks"] == 4  # image_folder draws the same pictures in every part


def test_many_classes_are_all_in_the_table_and_the_ends_in_the_chart(tmp_path: Path, leanvit: Run) -> None:
    for number in range(40):
        (tmp_path / "set" / f"class {number:02}").mkdir(parents=True)
        for copy in range(2 + number // 10):
            save_image(tmp_path / "set" / f"class {number:02}" / f"{copy}.png", smooth(8, 8, seed=10 * number + copy))
    assert leanvit("data", "inspect", tmp_path / "set", "--output", tmp_path / "out").code == 0
    page = read_page(tmp_path / "out")
    assert "the 15 largest and 15 smallest of 40" in page
    assert len(re.findall(r'<th scope="row">class \d\d</th>', page)) == 40


def test_a_class_whose_images_are_all_corrupt_has_no_weight(
    image_folder: Callable[..., Path], tmp_path: Path, leanvit: Run
) -> None:
    root = image_folder("set/train", a=2, b=2).parent
    image_folder("set/val", a=2, b=2)
    for path in (root / "train" / "b").iterdir():
        path.write_bytes(b"no image")
    done = leanvit("data", "inspect", root, "--output", tmp_path / "out")
    assert done.code == 6
    assert "2 of 8 images can't be read" in done.error
    balance = read_result(tmp_path / "out")["balance"]
    assert balance["ratio"] is None
    assert balance["weights"] == {"a": 0.5, "b": None}


def test_conversions_are_counted(image_folder: Callable[..., Path], tmp_path: Path, leanvit: Run) -> None:
    root = image_folder("set", a=3, b=3)
    for name in ("a/0.jpg", "b/0.jpg"):
        Image.fromarray(smooth(20, 20, seed=1)).convert("CMYK").save(root / name)
    assert leanvit("data", "inspect", root, "--output", tmp_path / "out").code == 0
    parts = read_result(tmp_path / "out")["parts"].values()
    sentence = "CMYK image converted to RGB without its colour profile"
    assert sum(part["converted"].get(sentence, 0) for part in parts) == 2
    assert sum(part["modes"].get("CMYK", 0) for part in parts) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["data", "inspect"], 2, "no data given, expected one. Run: leanvit data inspect --help"),
        (["data", "inspct", "x"], 2, "unknown verb 'data inspct'. Did you mean 'data inspect'? Run: leanvit --help"),
        (["data"], 2, "unknown verb 'data'"),
        (["data", "inspect", "digits", "--images-per-class", "-1"], 2, "images_per_class is -1, expected at least 0"),
        (["data", "inspect", "digits", "--val-fraction", "1"], 2, "val_fraction is 1.0, expected between 0 and 1"),
        (["data", "inspect", "gone"], 3, "data 'gone': no such folder"),
    ],
)
def test_a_wrong_command_is_one_line(arguments: list[str], code: int, words: str, leanvit: Run) -> None:
    done = leanvit(*arguments)
    assert done.code == code
    assert words in done.error
    assert done.out == ""


def test_flags_may_stand_anywhere() -> None:
    config = parse("data inspect", ["--seed", "3", "digits", "--json"])
    assert (config.data, config.seed, config.json) == ("digits", 3, True)
