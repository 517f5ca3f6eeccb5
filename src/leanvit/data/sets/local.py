"""Data sets in plain files: image folders, CSV tables, scikit-learn's digits, Fashion-MNIST in IDX files."""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanvit import imaging
from leanvit.config import FASHION_MNIST_CLASSES
from leanvit.data.sets.image_set import SPLITS, ImageSet, Parts, Split, require_files
from leanvit.errors import DataError, require
from leanvit.image_paths import images_below, is_hidden, leave_out_foreign, real_path
from leanvit.passed_over import few, left_out, note_once
from leanvit.progress import track

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test",
}  # fmt: skip
_DELIMITERS = ",;\t|"


# --- image folders ---


def folder_parts(root: Path) -> Parts:
    """An image folder: one folder a class, either all together or below train/ and val/ (and test/)."""
    found = {split: root / name for name, split in reversed(SPLIT_NAMES.items()) if (root / name).is_dir()}
    train, held_out = found.get("train"), found.get("val") or found.get("test")
    if not train or not held_out:
        return {"train": partial(image_folder, root)}
    same_classes(train, held_out)
    _name_strays(root, [path for path in root.iterdir() if path.is_dir()])
    _note_unused(root, [found[split] for split in SPLITS if split in found])
    parts: Parts = {split: partial(image_folder, found[split]) for split in SPLITS if split in found}
    if "test" in found:
        parts["test"] = partial(_test_folder, train, found["test"])
    return parts


def _note_unused(root: Path, used: Sequence[Path]) -> None:
    """Say which folders beside train/ and val/ are no part."""
    others = sorted(
        path.name for path in root.iterdir() if path.is_dir() and path not in used and not is_hidden(path.name)
    )
    if others:
        note_once(f"{root}: used are {', '.join(path.name for path in used)}; not used: {few(others)}")


def _test_folder(train: Path, test: Path) -> ImageSet:
    same_classes(train, test)
    return image_folder(test)


def same_classes(train: Path, other: Path) -> None:
    """Raise DataError where two folders don't have the same class folders."""
    names, other_names = ({folder.name for folder in class_folders(root)} for root in (train, other))
    if names != other_names:
        different = sorted(names ^ other_names)
        raise DataError(
            f"{train.parent}: classes {', '.join(different[:5])} are not in both {train.name}/ and {other.name}/, "
            "expected the same class folders in both. Add or remove them."
        )


def class_folders(root: Path) -> list[Path]:
    """The folders of the classes, sorted. Raises DataError where there are fewer than two."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    if len(folders) < 2:
        raise DataError(
            f"{root}: {len(folders)} class folders found, expected one folder a class and at least two classes. "
            "Move the images into folders named after their classes."
        )
    return folders


def image_folder(root: Path) -> ImageSet:
    """Images below one folder a class. Raises DataError where a class has none."""
    folders = class_folders(root)
    _name_strays(root, folders)
    paths: list[Path] = []
    labels: list[int] = []
    for index, folder in enumerate(track(folders, f"listing {root}", len(folders))):
        images = leave_out_foreign(images_below(folder))
        if not images:
            raise DataError(
                f"{folder}: class '{folder.name}' has no images, expected at least one file ending in "
                f"{imaging.ENDINGS}. Add images or remove the folder."
            )
        paths += images
        labels += [index] * len(images)
    classes = tuple(folder.name for folder in folders)
    return ImageSet(str(root), paths, np.asarray(labels, np.int64), classes)


def _name_strays(root: Path, folders: Sequence[Path]) -> None:
    """Name images beside the class folders, which belong to no class, and links to folders that are gone."""
    beside = [path for path in sorted(root.iterdir()) if not is_hidden(path.name) and path not in folders]
    lost = [str(path) for path in beside if not path.exists()]
    left_out(lost, f"links in {root} that lead to nothing")
    strays = [str(path) for path in beside if path.is_file() and path.suffix.lower() in imaging.SUFFIXES]
    left_out(strays, f"images beside the class folders of {root}, which have no class")


# --- CSV ---


def csv_parts(path: Path) -> Parts:
    """A table of images in UTF-8: columns path and label, and split (train, val or test) where the parts are given.

    Paths are relative to the folder of the table. Fields are separated by the comma, semicolon, tab or bar that the
    first line has; quotes and a byte order mark are understood. Classes are sorted by name, numbers by value.
    Raises DataError for a missing column, an empty or unknown field (with its line), and missing images.
    """
    rows = _csv_rows(path)
    files = [real_path(path.parent, file) for file, _, _ in rows]
    require_files(files, str(path), "Paths are relative to the folder of the table; correct them or add the files.")
    trained = {label for _, label, split in rows if split == "train"}
    unknown = sorted({label for _, label, _ in rows} - trained)
    if unknown:
        raise DataError(
            f"{path}: classes {', '.join(unknown[:5])} have no row with split 'train', expected images of every class "
            "to train on. Add some, or remove the class."
        )
    if len(trained) < 2:
        raise DataError(f"{path}: {len(trained)} classes in column 'label', expected at least two. Add images.")
    classes = _sorted_classes(trained)
    index = {name: i for i, name in enumerate(classes)}

    def part(split: Split) -> ImageSet:
        chosen = [(file, index[row[1]]) for file, row in zip(files, rows, strict=True) if row[2] == split]
        return ImageSet(str(path), [f for f, _ in chosen], np.asarray([i for _, i in chosen], np.int64), classes)

    present = {split for _, _, split in rows}
    return {split: partial(part, split) for split in SPLITS if split in present}


def _csv_rows(path: Path) -> list[tuple[str, str, Split]]:
    """(path, label, split) of every row; the split is 'train' where the table has no such column."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            delimiter = max(_DELIMITERS, key=first.count)
            file.seek(0)
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            columns = [name.strip().lower() for name in next(reader, [])]
            _check_columns(columns, path)
            rows = [_csv_row(dict(zip(columns, row, strict=False)), row, columns, f"{path}, line {reader.line_num}")
                    for row in reader if any(field.strip() for field in row)]  # fmt: skip
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}, expected a CSV table. Check --data.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV table in UTF-8 ({error}). Save it again as CSV UTF-8.") from error
    if not rows:
        raise DataError(f"{path}: no rows, expected an image a line. Add images.")
    return rows


def _check_columns(columns: list[str], path: Path) -> None:
    missing = [name for name in ("path", "label") if name not in columns]
    if missing:
        raise DataError(
            f"{path}: no column '{missing[0]}' among {', '.join(columns) or 'none'}, expected path, label and "
            "optionally split in the first line. Add or rename it."
        )


def _csv_row(values: dict[str, str], row: list[str], columns: list[str], where: str) -> tuple[str, str, Split]:
    if len(row) != len(columns):
        raise DataError(f"{where}: {len(row)} fields, expected {len(columns)} ({', '.join(columns)}). Quote commas.")
    wanted = ("path", "label", "split") if "split" in columns else ("path", "label")
    fields = {name: values[name].strip() for name in wanted}
    empty = next((name for name, text in fields.items() if not text), None)
    if empty:
        raise DataError(f"{where}: '{empty}' is empty, expected a value in every row. Fill it in or remove the row.")
    split = SPLIT_NAMES.get(fields.get("split", "train").lower())
    if split is None:
        raise DataError(f"{where}: split is '{fields['split']}', expected train, val or test. Correct the row.")
    return fields["path"], fields["label"], split


def _sorted_classes(names: set[str]) -> tuple[str, ...]:
    """'2' stands before '10', and words are sorted as words."""
    if all(name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


# --- digits, Fashion-MNIST ---


def digits_parts() -> Parts:
    """The 1,797 handwritten digits (8 x 8 pixels) of scikit-learn."""
    return {"train": _digits}


def _digits() -> ImageSet:
    require("sklearn")
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)
    classes = tuple(str(name) for name in digits.target_names)
    return ImageSet("digits", _grey_images(grey), digits.target.astype(np.int64), classes)


def _grey_images(grey: NDArray[np.uint8]) -> Sequence[NDArray[np.uint8]]:
    return list(np.repeat(grey[:, :, :, None], 3, axis=3))


def fashion_mnist_parts(folder: Path) -> Parts:
    """Fashion-MNIST: 60,000 training images and the 10,000 official test images, which validate."""
    return {"train": partial(_fashion_mnist, folder, "train"), "test": partial(_fashion_mnist, folder, "t10k")}


def _fashion_mnist(folder: Path, stem: str) -> ImageSet:
    images = _read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 3)
    labels = _read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 1)
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels. Install the data set again.")
    if labels.size == 0 or labels.max() >= len(FASHION_MNIST_CLASSES):
        found = f"labels up to {labels.max()}" if labels.size else "no labels"
        raise DataError(f"{folder}: {found}, expected 0 to 9. Install the data set again.")
    return ImageSet("fashion-mnist", _grey_images(images), labels.astype(np.int64), FASHION_MNIST_CLASSES)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{path}: {getattr(error, 'strerror', None) or error}, expected Fashion-MNIST in IDX format. "
            "Run: apt-get install dataset-fashion-mnist, or give the folder: fashion-mnist:FOLDER"
        ) from error
    header = 4 + 4 * dimensions
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4))
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) != header + math.prod(shape):
        raise DataError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions, expected Fashion-MNIST. "
            "Install the data set again."
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
