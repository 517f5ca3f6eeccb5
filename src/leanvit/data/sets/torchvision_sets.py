"""CIFAR-10/100, Flowers-102, Oxford-IIIT Pet and ImageNet as torchvision lays them out below a root; never downloaded.

torchvision reads them: it knows the layouts, and it unpickles CIFAR only where the MD5 of the file is the official one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from leanvit.data.sets.image_set import ImageSet, Parts, require_files
from leanvit.data.sets.local import class_folders, image_folder, same_classes
from leanvit.errors import DataError

_URLS = {
    "CIFAR10": "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz (unpack it in {root})",
    "CIFAR100": "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz (unpack it in {root})",
    "Flowers102": "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/: 102flowers.tgz, imagelabels.mat, setid.mat "
    "(put the .mat files into {root}/flowers-102 and unpack the .tgz there)",
    "OxfordIIITPet": "https://www.robots.ox.ac.uk/~vgg/data/pets/data/: images.tar.gz, annotations.tar.gz "
    "(unpack both in {root}/oxford-iiit-pet)",
}
_WORDNET_ID = re.compile(r"n\d{8}")


def cifar_parts(kind: str, root: Path) -> Parts:
    """CIFAR10 or CIFAR100 (`kind`): 50,000 training images and the 10,000 official test images, which validate."""
    return {"train": partial(_cifar, kind, root, True), "test": partial(_cifar, kind, root, False)}


def _cifar(kind: str, root: Path, train: bool) -> ImageSet:
    images = _open(kind, root, train=train)
    pixels = np.ascontiguousarray(images.data, dtype=np.uint8)
    return ImageSet(kind, list(pixels), np.asarray(images.targets, np.int64), tuple(images.classes))


def flowers_parts(root: Path) -> Parts:
    """Oxford Flowers-102 in its three official parts: 1,020 images to train, 1,020 to validate, 6,149 to test.

    Papers that train on both of the first two name 2,040 training images; a CSV table can do that.
    """
    return {split: partial(_files, "Flowers102", root, split) for split in ("train", "val", "test")}


def pets_parts(root: Path) -> Parts:
    """Oxford-IIIT Pet, 37 breeds: 3,680 images (trainval) to train; the 3,669 official test images validate."""
    return {
        "train": partial(_files, "OxfordIIITPet", root, "trainval"),
        "test": partial(_files, "OxfordIIITPet", root, "test"),
    }


def _files(kind: str, root: Path, split: str) -> ImageSet:
    images = _open(kind, root, split=split)
    # Private names, since the public way to a path decodes the image; torchvision is pinned below the next minor.
    paths, labels = (images._image_files if kind == "Flowers102" else images._images), images._labels
    require_files(paths, f"{root}: {kind}", _how_to_get(kind, root))
    return ImageSet(f"{kind} {split}", paths, np.asarray(labels, np.int64), tuple(images.classes))


def _open(kind: str, root: Path, **options: Any) -> Any:
    """The torchvision data set. Raises DataError that says how to get it."""
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, kind)
    try:
        return make(root, download=False, **options)
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        reason = " ".join(str(error).split()).removesuffix(" You can use download=True to download it")
        raise DataError(f"{root}: {kind} is absent or not whole ({reason}). {_how_to_get(kind, root)}") from error


def _how_to_get(kind: str, root: Path) -> str:
    return (
        "Nothing is downloaded unasked. "
        f"Run: python -c \"import torchvision; torchvision.datasets.{kind}('{root}', download=True)\" "
        f"or, where there is no network, bring {_URLS[kind].format(root=root)}"
    )


def imagenet_parts(root: Path) -> Parts:
    """ImageNet-1k, or a part of its classes: ROOT/train/n01440764/*.JPEG and the same folders below ROOT/val.

    Classes are called by their WordNet ids, in sorted order: the order of published ImageNet weights.
    """
    folders = {split: root / split for split in ("train", "val")}
    for folder in folders.values():
        _check_imagenet_folder(root, folder)
    same_classes(folders["train"], folders["val"])
    return {"train": partial(image_folder, folders["train"]), "val": partial(image_folder, folders["val"])}


def _check_imagenet_folder(root: Path, folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder, expected the folders train and val of ImageNet. {_unpack_imagenet(root)}"
        )
    if folder.name == "val" and next(folder.glob("ILSVRC2012_val_*"), None):
        raise DataError(
            f"{folder}: images that are not sorted into class folders, expected {folder}/n01440764/*.JPEG. "
            f"Remove {folder} and let torchvision sort them. {_unpack_imagenet(root)}"
        )
    odd = [path.name for path in class_folders(folder) if not _WORDNET_ID.fullmatch(path.name)]
    if odd:
        raise DataError(
            f"{folder}: class folder '{odd[0]}', expected WordNet ids such as n01440764. "
            f"Give other data as an image folder: --data {root}"
        )


def _unpack_imagenet(root: Path) -> str:
    return (
        "Get ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz from "
        f"https://image-net.org (an account is needed), put them into {root}, and run: python -c "
        f"\"import torchvision; [torchvision.datasets.ImageNet('{root}', split) for split in ('train', 'val')]\""
    )
