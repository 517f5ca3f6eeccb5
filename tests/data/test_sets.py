"""Specifications of data: official parts, labels and pixels of every kind are those that were written, and errors help.

Truth is what the tests write themselves, and what torchvision, datasets and webdataset read from the same files.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from common import save_image, smooth
from leanvit import imaging
from leanvit.config import Preprocess
from leanvit.data.loader import Loader
from leanvit.data.sets import ImageSet, find_parts, load_split
from leanvit.data.sets.hub import HubImage, hub_parts
from leanvit.errors import DataError, ImageError, MissingDependencyError


def encoded(seed: int, format: str = "PNG", size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth(*size, seed=seed)).save(buffer, format)
    return buffer.getvalue()


def write(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(seed, "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"))
    return path


def pixels(images: ImageSet, index: int) -> np.ndarray:
    return images.decoded(index).pixels


def pairs(images: ImageSet, root: Path) -> list[tuple[str, str]]:
    """(path below root, class) of every image."""
    return [(str(Path(str(s)).relative_to(root)), images.classes[i]) for s, i in zip(images.sources, images.labels)]  # noqa: B905


# --- CSV -----------------------------------------------------------------------------------------------------

ROWS = [("a/1.png", "cat", "train"), ("a/2.png", "dog", "train"), ("b/3.png", "cat", "val"), ("b/4.png", "dog", "test"),
        ("b/5.png", "dog", "validation"), ("a,6.png", "cat", "training")]  # fmt: skip


def table(folder: Path, text: str, name: str = "list.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def lines(rows: list[tuple[str, ...]], delimiter: str = ",", end: str = "\n") -> str:
    return "".join(delimiter.join(f'"{field}"' if delimiter in field else field for field in row) + end for row in rows)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A folder with the images of ROWS."""
    for seed, (name, *_) in enumerate(ROWS):
        write(tmp_path / name, seed)
    return tmp_path


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_table_gives_its_rows_in_their_parts(delimiter: str, encoding: str, end: str, listed: Path) -> None:
    header = ("Path", " label ", "SPLIT")
    path = table(listed, lines([header, *ROWS], delimiter, end) + end, encoding=encoding)
    train, val, test = (load_split(str(path), part) for part in ("train", "val", "test"))
    assert pairs(train, listed) == [("a/1.png", "cat"), ("a/2.png", "dog"), ("a,6.png", "cat")]
    assert pairs(val, listed) == [("b/3.png", "cat"), ("b/5.png", "dog")]
    assert pairs(test, listed) == [("b/4.png", "dog")]
    assert train.classes == val.classes == test.classes == ("cat", "dog")
    np.testing.assert_array_equal(pixels(val, 1), smooth(12, 10, seed=4))


def test_a_table_may_have_another_ending_other_columns_and_paths_from_the_root(listed: Path) -> None:
    rows = [("id", "label", "path"), ("1", "x", str(listed / "a/1.png")), ("2", "y", "a/2.png"),
            ("3", "x", "b/3.png"), ("4", "y", "b/4.png")]  # fmt: skip
    path = table(listed, lines(rows), "list.txt")
    train, val = (load_split(f"csv:{path}", part, val_fraction=0.5) for part in ("train", "val"))
    assert sorted(pairs(train, listed) + pairs(val, listed)) == [
        ("a/1.png", "x"), ("a/2.png", "y"), ("b/3.png", "x"), ("b/4.png", "y"),
    ]  # fmt: skip
    assert sorted(train.labels) == sorted(val.labels) == [0, 1]


def test_numbers_as_classes_are_sorted_by_value(listed: Path) -> None:
    path = table(listed, lines([("path", "label"), *((row[0], str(n)) for row, n in zip(ROWS, (10, 9, 2, 10, 9, 2)))]))  # noqa: B905
    assert load_split(str(path), "train").classes == ("2", "9", "10")


def test_test_rows_validate_where_no_row_does(listed: Path) -> None:
    rows = [(name, label, "test" if number > 2 else "train") for number, (name, label, _) in enumerate(ROWS)]
    path = table(listed, lines([("path", "label", "split"), *rows]))
    val, test = load_split(str(path), "val"), load_split(str(path), "test")
    assert pairs(val, listed) == pairs(test, listed) == [row[:2] for row in rows[3:]]


H = "path,label,split\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,class\na/1.png,cat\n", "no column 'label' among path, class, expected path, label and optionally split"),
        ("file,label\na/1.png,cat\n", "no column 'path' among file, label"),
        ("", "no column 'path' among none"),
        (H, "no rows, expected an image a line"),
        (H + "a/1.png,cat,train\na/2.png,dog,trian\n", "line 3: split is 'trian', expected train, val or test"),
        (H + "a/1.png,cat,train\na/2.png,dog,\n", "line 3: 'split' is empty"),
        (H + "a/1.png,cat,train\n\na/2.png, ,train\n", "line 4: 'label' is empty, expected a value in every row"),
        (H + ",cat,train\n", "line 2: 'path' is empty"),
        (H + "a/1.png,cat\n", "line 2: 2 fields, expected 3 (path, label, split)"),
        (H + "a,6.png,cat,train\n", "line 2: 4 fields, expected 3"),
        (H + 'a/1.png,"cat,train\n', "not a CSV table in UTF-8"),
        (H + "a/1.png,cat,train\nb/3.png,dog,val\n", "classes dog have no row with split 'train'"),
        (H + "a/1.png,cat,train\n", "1 classes in column 'label', expected at least two"),
        (
            H + "".join(f"no{n}.png,cat,train\n" for n in range(5)) + "a/1.png,cat,train\n",
            "5 of 6 images are missing: {0}/no0.png, {0}/no1.png, {0}/no2.png and 2 more. Paths are relative",
        ),
        (H + "a,dog,train\n", "1 of 1 images are missing: {0}/a."),
    ],
)
def test_a_wrong_table_is_one_error_that_says_where(text: str, message: str, listed: Path) -> None:
    path = table(listed, text)
    with pytest.raises(DataError) as caught:
        load_split(str(path), "train")
    assert message.format(listed) in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_table_in_another_encoding_or_absent_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"list\.csv: not a CSV table in UTF-8 .* Save it again"):
        load_split(str(table(tmp_path, "path,label\nä.png,cat\n", encoding="latin-1")), "train")
    with pytest.raises(DataError, match=r"gone\.csv: No such file or directory, expected a CSV table"):
        load_split(f"csv:{tmp_path}/gone.csv", "train")


# --- parts ---------------------------------------------------------------------------------------------------


def test_a_folder_named_like_a_table_is_a_folder(image_folder: Callable[..., Path]) -> None:
    assert load_split(str(image_folder("set.csv", a=2, b=2)), "train").classes == ("a", "b")


def test_the_test_folder_is_a_part_of_its_own(image_folder: Callable[..., Path]) -> None:
    root = image_folder("set/train", a=3, b=2).parent
    image_folder("set/val", a=1, b=2)
    image_folder("set/test", a=4, b=1)
    assert [len(load_split(str(root), part)) for part in ("train", "val", "test")] == [5, 3, 5]
    image_folder("set/test", c=1)
    assert len(load_split(str(root), "val")) == 3
    with pytest.raises(DataError, match="classes c are not in both train/ and test/"):
        load_split(str(root), "test")


def test_without_a_test_part_there_is_none(image_folder: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match=r"'digits': no part 'test', it has train\. Choose another --split"):
        load_split("digits", "test")
    root = image_folder("set/train", a=2, b=2).parent
    image_folder("set/val", a=1, b=1)
    with pytest.raises(DataError, match="no part 'test', it has train, val"):
        load_split(str(root), "test")


@pytest.mark.parametrize(
    "kind", ["csv", "cifar10", "cifar100", "flowers102", "oxford-iiit-pet", "imagenet", "hf", "wds"]
)
def test_a_kind_without_its_argument_says_what_belongs_there(kind: str) -> None:
    with pytest.raises(DataError, match=rf"data '{kind}:': nothing after the colon, expected {kind}:[A-Z]+"):
        find_parts(f"{kind}:")


def test_an_unknown_kind_is_answered_with_the_nearest() -> None:
    with pytest.raises(DataError, match="Did you mean 'cifar10'"):
        load_split("cifr10:/data", "train")


# --- torchvision's sets --------------------------------------------------------------------------------------


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def cifar_batch(path: Path, labels: list[int], key: str, seed: int) -> np.ndarray:
    """A file as https://www.cs.toronto.edu/~kriz/cifar.html describes it; returns the images (N, 32, 32, 3)."""
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), 32, 32, 3), dtype=np.uint8)
    rows = images.transpose(0, 3, 1, 2).reshape(len(labels), 3072)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"data": rows, key: labels}))
    return images


@pytest.mark.parametrize(("kind", "folder", "key"), [("CIFAR10", "cifar-10-batches-py", "labels"),
                                                     ("CIFAR100", "cifar-100-python", "fine_labels")])  # fmt: skip
def test_cifar_is_read_in_its_official_parts(
    kind: str, folder: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    cls = getattr(datasets, kind)
    images, sums = [], {}
    for name, _ in (*cls.train_list, *cls.test_list):
        images.append(cifar_batch(tmp_path / folder / name, [len(images), 1, 0], key, seed=len(images)))
        sums[name] = md5(tmp_path / folder / name)
    meta = tmp_path / folder / cls.meta["filename"]
    names = [f"class {i}" for i in range(10)]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: names}))
    for listing in ("train_list", "test_list"):
        monkeypatch.setattr(cls, listing, [[name, sums[name]] for name, _ in getattr(cls, listing)])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})
    train, val, test = (load_split(f"{kind.lower()}:{tmp_path}", part) for part in ("train", "val", "test"))
    np.testing.assert_array_equal(np.stack([pixels(train, i) for i in range(len(train))]), np.concatenate(images[:-1]))
    np.testing.assert_array_equal(np.stack([pixels(val, i) for i in range(3)]), images[-1])
    assert train.labels.tolist() == [label for n in range(len(images) - 1) for label in (n, 1, 0)]
    assert val.labels.tolist() == test.labels.tolist() == [len(images) - 1, 1, 0]
    assert train.classes == tuple(names)


def test_a_pickle_that_is_not_the_official_one_is_never_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    class Boom:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "cifar-10-batches-py").mkdir()
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], ""]):
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Boom()))
    with pytest.raises(DataError, match=r"CIFAR10 is absent or not whole .*found or corrupted"):
        load_split(f"cifar10:{tmp_path}", "train")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root with nine flowers: images 1 to 9 have classes 3, 1, 2, 3, 1, 2, ... in MATLAB's counting."""
    from scipy.io import savemat
    from torchvision.datasets import Flowers102

    folder = tmp_path / "flowers-102"
    for number in range(1, 10):
        write(folder / "jpg" / f"image_{number:05}.jpg", number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[3, 1, 2] * 3])})
    savemat(folder / "setid.mat", {"trnid": [[2, 9]], "valid": [[1, 3]], "tstid": [[4, 5, 6, 7, 8]]})
    files = {
        key: (name, md5(folder / name) if key != "image" else old) for key, (name, old) in Flowers102._file_dict.items()
    }
    monkeypatch.setattr(Flowers102, "_file_dict", files)
    return tmp_path


def test_flowers_have_their_three_official_parts(flowers: Path) -> None:
    from torchvision.datasets import Flowers102

    for part, numbers, labels in (
        ("train", [2, 9], [0, 1]),
        ("val", [1, 3], [2, 1]),
        ("test", [4, 5, 6, 7, 8], [2, 0, 1, 2, 0]),
    ):
        found = load_split(f"flowers102:{flowers}", part)
        assert [Path(str(s)).name for s in found.sources] == [f"image_{n:05}.jpg" for n in numbers]
        assert found.labels.tolist() == labels
        assert found.classes == tuple(Flowers102.classes)
        theirs = Flowers102(str(flowers), part)
        for index in range(len(found)):
            image, label = theirs[index]
            np.testing.assert_array_equal(pixels(found, index), np.asarray(image))
            assert label == found.labels[index]


def test_a_flower_that_is_missing_is_named_with_the_command(flowers: Path) -> None:
    (flowers / "flowers-102" / "jpg" / "image_00009.jpg").unlink()
    with pytest.raises(DataError, match=r"1 of 2 images are missing: .*image_00009\.jpg\. .*download=True"):
        load_split(f"flowers102:{flowers}", "train")


def test_pets_have_their_two_official_parts(tmp_path: Path) -> None:
    from torchvision.datasets import OxfordIIITPet

    folder = tmp_path / "oxford-iiit-pet"
    lists = {"trainval": ["Abyssinian_100 1 1 1", "american_bulldog_2 2 2 1", "Abyssinian_9 1 1 1"],
             "test": ["american_bulldog_7 2 2 1", "Abyssinian_3 1 1 1"]}  # fmt: skip
    (folder / "annotations").mkdir(parents=True)
    for part, rows in lists.items():
        (folder / "annotations" / f"{part}.txt").write_text("\n".join(rows) + "\n")
        for seed, row in enumerate(rows):
            write(folder / "images" / f"{row.split()[0]}.jpg", seed)
    train, val, test = (load_split(f"oxford-iiit-pet:{tmp_path}", part) for part in ("train", "val", "test"))
    assert train.classes == val.classes == ("Abyssinian", "American Bulldog")
    assert (train.labels.tolist(), val.labels.tolist(), test.labels.tolist()) == ([0, 1, 0], [1, 0], [1, 0])
    for found, part in ((train, "trainval"), (val, "test")):
        theirs = OxfordIIITPet(str(tmp_path), part)
        for index in range(len(found)):
            np.testing.assert_array_equal(pixels(found, index), np.asarray(theirs[index][0]))
    (folder / "annotations" / "test.txt").unlink()
    with pytest.raises(DataError, match=r"OxfordIIITPet is absent or not whole .*test\.txt"):
        load_split(f"oxford-iiit-pet:{tmp_path}", "val")


@pytest.mark.parametrize(
    ("spec", "cls", "file"),
    [
        ("cifar10", "CIFAR10", "cifar-10-python.tar.gz"),
        ("cifar100", "CIFAR100", "cifar-100-python.tar.gz"),
        ("flowers102", "Flowers102", "102flowers.tgz"),
        ("oxford-iiit-pet", "OxfordIIITPet", "annotations.tar.gz"),
    ],
)
def test_an_absent_set_is_not_fetched_and_the_command_that_does_is_given(
    spec: str, cls: str, file: str, tmp_path: Path, no_network: list[object]
) -> None:
    with pytest.raises(DataError) as caught:
        load_split(f"{spec}:{tmp_path}", "train")
    message = str(caught.value)
    command = message.partition('python -c "')[2].partition('"')[0]
    assert f"torchvision.datasets.{cls}('{tmp_path}', download=True)" in command
    compile(command, "command", "exec")
    assert file in message
    assert "https://" in message
    assert not no_network
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that something tried to reach; every attempt fails."""
    tried: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        tried.append(arguments[-1])
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return tried


def imagenet(root: Path, *, val: bool = True) -> Path:
    for number, part in enumerate(("train", "val") if val else ("train",)):
        for seed, wordnet_id in enumerate(("n01440764", "n01443537")):
            write(root / part / wordnet_id / f"{wordnet_id}_{seed}.JPEG", 10 * number + seed)
    return root


def test_imagenet_folders_are_read_with_wordnet_ids_as_classes(tmp_path: Path) -> None:
    imagenet(tmp_path)
    train, val = (load_split(f"imagenet:{tmp_path}", part) for part in ("train", "val"))
    assert train.classes == val.classes == ("n01440764", "n01443537")
    assert pairs(train, tmp_path) == [(f"train/{w}/{w}_{i}.JPEG", w) for i, w in enumerate(train.classes)]
    assert val.labels.tolist() == [0, 1]


def test_imagenet_that_is_not_laid_out_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"/train: no such folder, .*ILSVRC2012_img_val.tar .*datasets.ImageNet"):
        load_split(f"imagenet:{tmp_path}", "val")
    imagenet(tmp_path, val=False)
    write(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
    with pytest.raises(DataError, match=r"/val: images that are not sorted into class folders.*ImageNet"):
        load_split(f"imagenet:{tmp_path}", "train")
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").unlink()
    for name in ("cat", "n01440764"):
        write(tmp_path / "val" / name / "0.JPEG", 0)
    with pytest.raises(DataError, match="class folder 'cat', expected WordNet ids such as n01440764"):
        load_split(f"imagenet:{tmp_path}", "train")
    (tmp_path / "val" / "cat").rename(tmp_path / "val" / "n00000001")
    with pytest.raises(DataError, match="classes n00000001, n01443537 are not in both"):
        load_split(f"imagenet:{tmp_path}", "train")


# --- WebDataset ----------------------------------------------------------------------------------------------


def shard(path: Path, members: list[tuple[str, bytes]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(labels: list[int], first: int = 0) -> list[tuple[str, bytes]]:
    return [
        member
        for number, label in enumerate(labels, first)
        for member in (
            (f"{number:06}.cls", str(label).encode()),
            (f"{number:06}.json", b"{}"),
            (f"{number:06}.png", encoded(number)),
        )
    ]


def test_shards_give_what_the_library_webdataset_gives(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    rng = np.random.default_rng(3)
    paths = []
    for number in range(3):
        path = tmp_path / f"set-{number:04}.tar"
        paths.append(str(path))
        with wds.TarWriter(str(path)) as writer:
            for index in range(5):
                suffix = ["jpg", "png", "webp", "JPEG"][index % 4]
                data = encoded(index, {"jpg": "JPEG", "JPEG": "JPEG"}.get(suffix, suffix.upper()))
                key = f"{'sub.dir/' if index % 2 else ''}{number}-{index}"
                writer.write({"__key__": key, suffix: data, "cls": int(rng.integers(0, 4)), "seg.png": encoded(9)})
    expected = {}
    for sample in wds.WebDataset(paths, shardshuffle=False):
        (data,) = [value for key, value in sample.items() if key in ("jpg", "png", "webp", "jpeg")]
        expected[f"{sample['__url__']}/{sample['__key__']}"] = (data, int(sample["cls"]))
    parts = [load_split(f"wds:{tmp_path}/set-{{0000..0002}}.tar", part, val_fraction=0.3) for part in ("train", "val")]
    found = {
        str(images.sources[i]).rpartition(".")[0]: (images.encoded(i), int(images.labels[i]))
        for images in parts
        for i in range(len(images))
    }
    assert found == expected
    assert len(found) == 15


@pytest.mark.parametrize("pattern", ["{train,val}-{0..1}.tar", "*.tar", "[tv]*-?.tar"])
def test_shards_named_train_and_val_are_those_parts(pattern: str, tmp_path: Path) -> None:
    if "{" in pattern:
        pytest.importorskip("braceexpand")
    for number, part in enumerate(("train", "val")):
        for half in (0, 1):
            shard(tmp_path / f"{part}-{half}.tar", samples([0, 1, 2], first=10 * number + 3 * half))
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    train, val = (load_split(f"wds:{tmp_path}/{pattern}", part) for part in ("train", "val"))
    assert train.classes == val.classes == ("ant", "bee", "cat")
    assert train.labels.tolist() == val.labels.tolist() == [0, 1, 2, 0, 1, 2]
    for images, first in ((train, 0), (val, 10)):
        for index in range(6):
            np.testing.assert_array_equal(pixels(images, index), smooth(12, 10, seed=first + index))


@pytest.mark.parametrize("names", [("train/0.tar", "validation/0.tar", "test/0.tar"),
                                   ("pets-train-0.tar", "pets-valid-0.tar", "pets-test-0.tar")])  # fmt: skip
def test_the_word_may_stand_in_the_folder_or_between_others(names: tuple[str, ...], tmp_path: Path) -> None:
    for number, name in enumerate(names):
        shard(tmp_path / name, samples([0, 1][: 2 - number // 2] * (number + 1)))
    pattern = f"wds:{tmp_path}/*/*.tar" if "/" in names[0] else f"wds:{tmp_path}/*.tar"
    assert [len(load_split(pattern, part)) for part in ("train", "val", "test")] == [2, 4, 3]


def test_shards_of_one_part_alone_are_divided(tmp_path: Path) -> None:
    path = shard(tmp_path / "test" / "train-0.tar", samples([0, 0, 1, 1, 1, 0]))
    train, val = (load_split(f"wds:{path}", part, val_fraction=0.34) for part in ("train", "val"))
    assert (len(train), len(val)) == (4, 2)
    assert not {str(s) for s in train.sources} & {str(s) for s in val.sources}


def test_classes_without_names_are_called_by_their_numbers(tmp_path: Path) -> None:
    shard(tmp_path / "train.tar", samples([0, 3]))
    shard(tmp_path / "val.tar", samples([2]))
    assert load_split(f"wds:{tmp_path}/*.tar", "val").classes == ("0", "1", "2", "3")


def test_a_shard_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", samples([0, 1, 0, 1]))
    assert len(load_split(f"wds:{path}", "train", val_fraction=0.5)) == 2
    shard(path, samples([0, 1] * 4))
    assert len(load_split(f"wds:{path}", "train", val_fraction=0.5)) == 4


GOOD = samples([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*GOOD, ("x.png", encoded(0))], "x: members png, expected one image and one cls"),
        ([*GOOD, ("x.cls", b"0")], "x: members cls, expected one image and one cls"),
        ([*GOOD, ("x.jpg", b""), ("x.png", b""), ("x.cls", b"0")], "x: members jpg, png, cls, expected one image"),
        ([*GOOD, ("x.png", b""), ("x.cls", b"cat")], "x.cls: b'cat', expected the class as a number from 0"),
        ([*GOOD, ("x.png", b""), ("x.cls", b"-1")], "x.cls: b'-1', expected"),
        (samples([0, 0]), "1 classes, expected at least two"),
        ([("readme.txt", b"hello")], "0 classes, expected at least two"),
    ],
)
def test_a_sample_that_is_none_is_named(members: list[tuple[str, bytes]], message: str, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", members)
    with pytest.raises(DataError) as caught:
        load_split(f"wds:{path}", "train")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_too_few_names_of_classes_are_an_error(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", samples([0, 2, 0, 2]))
    (tmp_path / "classes.txt").write_text("ant\nbee\n\n")
    with pytest.raises(DataError, match=r"classes.txt: 2 classes, but a shard has class 2"):
        load_split(f"wds:{path}", "train")


def test_members_that_are_no_samples_do_not_matter(tmp_path: Path) -> None:
    extra = [("README", b"no suffix"), ("notes.md", b"neither image nor class"), ("__meta__.json", b"{}")]
    path = shard(tmp_path / "a.tar", [*extra, *GOOD, *extra])
    assert len(load_split(f"wds:{path}", "val", val_fraction=0.5)) == 2


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0.0, 0.999))
def test_a_cut_shard_is_never_taken_for_a_whole_one(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    path = shard(folder / "a.tar", GOOD)
    whole = path.read_bytes()
    # Behind the last member stand only zeros; of these one block must be left to be sure that nothing is missing.
    last = len(whole.rstrip(b"\0"))
    path.write_bytes(whole[: int(share * last)])
    with pytest.raises(DataError, match=r"cut|damaged|not an uncompressed tar file"):
        load_split(f"wds:{path}", "train")


@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_broken_header_is_not_taken_for_the_end(position: int, tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", GOOD)
    with tarfile.open(path) as archive:
        offset = archive.getmembers()[position].offset
    data = bytearray(path.read_bytes())
    data[offset + 150] ^= 0x55  # in the checksum
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.tar: (damaged or cut at byte|not an uncompressed tar file)"):
        load_split(f"wds:{path}", "train")


def test_compressed_and_missing_shards_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(DataError, match=r"not an uncompressed tar file .*gunzip"):
        load_split(f"wds:{path}", "train")
    for pattern in (tmp_path / "gone.tar", tmp_path / "gone*.tar", "https://host/a.tar"):
        with pytest.raises(DataError, match=r"no file .*(gone|host).*, expected WebDataset shards on this machine"):
            load_split(f"wds:{pattern}", "train")


def test_braces_without_their_package_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "braceexpand", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "leanvit\[data\]"'):
        load_split(f"wds:{tmp_path}/{{0..1}}.tar", "train")


# --- Hugging Face --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library datasets with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    cache = tmp_path_factory.mktemp("hf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
        yield datasets


def hub_table(hf: Any, labels: list[Any], first: int = 0) -> Any:
    """A table with embedded PNG images, and classes ant and bee."""
    images = [{"bytes": encoded(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    features = hf.Features({"photo": hf.Image(), "kind": hf.ClassLabel(names=["ant", "bee"])})
    return hf.Dataset.from_dict({"photo": images, "kind": labels}, features=features)


def test_a_saved_dictionary_keeps_its_parts(hf: Any, tmp_path: Path, no_network: list[object]) -> None:
    splits = {
        "train": hub_table(hf, [0, 1, 1]),
        "validation": hub_table(hf, [1, 0], 10),
        "test": hub_table(hf, [0], 20),
    }
    hf.DatasetDict(splits).save_to_disk(tmp_path / "set")
    for part, labels, first in (("train", [0, 1, 1], 0), ("val", [1, 0], 10), ("test", [0], 20)):
        images = load_split(f"hf:{tmp_path}/set", part)
        assert images.labels.tolist() == labels
        assert images.classes == ("ant", "bee")
        for index in range(len(labels)):
            np.testing.assert_array_equal(pixels(images, index), smooth(12, 10, seed=first + index))
            assert images.encoded(index) == encoded(first + index)
    assert not no_network


def test_a_single_saved_table_is_divided_also_when_its_rows_were_picked(hf: Any, tmp_path: Path) -> None:
    picked = hub_table(hf, [0, 1, 0, 1, 0, 1]).select([5, 0, 3, 2])
    picked.save_to_disk(tmp_path / "set")
    parts = [load_split(f"hf:{tmp_path}/set", part, val_fraction=0.5) for part in ("train", "val")]
    seen = {}
    for images in parts:
        for index in range(len(images)):
            seen[int(np.asarray(pixels(images, index)).astype(int).sum())] = int(images.labels[index])
    truth = {int(smooth(12, 10, seed=row).astype(int).sum()): row % 2 for row in (5, 0, 3, 2)}
    assert seen == truth


def test_a_folder_of_files_is_read_as_the_library_reads_it(
    hf: Any, image_folder: Callable[..., Path], no_network: list[object]
) -> None:
    root = image_folder("set/train", cat=3, dog=2).parent
    image_folder("set/test", cat=1, dog=1)
    train, val = (load_split(f"hf:{root}", part) for part in ("train", "val"))
    theirs = hf.load_dataset(str(root), split="train")
    assert train.labels.tolist() == theirs["label"][:]
    assert train.classes == ("cat", "dog")
    for index in range(5):
        np.testing.assert_array_equal(pixels(train, index), np.asarray(theirs[index]["image"]))
    assert len(val) == 2
    assert not no_network


def test_a_name_that_is_not_in_the_cache_is_not_fetched(hf: Any, no_network: list[object]) -> None:
    from huggingface_hub import constants

    before = (constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY, hf.config.HF_HUB_OFFLINE)
    with pytest.raises(DataError, match=r"nobody/nothing: can't be loaded .*hf-download:nobody/nothing.*save_to_disk"):
        load_split("hf:nobody/nothing", "train")
    assert not no_network
    assert before == (constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY, hf.config.HF_HUB_OFFLINE)


def test_only_the_explicit_request_reaches_for_the_network(
    hf: Any, no_network: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, bool]] = []

    def load(name: str) -> Any:
        from huggingface_hub import constants

        asked.append((constants.HF_HUB_OFFLINE, hf.config.HF_HUB_OFFLINE))
        raise ConnectionError("no route")

    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf, "load_dataset", load)
    for download in (False, True):
        with pytest.raises(DataError, match="no route"):
            hub_parts("nobody/nothing", download=download)
    assert asked == [(True, True), (False, False)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.rename_column("kind", "x").cast_column("x", __import__("datasets").Value("int64")),
         "0 columns of type ClassLabel among photo (Image), x (Value); expected one"),
        (lambda t: t.remove_columns("photo"), "0 columns of type Image"),
        (lambda t: t.add_column("again", t["kind"][:], feature=t.features["kind"]),
         "2 columns of type ClassLabel among"),
    ],
)  # fmt: skip
def test_a_table_without_the_columns_says_which_there_are(
    hf: Any, change: Callable[[Any], Any], message: str, tmp_path: Path
) -> None:
    change(hub_table(hf, [0, 1, 0, 1])).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError) as caught:
        load_split(f"hf:{tmp_path}/set", "train")
    assert message in str(caught.value)


def test_of_several_columns_of_classes_the_usual_name_is_taken(hf: Any, tmp_path: Path) -> None:
    found = hub_table(hf, [0, 1, 0, 1]).rename_column("kind", "label")
    found.add_column("coarse", [1, 1, 1, 1], feature=found.features["label"]).save_to_disk(tmp_path / "set")
    assert sorted(load_split(f"hf:{tmp_path}/set", "train", val_fraction=0.5).labels) == [0, 1]


def test_rows_without_label_or_image_are_named(hf: Any, tmp_path: Path) -> None:
    hub_table(hf, [0, 1, None, 1]).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(DataError, match=r"unlabelled/train\[2\]: label None, expected 0 to 1"):
        load_split(f"hf:{tmp_path}/unlabelled", "train")
    features = hf.Features({"image": hf.Image(), "label": hf.ClassLabel(names=["a", "b"])})
    images = [{"bytes": encoded(0), "path": None}, None, {"bytes": b"broken", "path": None}]
    hf.Dataset.from_dict({"image": images, "label": [0, 1, 0]}, features=features).save_to_disk(tmp_path / "holes")
    whole = find_parts(f"hf:{tmp_path}/holes")["train"]()
    assert pixels(whole, 0).shape == (12, 10, 3)
    for index, words in ((1, "an empty row"), (2, "not an image that can be read")):
        with pytest.raises(ImageError, match=rf"holes/train\[{index}\]: {words}"):
            whole.decoded(index)
    for path, words in (("/gone.png", "gone.png: No such file"), (None, r"^t\[0\]: an empty row")):
        with pytest.raises(ImageError, match=words):
            HubImage([{"image": {"bytes": None, "path": path}}], "image", 0, "t").read()


def test_a_dictionary_without_training_part_is_an_error(hf: Any, tmp_path: Path) -> None:
    hf.DatasetDict({"en": hub_table(hf, [0, 1])}).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="splits en, expected one named train"):
        load_split(f"hf:{tmp_path}/set", "train")


def test_hugging_face_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "leanvit\[data\]"'):
        load_split("hf:anything", "train")


# --- corrupt images, whatever they come from -----------------------------------------------------------------


def in_table(folder: Path, images: list[bytes]) -> str:
    for number, data in enumerate(images):
        (folder / f"{number}.png").write_bytes(data)
    return str(table(folder, "path,label\n" + "".join(f"{n}.png,{'ab'[n % 2]}\n" for n in range(len(images)))))


def in_shard(folder: Path, images: list[bytes]) -> str:
    members = [m for n, data in enumerate(images) for m in ((f"{n}.png", data), (f"{n}.cls", str(n % 2).encode()))]
    return f"wds:{shard(folder / 'a.tar', members)}"


def in_hub_table(folder: Path, images: list[bytes]) -> str:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": data, "path": None} for data in images], "label": [n % 2 for n in range(len(images))]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder / "hub")
    return f"hf:{folder}/hub"


@pytest.mark.parametrize("make", [in_table, in_shard, in_hub_table])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_corrupt_image_is_named_and_fails_or_is_left_out(
    make: Callable[[Path, list[bytes]], str], in_memory: bool, tmp_path: Path
) -> None:
    data = [encoded(number) for number in range(8)]
    data[5] = data[5][:60]
    images = find_parts(make(tmp_path, data))["train"]()
    bad = {in_table: f"{tmp_path}/5.png", in_shard: f"{tmp_path}/a.tar/5.png", in_hub_table: "/hub/train[5]"}[make]
    preprocess = Preprocess(input_size=(12, 10), crop_mode="squash")
    with pytest.raises(ImageError) as caught:
        list(Loader(images, preprocess, 3, "fail", in_memory=in_memory))
    assert bad in str(caught.value)
    assert "--bad-images skip" in str(caught.value)
    loader = Loader(images, preprocess, 3, "skip", in_memory=in_memory)
    batches = list(loader)
    assert len(loader.bad) == 1
    assert loader.bad[0].endswith(bad)
    assert [int(label) for _, y in batches for label in y] == [0, 1, 0, 1, 0, 0, 1]
    good = [number for number in range(8) if number != 5]
    for number, image in zip(good, (x for batch, _ in batches for x in batch), strict=True):
        np.testing.assert_array_equal(image.numpy(), smooth(12, 10, seed=number))


# --- random parts for training -------------------------------------------------------------------------------


def test_a_random_part_is_the_same_from_a_file_a_shard_and_an_array(tmp_path: Path) -> None:
    pixels_ = smooth(90, 70, seed=1)
    path = save_image(tmp_path / "0.png", pixels_)
    from_shard = find_parts(in_shard(tmp_path, [path.read_bytes()] * 2))["train"]()
    from_file = ImageSet("x", [path], np.zeros(1, np.int64), ("a",))
    from_array = ImageSet("x", [pixels_], np.zeros(1, np.int64), ("a",))
    for seed in range(5):
        crops = [images.cropped(0, np.random.default_rng(seed), (32, 24)).pixels
                 for images in (from_shard, from_file, from_array)]  # fmt: skip
        assert crops[0].shape == (32, 24, 3)
        np.testing.assert_array_equal(crops[0], crops[1])
        np.testing.assert_array_equal(crops[0], crops[2])
    with pytest.raises(ImageError, match=r"gone.png: No such file"):
        ImageSet("x", [tmp_path / "gone.png"], np.zeros(1, np.int64), ("a",)).cropped(
            0, np.random.default_rng(), (8, 8)
        )


def test_resized_pixels_are_those_of_decoding_and_then_resizing(tmp_path: Path) -> None:
    preprocess = Preprocess(input_size=(24, 20), crop_pct=0.9)
    sources = [save_image(tmp_path / "0.png", smooth(60, 50, seed=0)), smooth(60, 50, seed=1)]
    images = ImageSet("x", sources, np.zeros(2, np.int64), ("a",))
    for index in range(2):
        truth = imaging.resize(imaging.decode(images.encoded(index)).pixels, preprocess)
        np.testing.assert_array_equal(images.resized(index, preprocess).pixels, truth)
