"""Data sets: a specification such as 'digits', a folder or wds:PATTERN becomes labelled images, read when needed."""

from leanvit.data.sets.image_set import SPLITS, Encoded, ImageSet, Parts, Source, Split, hold_out
from leanvit.data.sets.local import FASHION_MNIST_FOLDER
from leanvit.data.sets.specs import KINDS, find_parts, load_split

__all__ = [
    "FASHION_MNIST_FOLDER",
    "KINDS",
    "SPLITS",
    "Encoded",
    "ImageSet",
    "Parts",
    "Source",
    "Split",
    "find_parts",
    "hold_out",
    "load_split",
]
