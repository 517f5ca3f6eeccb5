"""Image files of folders, patterns and lists: what pathlib finds, in order, and never a whole folder in memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leanvit import image_paths
from leanvit.errors import ConfigError, DataError, ImageError
from leanvit.image_paths import find_images
from leanvit.imaging import SUFFIXES, decode


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("b/2.JPG", "b/10.png", "a/x.webp", "a/notes.txt", "a/deep/y.TIFF", "z.bmp", "odd[1].png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def names(root: Path, *sources: str | Path) -> list[str]:
    return [str(path.relative_to(root)) for path in find_images(sources)]


def test_a_folder_gives_the_images_below_it_in_a_fixed_order(tree: Path) -> None:
    assert names(tree, tree) == ["a/deep/y.TIFF", "a/x.webp", "b/10.png", "b/2.JPG", "odd[1].png", "z.bmp"]


def test_files_patterns_and_folders_come_in_the_order_given(tree: Path) -> None:
    assert names(tree, tree / "z.bmp", tree / "b") == ["z.bmp", "b/10.png", "b/2.JPG"]
    assert names(tree, f"{tree}/*/*.png", f"{tree}/**/*.webp") == ["b/10.png", "a/x.webp"]
    assert names(tree, f"{tree}/b/[0-9].JPG") == ["b/2.JPG"]


def test_a_relative_pattern_starts_in_the_current_folder(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert [str(path) for path in find_images(["b/*.png"])] == ["b/10.png"]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tree: Path) -> None:
    assert names(tree, tree / "odd[1].png") == ["odd[1].png"]


def test_patterns_find_what_pathlib_finds_in_the_order_of_sorted_paths(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tree)
    (tree / "a.png").mkdir()
    (tree / "a.png" / "x.webp").write_bytes(b"")
    (tree / "link").symlink_to("a")
    patterns = ("*", "**/*", "**/*.webp", "*/*/*", "a/**/y.*", "**/a*/**/*", "**/**/*.png", "link/*", "*/deep/*")
    for held in (1, 2, 1000):
        monkeypatch.setattr(image_paths, "NAMES_HELD", held)
        for pattern in patterns:
            expected = sorted(path for path in Path().glob(pattern) if path.is_file())
            assert list(find_images([pattern])) == expected, pattern
        everything = sorted(p for p in Path().rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        assert list(find_images(["."])) == everything


def test_a_list_gives_its_lines(tree: Path) -> None:
    names = ["z.bmp", " a name.png ", "gone.png", "caf\udce9.png"]
    (tree / "list").write_bytes("\n\n".join(names).encode("utf-8", "surrogateescape") + b"\r\n")
    assert list(find_images([f"@{tree}/list"])) == [Path(name) for name in names]
    (tree / "list").write_bytes(b"\n")
    with pytest.raises(DataError, match="list: an empty list, expected the path of an image in each line"):
        list(find_images([f"@{tree}/list"]))
    with pytest.raises(DataError, match="@gone: no such file"):
        find_images(["@gone"])


def test_the_mark_of_a_windows_editor_is_no_part_of_the_first_name(tree: Path) -> None:
    (tree / "list").write_bytes(b"\xef\xbb\xbfz.bmp\r\nb/2.JPG\r\n")
    assert list(find_images([f"@{tree}/list"])) == [Path("z.bmp"), Path("b/2.JPG")]


def test_hidden_files_of_a_folder_are_left_out_and_a_hidden_file_that_is_named_is_not(tree: Path) -> None:
    (tree / "b" / "._2.JPG").write_bytes(b"")
    assert names(tree, tree / "b") == ["b/10.png", "b/2.JPG"]
    assert names(tree, tree / "b" / "._2.JPG") == ["b/._2.JPG"]


HOLDING_NAMES = """
import sys, tracemalloc
from leanvit import image_paths
image_paths.NAMES_HELD = 100
tracemalloc.start()
names = sum(1 for _ in image_paths.find_images([sys.argv[1]]))
peak = tracemalloc.get_traced_memory()[1]
tracemalloc.reset_peak()
listed = len(list(image_paths.find_images([sys.argv[1]])))
print(names, listed, peak, tracemalloc.get_traced_memory()[1])
"""


def test_a_folder_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """In a process of its own, because tracemalloc counts what any thread of this one allocates, and a measurement of
    coverage, which an environment variable carries into the processes of tests, allocates much."""
    count = 4000
    for number in range(count):
        (tmp_path / f"{number:05}.png").touch()
    command = [sys.executable, "-c", HOLDING_NAMES, str(tmp_path)]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    names, listed, peak, peak_of_list = map(int, done.stdout.split())
    assert names == listed == count
    assert peak < peak_of_list / 10


def test_what_is_missing_is_said_before_the_first_image_is_given(tree: Path) -> None:
    with pytest.raises(DataError, match=r"missing.png: no such file"):
        find_images([tree / "b", tree / "missing.png"])


def test_a_folder_that_can_not_be_read_is_given_for_decode_to_tell(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def scandir(path: Path) -> Any:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert names(tree, tree / "a") == ["a/deep", "a/x.webp"]
    with pytest.raises(ImageError, match=r"a/deep: .*, expected an image file"):
        decode(tree / "a" / "deep")


def test_a_path_that_leads_nowhere_is_named(tree: Path) -> None:
    with pytest.raises(DataError, match=r"missing.png: no such file or folder"):
        list(find_images([tree / "missing.png"]))
    with pytest.raises(DataError, match=r"\*.gif: no images found, expected files ending in .bmp, .jpeg"):
        list(find_images([f"{tree}/*.gif"]))
    (tree / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no images found"):
        list(find_images([tree / "empty"]))
    with pytest.raises(ConfigError, match="not a glob pattern"):
        list(find_images([f"{tree}/a**.png"]))


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_linked_folders_are_followed_once_and_never_in_a_circle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, store = tmp_path / "photos", tmp_path / "store"
    touch(root / "0.png", root / "own" / "1.png", store / "s.png", store / "deep" / "t.png")
    links = {"b": store, "c": store, "d": store / "deep", "loop": root, "own2": root / "own", "up": tmp_path}
    for name, target in links.items():
        (root / name).symlink_to(target)
    (store / "back").symlink_to(root)
    assert names(root, root) == ["0.png", "b/deep/t.png", "b/s.png", "own/1.png"]
    err = capsys.readouterr().err
    assert "6 links to folders that are read already, not followed" in err
    assert str(root / "b" / "back") in err


def test_a_link_to_nothing_is_given_for_decode_to_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "0.png")
    (tmp_path / "gone.jpg").symlink_to("nothing")
    (tmp_path / "batch2").symlink_to("not mounted")
    assert names(tmp_path, tmp_path) == ["0.png", "gone.jpg"]
    assert f"links that lead to nothing: {tmp_path / 'batch2'}" in capsys.readouterr().err


def test_pipes_are_not_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(tmp_path / "0.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(tmp_path, tmp_path) == ["0.png"]
    assert "pipe.png" in capsys.readouterr().err


def test_files_without_an_ending_are_told_by_their_first_bytes(tmp_path: Path) -> None:
    png = b"\x89PNG\r\n\x1a\n"
    contents = {
        "a": png,
        "b": b"text",
        "c": b"GIF89a",
        "d.jpg_original": b"\xff\xd8\xff\xe0",
        "e.txt": png,
        "f.heic": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = list(find_images([tmp_path]))
    assert [path.name for path in found] == ["a", "c", "d.jpg_original", "f.heic"]
    assert [image_paths.is_foreign(path) for path in found] == [False, True, True, True]


def test_lists_of_windows_hold_backslashes_and_may_be_utf_16(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    (tree / "x\\y.png").write_bytes(b"")
    lines = ["b\\2.JPG", "a\\deep\\y.TIFF", "gone\\z.png", "x\\y.png"]
    (tree / "list").write_bytes("\r\n".join(lines).encode("utf-16"))
    expected = [Path("b/2.JPG"), Path("a/deep/y.TIFF"), Path("gone\\z.png"), Path("x\\y.png")]
    assert list(find_images(["@list"])) == expected


def test_a_folder_with_brackets_stands_for_itself_in_a_pattern(tmp_path: Path) -> None:
    touch(tmp_path / "trip [2024]" / "a.png", tmp_path / "trip 2" / "b.png")
    assert names(tmp_path, f"{tmp_path}/trip [2024]/*.png") == ["trip [2024]/a.png"]
    assert names(tmp_path, f"{tmp_path}/trip [0-9]/*.png") == ["trip 2/b.png"]
