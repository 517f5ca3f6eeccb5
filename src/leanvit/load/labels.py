"""Class names: a network's own, ImageNet's by their number, or numbers where none are known."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leanvit.errors import ConfigError
from leanvit.progress import note


def task_for(classes: int) -> str:
    """What a network with so many outputs does: without a classifier it embeds, one logit stands between two labels."""
    return {0: "embed", 1: "binary"}.get(classes, "classify")


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes of which only the number is known: "0" up to "count - 1"."""
    return tuple(str(i) for i in range(count))


def are_numbered(labels: Sequence[str]) -> bool:
    """Whether nothing but their number is known of classes."""
    return tuple(labels) == numbered(len(labels))


def labels_for(count: int, named: Sequence[str] | None, spec: str, *, sure: bool = False) -> tuple[str, ...]:
    """Names of `count` classes: `named` by the network itself, else ImageNet's where it has as many, else numbers.

    One output stands between two labels, the second of which it speaks for.
    Says which, where the network does not name them. sure: that they are ImageNet's where their number is.
    """
    count = 2 if count == 1 else count
    if named and len(named) == count:
        return unique([str(name) for name in named])
    subset = imagenet_subset(count)
    if subset and not sure:
        note(f"{spec}: {count} classes without names, taken for those of {subset}. For others: --labels FILE")
    if subset:
        return imagenet_labels(subset)
    if count:
        note(f"{spec}: {count} classes without names, numbered from 0. Names: --labels FILE, or --data of as many")
    return numbered(count)


def imagenet_subset(count: int) -> str | None:
    """timm's name of the ImageNet with so many classes, such as 'imagenet-1k'."""
    from timm.data import infer_imagenet_subset

    subset: str | None = infer_imagenet_subset({"num_classes": count})
    return subset


@functools.cache
def imagenet_labels(subset: str) -> tuple[str, ...]:
    """Names of ImageNet's classes: the first word for each synset, made different where two synsets share one."""
    found = _info(subset)
    lemmas = [found.index_to_description(i) for i in range(found.num_classes())]
    words = Counter(lemma.split(",")[0] for lemma in lemmas)
    counts = Counter(lemmas)
    names = []
    for lemma, synset in zip(lemmas, found.label_names(), strict=True):
        word = lemma.split(",")[0]
        names.append(word if words[word] == 1 else lemma if counts[lemma] == 1 else f"{lemma} ({synset})")
    return unique(names)


@functools.cache
def imagenet_synsets(labels: tuple[str, ...]) -> tuple[str, ...] | None:
    """WordNet ids ("n01440764") of labels that are ImageNet's as `imagenet_labels` names them; None for others."""
    subset = imagenet_subset(len(labels))
    return tuple(_info(subset).label_names()) if subset and imagenet_labels(subset) == labels else None


def _info(subset: str) -> Any:
    from timm.data import ImageNetInfo

    return ImageNetInfo(subset)


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Names made different by their number where two are equal: a bundle tells classes apart by name."""
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({i})" for i, name in enumerate(names))


def read_labels(path: str) -> tuple[str, ...]:
    """Class names of a text file, one a line. Raises ConfigError where it can't be read or names a class twice."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise ConfigError(f"--labels {path}: {reason}, expected a text file with a class name a line.") from error
    names = [line.strip() for line in lines]
    while names and not names[-1]:
        names.pop()
    twice = [name or "an empty line" for name, count in Counter(names).items() if count > 1 or not name]
    if twice or not names:
        found = f"{twice[0]} more than once or empty" if twice else "no name"
        raise ConfigError(f"--labels {path} holds {found}, expected one different name a line.")
    return tuple(names)
