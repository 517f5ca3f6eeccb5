"""Nothing is left out in silence: what any verb passes over is counted, named, and in its exit code."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from common import Outcome, save_image, smooth
from leanvit.errors import PartialError
from leanvit.passed_over import gathering, left_out, note_once

Run = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of six images."""
    for kind, name in enumerate(("cat", "dog")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(6):
            save_image(tmp_path / "photos" / name / f"{number}.png", smooth(20, 20, seed=10 * kind + number))
    return tmp_path / "photos"


def test_each_name_counts_once_and_the_first_ones_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    with gathering() as gathered:
        left_out(["a", "b", "c", "d"], "images")
        left_out(["b", "a"], "images")
        left_out(["e"], "images", said=True)
    assert capsys.readouterr().err == "left out: 4 images: a, b, c and 1 more\n"
    with pytest.raises(PartialError, match=r"^partly done: 5 were left out \(see above\): a, b, c and 2 more\.$"):
        gathered.require_none()


def test_a_command_inside_another_has_its_own_count_and_without_one_it_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with gathering() as outer:
        with gathering() as inner:
            left_out(["a"], "images")
            note_once("a line")
            note_once("a line")
        outer.require_none()
        with pytest.raises(PartialError, match=r"1 was left out"):
            inner.require_none()
    left_out(["b"], "images")
    assert capsys.readouterr().err == "left out: 1 images: a\na line\nleft out: 1 images: b\n"


def heic(path: Path) -> Path:
    path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(200))
    return path


def test_pictures_of_other_formats_end_a_training_with_6_and_are_named(
    folder: Path, tmp_path: Path, leanvit: Run
) -> None:
    left = [heic(folder / "cat" / "IMG_1.HEIC"), folder / "dog" / "still.gif"]
    Image.fromarray(smooth(20, 20, seed=5)).save(left[1])
    (folder / "dog" / "notes.txt").write_text("no picture")
    arguments = ["train", "--data", folder, "--output", tmp_path / "run", "--model", "vit_micro", "--epochs", 1]
    done = leanvit(*arguments, "--warmup-epochs", 0, "--device", "cpu", "--amp", "none", "--batch-size", 8)
    assert done.code == 6
    assert "2 were left out" in done.error
    assert all(str(path) in done.err for path in left)
    assert "notes.txt" not in done.err
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_predict_counts_what_it_finds_in_a_folder_and_can_not_read(
    folder: Path, shared_bundle: Path, leanvit: Run
) -> None:
    heic(folder / "cat" / "IMG_1.HEIC")
    (folder / "cat" / "gone.png").symlink_to("nothing")
    done = leanvit("predict", shared_bundle, folder)
    assert done.code == 6
    assert "2 of 14 images could not be read" in done.error
    assert "IMG_1.HEIC: not an image that can be read (HEIC)" in done.err


def test_data_inspect_names_what_stands_beside_the_classes(folder: Path, tmp_path: Path, leanvit: Run) -> None:
    shutil.copy(folder / "cat" / "0.png", folder / "stray.png")
    (folder / "bird").symlink_to(tmp_path / "gone")
    done = leanvit("data", "inspect", folder, "--output", tmp_path / "out")
    assert done.code == 6
    assert "2 were left out" in done.error
    assert str(folder / "stray.png") in done.err
    assert str(folder / "bird") in done.err


def test_companions_of_a_mac_and_windows_are_no_images_of_the_users(
    folder: Path, tmp_path: Path, shared_bundle: Path, leanvit: Run
) -> None:
    for path in list(folder.rglob("*.png")):
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(100))
    for name in (".DS_Store", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini"):
        (folder / name).write_bytes(b"\0\0\0\1Bud1" + bytes(100))
    shutil.copytree(folder / "cat", folder / "__MACOSX" / "photos")
    shutil.copytree(folder / "cat", folder / "cat" / "@eaDir")
    shutil.copytree(folder / "cat", folder / "dog" / ".thumbnails")
    done = leanvit("data", "inspect", folder, "--output", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    assert '"images": 10' in done.out
    assert "hidden images passed over" in done.err
    done = leanvit("predict", shared_bundle, folder)
    assert done.code == 0
    assert len(done.out.splitlines()) == 12
