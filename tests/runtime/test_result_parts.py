"""Results in parts: the rows of the command that writes one file, whole or absent, from every kind of source."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from pyarrow.dataset import dataset

from common import Outcome, save_image, smooth
from hand_bundles import hand_bundle
from leanvit.errors import DataError
from leanvit.runtime.sources import images_of, pieces_of

Run = Callable[..., Outcome]
PICTURES = 11


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eleven pictures in two folders, one of which is damaged."""
    for number in range(PICTURES):
        folder = tmp_path / "photos" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        save_image(folder / f"{number:02d}.png", smooth(20 + number, 30, seed=number))
    (tmp_path / "photos" / "a" / "04.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def rows_in(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for part in sorted(folder.glob("part-*.jsonl")) for line in part.read_text().splitlines()]


def found_in(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [row for row in rows if "error" not in row]


def test_rows_are_those_of_one_file_and_damaged_images_have_the_reason(
    shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Run
) -> None:
    alone = leanvit("predict", shared_bundle, photos, "--format", "jsonl", "--output", tmp_path / "one.jsonl")
    parts = leanvit("predict", shared_bundle, photos, "--output", f"{tmp_path}/parts/", "--part-images", 4)
    assert (alone.code, parts.code) == (6, 6)
    rows = rows_in(tmp_path / "parts")
    assert len(rows) == PICTURES
    assert found_in(rows) == [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    (damaged,) = [row for row in rows if "error" in row]
    assert damaged["path"] == str(photos / "a" / "04.png")
    assert "expected JPEG, PNG" in str(damaged["error"])
    assert damaged["path"] in parts.err
    manifest = json.loads((tmp_path / "parts" / "manifest.json").read_text())
    assert (manifest["images"], manifest["skipped"]) == (PICTURES, 1)
    assert [part["images"] for part in manifest["parts"]] == [4, 4, 3]


def test_a_run_goes_on_with_the_parts_that_are_not_there(
    shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Run
) -> None:
    command = ["predict", shared_bundle, photos, "--output", f"{tmp_path}/parts"]
    (tmp_path / "parts").mkdir()
    assert leanvit(*command, "--part-images", 4).code == 6
    whole = {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()}
    part = sorted((tmp_path / "parts").glob("part-*"))[1]
    part.unlink()
    (tmp_path / "parts" / "manifest.json").unlink()
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "parts").glob("part-*")}

    refused = leanvit(*command, "--part-images", 4)
    assert refused.code == 2
    assert "--resume" in refused.err
    other = leanvit(*command, "--part-images", 5, "--resume")
    assert other.code == 2
    assert "part_images was 4, is 5" in other.err

    assert leanvit(*command, "--part-images", 4, "--resume").code == 6
    assert {path.name: path.read_bytes() for path in (tmp_path / "parts").iterdir()} == whole
    assert {name: (tmp_path / "parts" / name).stat().st_mtime_ns for name in kept} == kept
    again = leanvit(*command, "--part-images", 4, "--resume")
    assert again.code == 6
    assert "nothing to go on with" in again.err
    assert "1 of 11 images could not be read" in again.err


def test_other_images_are_not_gone_on_with(shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Run) -> None:
    command = ["predict", shared_bundle, photos, "--output", f"{tmp_path}/parts/", "--part-images", 4]
    assert leanvit(*command).code == 6
    (tmp_path / "parts" / "manifest.json").unlink()
    save_image(photos / "a" / "01.png", smooth(20, 20, seed=3))
    done = leanvit(*command, "--resume")
    assert done.code == 2
    assert "added, removed or renamed" in done.err
    assert "Choose another --output" in done.err


@pytest.mark.parametrize("task", ["detect", "segment", "semantic", "pose"])
def test_every_task_has_rows(task: str, photos: Path, tmp_path: Path, leanvit: Run) -> None:
    image = (photos / "b" / "01.png").read_bytes()
    hand_bundle(tmp_path / "bundle", task, [image])
    assert leanvit("predict", tmp_path / "bundle", photos, "--output", tmp_path / "one.jsonl").code == 6
    assert leanvit("predict", tmp_path / "bundle", photos, "--output", f"{tmp_path}/parts/").code == 6
    one = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert found_in(rows_in(tmp_path / "parts")) == one
    assert len(one) == PICTURES - 1


def test_parquet_parts_hold_the_same(shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Run) -> None:
    command = ["predict", shared_bundle, photos, "--part-images", 4, "--output"]
    assert leanvit(*command, f"{tmp_path}/lines/").code == 6
    assert leanvit(*command, f"{tmp_path}/tables/", "--format", "parquet").code == 6
    table = dataset(sorted(map(str, (tmp_path / "tables").glob("part-*.parquet")))).to_table().to_pylist()
    rows = rows_in(tmp_path / "lines")
    assert [row["path"] for row in table] == [row["path"] for row in rows]
    assert [row["error"] for row in table] == [row.get("error") for row in rows]
    told = [None if row["predictions"] is None else json.loads(row["predictions"]) for row in table]
    assert told == [row.get("predictions") for row in rows]


@pytest.fixture
def shards(photos: Path, tmp_path: Path) -> Iterator[dict[str, list[str]]]:
    """The same pictures as a folder, by URL, as Parquet files and as shards of WebDataset."""
    files = sorted(photos.rglob("*.png"))
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for path in files:
            tar.add(path, arcname=f"{path.parent.name}/{path.name}")
            label = tarfile.TarInfo(f"{path.parent.name}/{path.stem}.cls")
            label.size = 1
            tar.addfile(label, io.BytesIO(b"3"))
    columns = {"path": [str(path) for path in files], "image": [{"bytes": path.read_bytes()} for path in files]}
    parquet.write_table(arrow.table(columns), tmp_path / "images.parquet", row_group_size=4)
    memory = fsspec.filesystem("memory")
    for path in files:
        memory.pipe_file(f"/bucket/{path.parent.name}/{path.name}", path.read_bytes())
    memory.pipe_file("/bucket/notes.txt", b"none of them")
    (tmp_path / "list.txt").write_text("".join(f"memory://bucket/{p.parent.name}/{p.name}\n" for p in files))
    yield {
        "shard": [str(tmp_path / "shard-*.tar")],
        "parquet": [str(tmp_path / "images.parquet")],
        "url": ["memory://bucket"],
        "list of urls": [f"@{tmp_path}/list.txt"],
    }
    memory.rm("/bucket", recursive=True)


@pytest.mark.parametrize("kind", ["shard", "parquet", "url", "list of urls"])
def test_every_source_gives_the_same_rows(
    kind: str, shards: dict[str, list[str]], shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Run
) -> None:
    assert leanvit("predict", shared_bundle, photos, "--output", f"{tmp_path}/folder/").code == 6
    assert leanvit("predict", shared_bundle, *shards[kind], "--output", f"{tmp_path}/parts/").code == 6
    expected, found = rows_in(tmp_path / "folder"), rows_in(tmp_path / "parts")
    assert [Path(str(row["path"])).name for row in found] == [Path(str(row["path"])).name for row in expected]
    assert [row.get("predictions") for row in found] == [row.get("predictions") for row in expected]
    assert sum("error" in row for row in found) == 1
    refused = leanvit("predict", shared_bundle, *shards[kind], "--output", tmp_path / "one.jsonl")
    assert refused.code == 2
    assert "Give --output FOLDER/" in refused.err


def test_results_go_to_a_url(shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Run) -> None:
    memory = fsspec.filesystem("memory")
    command = ["predict", shared_bundle, photos, "--part-images", 4, "--output"]
    assert leanvit(*command, "memory://results/run").code == 6
    assert leanvit(*command, f"{tmp_path}/parts/").code == 6
    for path in (tmp_path / "parts").glob("part-*"):
        assert memory.cat_file(f"/results/run/{path.name}") == path.read_bytes()
    assert json.loads(memory.cat_file("/results/run/manifest.json"))["images"] == PICTURES
    memory.rm("/results", recursive=True)


def test_a_shard_that_is_damaged_fails_by_name_and_the_others_are_kept(
    shards: dict[str, list[str]], shared_bundle: Path, tmp_path: Path, leanvit: Run
) -> None:
    good = tmp_path / "shard-000.tar"
    shutil.copy(good, tmp_path / "shard-002.tar")
    (tmp_path / "shard-001.tar").write_bytes(good.read_bytes()[:1300])
    command = ["predict", shared_bundle, *shards["shard"], "--output", f"{tmp_path}/parts/"]
    done = leanvit(*command)
    assert done.code == 6
    assert "shard-001.tar: damaged shard" in done.err
    assert len(list((tmp_path / "parts").glob("part-*"))) == 2
    assert not (tmp_path / "parts" / "manifest.json").exists()
    shutil.copy(good, tmp_path / "shard-001.tar")
    leanvit(*command, "--resume")
    assert len(rows_in(tmp_path / "parts")) == 3 * PICTURES


def test_pieces_have_the_same_digits_for_the_same_images_alone(photos: Path) -> None:
    first, second = (list(pieces_of([str(photos)], 4)) for _ in range(2))
    assert [piece.digest for piece in first] == [piece.digest for piece in second]
    assert len({piece.digest for piece in first}) == len(first) == 3
    assert [str(image) for piece in first for image in images_of(piece)] == [
        str(image) for image in images_of(next(iter(pieces_of([str(photos)], 100))))
    ]


@pytest.mark.parametrize(
    ("output", "options", "advice"),
    [
        ("parts/", ["--draw", "drawn"], "Leave --draw out"),
        ("parts/", ["--format", "csv"], "expected jsonl or parquet"),
        ("parts/", ["--resume"], "Leave --resume out"),
        (None, ["--format", "parquet"], "Give --output FOLDER/"),
    ],
)
def test_options_that_do_not_fit_a_folder_are_refused(
    output: str | None, options: list[str], advice: str, shared_bundle: Path, photos: Path, tmp_path: Path, leanvit: Run
) -> None:
    where = ["--output", f"{tmp_path}/{output}"] if output else []
    done = leanvit("predict", shared_bundle, photos, *where, *options)
    assert done.code == 2
    assert advice in done.err


def test_a_file_without_images_is_named(tmp_path: Path) -> None:
    parquet.write_table(arrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"columns text, expected encoded images"):
        list(images_of(next(iter(pieces_of([str(tmp_path / "a.parquet")], 4)))))
    with pytest.raises(DataError, match="no such file"):
        list(pieces_of([str(tmp_path / "none.parquet")], 4))
    with pytest.raises(DataError, match="no images found"):
        list(pieces_of(["memory://nothing-there"], 4))
