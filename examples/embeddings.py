"""Images that look alike: a network without a classifier as a proven int8 bundle, and the nearest images of one.

    python examples/embeddings.py MODEL FOLDER OUTPUT

MODEL: what leanvit.load takes, such as vit_small_patch14_dinov2.lvd142m; a classifier is taken without its head.
FOLDER: images, one folder a class. OUTPUT: folder for the bundle.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import leanvit
from leanvit.config import ExportOptions
from leanvit.data.sets import load_split
from leanvit.export.data import calibration_inputs
from leanvit.image_paths import images_below
from leanvit.runtime.neighbours import nearest


def main(model: str, folder: str, output: str) -> None:
    """From the network to its bundle, to the vectors of all images, to the neighbours of the first."""
    network, info = leanvit.load(model)
    if info.task != "embed":
        network.reset_classifier(0)
        info = replace(info, task="embed", labels=())

    train, val = (load_split(folder, split) for split in ("train", "val"))
    quantized = leanvit.quantize(network, calibration_inputs(info, train, 128, seed=0))
    bundle = leanvit.export(quantized, output, ExportOptions(normalize=True), info=info, images=val)
    print(f"{bundle}: the neighbours of an image call it by its label in {100 * accuracy(bundle):.1f}%")

    predictor = leanvit.Predictor(bundle)
    paths = sorted(images_below(Path(folder)))
    vectors = np.stack([predictor.predict(path) for path in paths])
    places, cosines = nearest(vectors[:1], vectors, 4)
    for place, cosine in zip(places[0], cosines[0], strict=True):
        print(f"{cosine:.4f} {paths[place]}")


def accuracy(bundle: Path) -> float:
    """What was measured in the runtime, as the bundle keeps it."""
    return float(leanvit.Predictor(bundle, check=False).manifest.accuracy["value"])


if __name__ == "__main__":
    main(*sys.argv[1:])
