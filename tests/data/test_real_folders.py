"""Data sets as people have them: linked folders, tables from Windows, shards whose members have dots in their names."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from common import save_image, smooth
from leanvit.data.sets import load_split
from leanvit.data.sets.shards import find_shards, read_index
from leanvit.errors import DataError


def encoded(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(smooth(8, 8, seed=seed)).save(file, "PNG")
    return file.getvalue()


def shard(path: Path, names: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            content = str(number % 2).encode() if name.endswith("cls") else encoded(number)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for kind, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for number in range(2):
            save_image(root / name / f"{number}.png", smooth(8, 8, seed=10 * kind + number))
    return root


def test_images_of_linked_folders_belong_to_the_class(photos: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        shutil.copytree(photos / name, tmp_path / "store" / name)
        (photos / name / "batch1").symlink_to(tmp_path / "store" / name)
    (photos / "cat" / "loop").symlink_to(photos / "cat")
    found = [load_split(str(photos), split, val_fraction=0.5) for split in ("train", "val")]
    assert sum(map(len, found)) == 8


def test_folders_of_systems_are_no_classes(photos: Path) -> None:
    for name in ("__MACOSX", "@eaDir", ".git"):
        shutil.copytree(photos / "cat", photos / name)
    assert load_split(str(photos), "train").classes == ("cat", "dog")


def test_a_folder_beside_the_parts_is_said_not_to_be_used(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = photos.parent / "parts"
    for split in ("train", "val", "extra"):
        shutil.copytree(photos, root / split)
    assert len(load_split(str(root), "train")) == 4
    assert "used are train, val; not used: extra" in capsys.readouterr().err


def test_a_table_of_windows_has_its_images(photos: Path) -> None:
    table = photos.parent / "table.csv"
    rows = [f'photos\\{name}\\{number}.png;"{name}, big"' for name in ("cat", "dog") for number in (0, 1)]
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(["path;label", *rows]).encode())
    found = load_split(str(table), "train", val_fraction=0.5)
    assert (len(found), found.classes) == (2, ("cat, big", "dog, big"))
    assert all(Path(str(source)).is_file() for source in found.sources)


def test_members_with_dots_are_samples_where_they_have_a_class(tmp_path: Path) -> None:
    names = ["shot.01.png", "shot.01.cls", "shot.02.png", "shot.02.cls", "b.png", "b.cls", "b.seg.png", "c.x.json"]
    found = read_index(shard(tmp_path / "a.tar", names))
    assert [str(sample.image.name) for sample in found] == ["shot.01.png", "shot.02.png", "b.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["shot.01.png", "shot.01.cls", "shot.02.png"], "shot.02.png: an image without a class"),
        (["shot.01.png", "shot.02.png"], "WebDataset's keys end at the first dot"),
        (["a.png", "a.cls", "a.png", "a.cls"], "a.png: this name was there before"),
    ],
)
def test_an_image_that_would_vanish_is_an_error(names: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_index(shard(tmp_path / "a.tar", names))


def test_shards_in_a_folder_with_brackets_are_found(tmp_path: Path) -> None:
    path = shard(tmp_path / "shards [v1] {a}" / "train-0.tar", ["a.png", "a.cls"])
    assert find_shards(str(path)) == [path]
    path = shard(tmp_path / "shards [v1]" / "train-0.tar", ["a.png", "a.cls"])
    assert find_shards(str(path.with_name("train-*.tar"))) == [path]
