"""Specifications: one string, the value of --data, names a data set of any kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from leanvit.data.sets.hub import hub_parts
from leanvit.data.sets.image_set import ImageSet, Parts, Split, hold_out
from leanvit.data.sets.local import FASHION_MNIST_FOLDER, csv_parts, digits_parts, fashion_mnist_parts, folder_parts
from leanvit.data.sets.shards import shard_parts
from leanvit.data.sets.torchvision_sets import cifar_parts, flowers_parts, imagenet_parts, pets_parts
from leanvit.errors import DataError, did_you_mean


def _at(make: Callable[[Path], Parts]) -> Callable[[str], Parts]:
    return lambda text: make(Path(text).expanduser())


KINDS: dict[str, tuple[str, Callable[[str], Parts]]] = {
    "csv": ("FILE", _at(csv_parts)),
    "cifar10": ("ROOT", _at(partial(cifar_parts, "CIFAR10"))),
    "cifar100": ("ROOT", _at(partial(cifar_parts, "CIFAR100"))),
    "flowers102": ("ROOT", _at(flowers_parts)),
    "oxford-iiit-pet": ("ROOT", _at(pets_parts)),
    "imagenet": ("ROOT", _at(imagenet_parts)),
    "hf": ("NAME_OR_FOLDER", partial(hub_parts, download=False)),
    "hf-download": ("NAME", partial(hub_parts, download=True)),
    "wds": ("PATTERN", shard_parts),
}


def find_parts(spec: str) -> Parts:
    """The official parts of a data set: functions that read them. Raises DataError, MissingDependencyError."""
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        return digits_parts()
    if kind == "fashion-mnist":
        return fashion_mnist_parts(Path(rest or FASHION_MNIST_FOLDER))
    if kind in KINDS:
        argument, make = KINDS[kind]
        if not rest:
            raise DataError(f"data '{spec}': nothing after the colon, expected {kind}:{argument}. Check --data.")
        return make(rest)
    path = Path(spec)
    if path.suffix.lower() == ".csv" and not path.is_dir():
        return csv_parts(path)
    if path.is_dir():
        return folder_parts(path)
    hint = did_you_mean(kind, [*KINDS, "fashion-mnist"]) if colon else ""
    others = ", ".join(f"{name}:{argument}" for name, (argument, _) in KINDS.items())
    raise DataError(
        f"data '{spec}': no such folder, expected an image folder with one folder a class, FILE.csv, {others}, "
        f"'digits' or 'fashion-mnist'. Check --data.{hint}"
    )


def load_split(spec: str, split: Split, *, val_fraction: float = 0.2, seed: int = 0) -> ImageSet:
    """One part of a data set.

    spec: an image folder with one folder a class, either below train/ and val/ or all together; FILE.csv or csv:FILE;
        'digits'; 'fashion-mnist[:FOLDER]'; cifar10:ROOT, cifar100:ROOT, flowers102:ROOT, oxford-iiit-pet:ROOT,
        imagenet:ROOT; hf:NAME_OR_FOLDER (hf-download:NAME to fetch it); wds:PATTERN. See docs/data.md.
    split: official parts are kept. Where there is no 'val' part, the test images validate (CIFAR, Fashion-MNIST,
        Oxford-IIIT Pet); where there is neither, `val_fraction` of every class is held out of the rest by `seed`.
    Raises DataError where data is missing or damaged, a class is empty, or there is no such part.
    """
    parts = find_parts(spec)
    if split == "val" and split not in parts and "test" in parts:
        return parts["test"]()
    if split == "test" or len(parts) > 1:
        if split not in parts:
            raise DataError(f"data '{spec}': no part '{split}', it has {', '.join(parts)}. Choose another --split.")
        return parts[split]()
    return hold_out(parts["train"](), split, val_fraction, seed)
