"""Configuration of verbs about data."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.errors import ConfigError

DATA_KINDS = (
    "a folder (one folder a class, also below train/, val/, test/), FILE.csv, digits, fashion-mnist[:FOLDER], "
    "cifar10:ROOT, cifar100:ROOT, flowers102:ROOT, oxford-iiit-pet:ROOT, imagenet:ROOT, hf:NAME_OR_FOLDER, "
    "hf-download:NAME or wds:PATTERN"
)
"""What names labelled images, for help texts; docs/data.md says what each is."""

OR_ANNOTATED = "for the network of a task: annotated pictures, as `train --task` takes them"
"""What else names data where a checkpoint or bundle may be of a task."""

BadImages = Literal["fail", "skip"]
BAD_IMAGES = "What a corrupt image does; skipped ones are named, and then the exit code is 6."


@dataclass(frozen=True, kw_only=True)
class DataInspectConfig:
    """Look at every image of a data set: balance of classes, sizes, corrupt files, duplicates, a contact sheet."""

    data: str = option(MISSING, f"Labelled images: {DATA_KINDS}; {OR_ANNOTATED}.", positional=True)
    task: Literal["classify", "detect", "segment", "semantic", "pose"] = option(
        "classify", "What the data is for; all but classify look at annotated pictures and their annotations."
    )
    output: str = option("runs/inspect", "Folder for inspect.json and inspect.html.")
    images_per_class: int = option(
        8, "Pictures of each class on the contact sheet (of each part, for another task); 0: none."
    )
    val_fraction: float = option(0.2, "Share held out where the data has no validation part of its own.")
    seed: int = option(0, "Seed of that split, and of the pictures that are shown.")
    json: bool = option(False, "Print the result as JSON instead of tables.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        require_at_least(self, 0, "images_per_class", "seed")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction is {self.val_fraction}, expected between 0 and 1")
