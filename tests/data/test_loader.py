"""Data sets: what is read, how it is split, ordered, checked and augmented."""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from common import save_image, smooth
from leanvit.checkpoint import preprocess_for
from leanvit.config import FASHION_MNIST_CLASSES, Preprocess
from leanvit.data import loader as data
from leanvit.data.loader import Loader, check_classes, epoch_order, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.errors import DataError, ImageError

P8 = Preprocess(input_size=(8, 8))


# --- splits --------------------------------------------------------------------------------------------------

CLASS_SIZES = {"ant": 2, "bee": 7, "cat": 20, "dog": 31}


@pytest.fixture(scope="session")
def unread_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder whose files are empty: splitting must not read them."""
    root = tmp_path_factory.mktemp("unread")
    for label, count in CLASS_SIZES.items():
        (root / label).mkdir()
        for number in range(count):
            (root / label / f"{number:03}.png").touch()
    return root


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), fraction=st.floats(0.01, 0.99))
def test_the_held_out_part_is_disjoint_complete_stratified_and_repeatable(
    unread_folder: Path, seed: int, fraction: float
) -> None:
    train, val = (load_split(str(unread_folder), part, val_fraction=fraction, seed=seed) for part in ("train", "val"))
    everything = sorted(unread_folder.rglob("*.png"))
    assert not set(train.sources) & set(val.sources)
    assert sorted([*train.sources, *val.sources]) == everything
    assert train.classes == val.classes == tuple(CLASS_SIZES)
    for part in (train, val):
        assert [part.classes[label] for label in part.labels] == [Path(s).parent.name for s in part.sources]
    for index, count in enumerate(CLASS_SIZES.values()):
        held_out = int((val.labels == index).sum())
        assert 1 <= held_out <= count - 1
        assert abs(held_out - fraction * count) <= 1 or held_out in (1, count - 1)
    again = load_split(str(unread_folder), "val", val_fraction=fraction, seed=seed)
    assert again.sources == val.sources


def test_another_seed_holds_out_other_images(unread_folder: Path) -> None:
    splits = [load_split(str(unread_folder), "val", seed=seed).sources for seed in range(5)]
    assert len({tuple(split) for split in splits}) == 5


def test_digits_are_those_of_scikit_learn_in_8_bits() -> None:
    truth = load_digits()
    train, val = load_split("digits", "train"), load_split("digits", "val")
    assert len(train) + len(val) == len(truth.images) == 1797
    assert train.classes == tuple("0123456789")
    known = Counter((image.tobytes(), label) for image, label in zip(truth.images, truth.target, strict=True))
    found = Counter()
    for part in (train, val):
        for pixels, label in zip(part.sources, part.labels, strict=True):
            assert isinstance(pixels, np.ndarray)
            assert pixels.shape == (8, 8, 3)
            assert (pixels == pixels[:, :, :1]).all()
            found[(np.rint(pixels[:, :, 0] / 255 * 16).astype(np.float64).tobytes(), int(label))] += 1
    assert found == known
    assert max(int(pixels.max()) for pixels in train.sources) == 255
    for label in range(10):
        assert (val.labels == label).sum() == round(0.2 * (truth.target == label).sum())


# --- image folders -------------------------------------------------------------------------------------------


def test_folders_train_and_val_are_used_as_they_are(image_folder: Callable[..., Path]) -> None:
    root = image_folder("set/train", cat=3, dog=2).parent
    image_folder("set/val", cat=1, dog=2)
    train, val = load_split(str(root), "train", val_fraction=0.5, seed=9), load_split(str(root), "val")
    assert [str(p.relative_to(root)) for p in map(Path, train.sources)] == [
        "train/cat/0.png", "train/cat/1.png", "train/cat/2.png", "train/dog/0.png", "train/dog/1.png",
    ]  # fmt: skip
    assert train.labels.tolist() == [0, 0, 0, 1, 1]
    assert val.labels.tolist() == [0, 1, 1]
    assert train.labels.dtype == np.int64


@pytest.mark.parametrize(("train", "val"), [("training", "validation"), ("train", "valid"), ("train", "test")])
def test_other_usual_names_of_the_two_folders_are_known(
    train: str, val: str, image_folder: Callable[..., Path]
) -> None:
    root = image_folder(f"set/{train}", a=2, b=2).parent
    image_folder(f"set/{val}", a=1, b=1)
    assert (len(load_split(str(root), "train")), len(load_split(str(root), "val"))) == (4, 2)


def test_classes_that_are_not_in_both_parts_are_named(image_folder: Callable[..., Path]) -> None:
    root = image_folder("set/train", cat=1, dog=1, eel=1).parent
    image_folder("set/val", cat=1, dog=1, fox=1)
    with pytest.raises(DataError, match=r"set: classes eel, fox are not in both train/ and val/.* Add or remove"):
        load_split(str(root), "train")


def test_images_below_subfolders_belong_to_the_class_and_other_files_do_not(image_folder: Callable[..., Path]) -> None:
    root = image_folder("set", cat=2, dog=2)
    (root / "cat" / "more").mkdir()
    save_image(root / "cat" / "more" / "x.PNG", smooth(8, 8, seed=0))
    (root / "cat" / "readme.txt").write_text("no image")
    (root / ".hidden").mkdir()
    (root / "list.csv").write_text("no class")
    parts = [load_split(str(root), part) for part in ("train", "val")]
    assert sorted(Path(s).name for part in parts for s in part.sources if part.name) == sorted(
        ["0.png", "1.png", "0.png", "1.png", "x.PNG"]
    )
    assert parts[0].classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "0 class folders found, expected one folder a class and at least two classes"),
        ({"cat": 3}, "1 class folders found"),
        ({"cat": 3, "dog": 0}, "class 'dog' has no images, expected at least one file ending in .bmp"),
        ({"cat": 3, "dog": 1}, "class 'dog' has 1 image, expected at least two to hold one out"),
    ],
)
def test_a_folder_that_is_no_data_set_is_explained(
    classes: dict[str, int], message: str, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "set").mkdir()
    root = image_folder("set", **classes)
    with pytest.raises(DataError) as caught:
        load_split(str(root), "train")
    assert message in str(caught.value)
    assert str(root) in str(caught.value)


def test_a_missing_folder_is_named_with_what_could_be_given_instead() -> None:
    with pytest.raises(DataError, match=r"'digts': no such folder, .*'digits' or 'fashion-mnist'. Check --data"):
        load_split("digts", "train")


def test_classes_must_be_those_of_the_model_in_the_same_order() -> None:
    check_classes(("a", "b"), ("a", "b"), "d")
    for other in (("b", "a"), ("a",), ("a", "b", "c")):
        with pytest.raises(DataError, match=r"^d has classes .* in that order"):
            check_classes(other, ("a", "b"), "d")


# --- Fashion-MNIST -------------------------------------------------------------------------------------------


def idx(array: np.ndarray, magic: bytes | None = None) -> bytes:
    """An IDX file as http://yann.lecun.com/exdb/mnist describes it."""
    magic = magic or bytes((0, 0, 8, array.ndim))
    return magic + struct.pack(f">{array.ndim}i", *array.shape) + array.astype(np.uint8).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
GOOD_LABELS = np.array([9, 0, 3, 3, 1, 8], np.uint8)


def write_fashion(folder: Path, images: bytes, labels: bytes, stem: str = "train", compress: bool = True) -> str:
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if compress else bytes
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(pack(images))
    (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(pack(labels))
    return f"fashion-mnist:{folder}"


def test_fashion_mnist_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_fashion(tmp_path, idx(IMAGES), idx(GOOD_LABELS))
    spec = write_fashion(tmp_path, idx(IMAGES[:2]), idx(GOOD_LABELS[:2]), "t10k")
    train, val = load_split(spec, "train"), load_split(spec, "val")
    assert (len(train), len(val)) == (6, 2)
    np.testing.assert_array_equal(train.labels, GOOD_LABELS)
    for channel in range(3):
        np.testing.assert_array_equal(np.stack(train.sources)[..., channel], IMAGES)
    assert train.classes == FASHION_MNIST_CLASSES
    assert len(set(FASHION_MNIST_CLASSES)) == 10
    assert (FASHION_MNIST_CLASSES[0], FASHION_MNIST_CLASSES[9]) == ("T-shirt/top", "Ankle boot")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(IMAGES, b"\0\0\x0d\3"), idx(GOOD_LABELS), "not an IDX file of bytes in 3 dimensions"),
        (idx(IMAGES, b"\1\0\x08\3"), idx(GOOD_LABELS), "not an IDX file"),
        (idx(IMAGES), idx(IMAGES), "not an IDX file of bytes in 1 dimensions"),
        (idx(IMAGES)[:-1], idx(GOOD_LABELS), "not an IDX file"),
        (idx(IMAGES) + b"x", idx(GOOD_LABELS), "not an IDX file"),
        (b"", idx(GOOD_LABELS), "not an IDX file"),
        (idx(IMAGES)[:9], idx(GOOD_LABELS), "not an IDX file"),
        (idx(IMAGES)[:16], idx(GOOD_LABELS), "not an IDX file"),
        (b"\0\0\x08\3" + struct.pack(">3i", -6, -28, 28) + b"0" * 6 * 28 * 28, idx(GOOD_LABELS), "not an IDX file"),
        (idx(IMAGES), idx(GOOD_LABELS[:5]), "6 images but 5 labels"),
        (idx(IMAGES), idx(GOOD_LABELS + 1), "labels up to 10, expected 0 to 9"),
        (idx(IMAGES[:0]), idx(GOOD_LABELS[:0]), "no labels, expected 0 to 9"),
    ],
)
def test_a_damaged_fashion_mnist_is_one_data_error(images: bytes, labels: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Install the data set again") as caught:
        load_split(write_fashion(tmp_path, images, labels), "train")
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_fashion_mnist_says_which_package_brings_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file.*apt-get install dataset-fashion-mnist.*fashion-mnist:FOLDER"):
        load_split(f"fashion-mnist:{tmp_path}", "train")


def test_files_that_are_not_gzip_are_one_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="apt-get install"):
        load_split(write_fashion(tmp_path, idx(IMAGES), idx(GOOD_LABELS), compress=False), "train")


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 10_000), value=st.integers(0, 255), length=st.integers(0, 10_000))
def test_damage_to_the_packed_file_gives_images_or_a_data_error(
    position: int, value: int, length: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "packed"
    spec = write_fashion(folder, idx(IMAGES), idx(GOOD_LABELS))
    path = folder / "train-images-idx3-ubyte.gz"
    packed = bytearray(path.read_bytes())
    packed[position % len(packed)] = value
    path.write_bytes(packed[: len(packed) - length % 7])
    try:
        images = load_split(spec, "train")
    except DataError as error:
        assert str(path) in str(error)  # noqa: PT017 - either outcome is right
    else:
        np.testing.assert_array_equal(np.stack(images.sources)[..., 0], IMAGES)


# --- Loader --------------------------------------------------------------------------------------------------


def coloured(count: int) -> ImageSet:
    """Image i has one colour, i."""
    sources = [np.full((8, 8, 3), index, np.uint8) for index in range(count)]
    return ImageSet("coloured", sources, np.arange(count) % 3, ("a", "b", "c"))


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 45), in_memory=st.booleans(), seed=st.integers(0, 99))
def test_the_loader_gives_every_image_with_its_label_in_the_order_asked_for(
    count: int, batch_size: int, in_memory: bool, seed: int
) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", 2**30 if in_memory else 0)
        loader = Loader(coloured(count), P8, batch_size)
        assert (loader.memory is not None) == in_memory
        for order in (None, np.random.default_rng(seed).permutation(count)):
            batches = list(loader if order is None else loader.batches(order))
            expected = np.arange(count) if order is None else order
            assert torch.cat([x[:, 0, 0, 0] for x, _ in batches]).tolist() == expected.tolist()
            assert torch.cat([y for _, y in batches]).tolist() == (expected % 3).tolist()
            assert len(batches) == len(loader)
            assert {len(x) for x, _ in batches[:-1]} <= {batch_size}
            assert all(x.shape[1:] == (8, 8, 3) and x.dtype == torch.uint8 for x, _ in batches)
            assert all(y.dtype == torch.int64 for _, y in batches)


def test_the_loader_resizes_as_the_preprocessing_says(image_folder: Callable[..., Path]) -> None:
    images = load_split(str(image_folder(cat=2, dog=2)), "train")
    (pixels, _), *_ = Loader(images, Preprocess(input_size=(16, 24), crop_mode="squash"), 4)
    with Image.open(images.sources[0]) as image:
        truth = np.asarray(image.resize((24, 16), Image.Resampling.BICUBIC))
    assert np.abs(pixels[0].numpy().astype(int) - truth).max() <= 1


@pytest.fixture
def damaged_folder(image_folder: Callable[..., Path]) -> Path:
    """train/ and val/ of two classes; one image of the class dog in train/ is cut."""
    root = image_folder("set/train", cat=4, dog=4).parent
    image_folder("set/val", cat=1, dog=1)
    victim = root / "train" / "dog" / "2.png"
    victim.write_bytes(victim.read_bytes()[:100])
    return root


@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_corrupt_image_stops_the_loader_and_is_named(
    damaged_folder: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", limit)
    images = load_split(str(damaged_folder), "train")
    with pytest.raises(ImageError, match=r"dog/2.png: .* --bad-images skip"):
        list(Loader(images, P8, 3))


@pytest.mark.parametrize("limit", [0, 2**30])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_a_corrupt_image_is_left_out_and_listed_once_where_asked(
    damaged_folder: Path, limit: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", limit)
    images = load_split(str(damaged_folder), "train")
    loader = Loader(images, P8, batch_size, "skip")
    for _ in range(2):
        batches = list(loader)
        assert torch.cat([y for _, y in batches]).tolist() == [0, 0, 0, 0, 1, 1, 1]
        assert all(len(x) == len(y) > 0 for x, y in batches)
    assert loader.bad == [str(damaged_folder / "train" / "dog" / "2.png")]


def test_left_out_images_are_counted_in_a_note(damaged_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Loader(load_split(str(damaged_folder), "train"), P8, 3, "skip")
    captured = capsys.readouterr()
    assert "1 of 8 images left out" in captured.err
    assert "dog/2.png" in captured.err
    assert captured.out == ""


def test_a_class_without_a_readable_image_is_an_error_even_where_bad_images_are_skipped(damaged_folder: Path) -> None:
    for path in (damaged_folder / "train" / "dog").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="class 'dog' has no readable image"):
        Loader(load_split(str(damaged_folder), "train"), P8, 3, "skip")


@pytest.mark.parametrize("limit", [0, 2**30])
def test_a_conversion_is_noted_once_with_the_first_image(
    damaged_folder: Path, limit: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT_BYTES", limit)
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for number in range(4):
        Image.fromarray(deep).save(damaged_folder / "train" / "cat" / f"{number}.png")
    loader = Loader(load_split(str(damaged_folder), "train"), P8, 3, "skip")
    list(loader)
    lines = [line for line in capsys.readouterr().err.splitlines() if "16-bit" in line]
    assert len(lines) == 1
    assert "cat/0.png: 16-bit image scaled to 8 bits" in lines[0]


def test_a_subset_keeps_image_and_label_together() -> None:
    picked = coloured(9).subset(np.array([7, 2, 2]))
    assert [int(np.asarray(source)[0, 0, 0]) for source in picked.sources] == [7, 2, 2]
    assert picked.labels.tolist() == [1, 2, 2]


def test_encoded_bytes_are_the_file_s_own_or_lossless(image_folder: Callable[..., Path]) -> None:
    images = load_split(str(image_folder(cat=2, dog=2)), "train")
    assert images.encoded(0) == Path(images.sources[0]).read_bytes()
    embedded = coloured(3)
    decoded = ImageSet("x", [np.zeros((2, 2, 3), np.uint8)], np.zeros(1, np.int64), ("a",))
    assert embedded.encoded(2)[:4] == b"\x89PNG"
    assert embedded.pixels(2, P8).tolist() == np.full((8, 8, 3), 2).tolist()
    assert len(decoded) == 1


# --- order ----------------------------------------------------------------------------------


@given(count=st.integers(0, 500), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_the_order_of_an_epoch_is_a_permutation_and_a_pure_function(count: int, seed: int, epoch: int) -> None:
    order = epoch_order(count, seed, epoch)
    assert sorted(order.tolist()) == list(range(count))
    np.random.default_rng().random()
    assert epoch_order(count, seed, epoch).tolist() == order.tolist()


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


# --- preprocessing -------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_to_input_is_the_formula_in_float64(seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    preprocess = Preprocess(input_size=(5, 4), mean=(0.1, 0.5, 0.9), std=(0.2, 0.25, 1.0))
    found = to_input(torch.from_numpy(images), preprocess).numpy()
    truth = (images / 255.0 - np.array(preprocess.mean)) / np.array(preprocess.std)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, truth.transpose(0, 3, 1, 2), atol=2e-6)


def test_a_cpu_and_another_device_normalise_to_the_same_bits() -> None:
    images = torch.arange(256, dtype=torch.uint8).repeat(9).reshape(3, 16, 16, 3)
    preprocess = Preprocess(input_size=(16, 16), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    elsewhere = data._normalised(images.reshape(3, 16, 48), preprocess, 3).view(3, 16, 16, 3).permute(0, 3, 1, 2)
    assert torch.equal(to_input(images, preprocess), elsewhere)
    assert to_input(images, preprocess, "meta").shape == (3, 3, 16, 16)


def test_preprocessing_is_what_the_model_asks_for() -> None:
    found = preprocess_for(timm.create_model("vit_tiny_patch16_224"))
    half = (0.5, 0.5, 0.5)
    assert found == Preprocess(input_size=(224, 224), mean=half, std=half, interpolation="bicubic", crop_pct=0.9)
    assert preprocess_for(timm.create_model("vit_tiny_patch16_224"), 96).input_size == (96, 96)


def test_one_value_for_all_channels_is_meant_for_each() -> None:
    model = timm.create_model("vit_tiny_patch16_224")
    model.pretrained_cfg["mean"], model.pretrained_cfg["std"] = (0.3,), (0.7,)
    found = preprocess_for(model)
    assert (found.mean, found.std) == ((0.3,) * 3, (0.7,) * 3)
