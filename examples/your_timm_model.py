"""A network of timm with your own weights: the fastest file that holds its accuracy, and what that says of an image.

    python examples/your_timm_model.py MODEL WEIGHTS FOLDER OUTPUT

MODEL: a name of timm, such as vit_small_patch16_224. WEIGHTS: what timm's trainer or torch.save wrote, such as
model_best.pth.tar. FOLDER: images, one folder a class, or photographs without classes. OUTPUT: folder for the bundle.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import leanvit
from leanvit import LoadOptions
from leanvit.image_paths import images_below


def main(model: str, weights: str, folder: str, output: str, **options: Any) -> None:
    """From the weights to the bundle, to a line a file that was tried, to the labels of the first image."""
    network, info = leanvit.load(weights, LoadOptions(model_name=model))
    bundle = leanvit.optimize(network, folder, output, info=info, **options)

    result = json.loads((Path(output) / "optimize.json").read_text())
    for row in result["files"]:
        if row["state"] == "made":
            time, accuracy = min(row["milliseconds"].values()), result["points"] * row["metric"]
            print(f"{row['name']}: {accuracy:.1f}% {result['metric']}, {row['bytes'] / 1e6:.2f} MB, {time:.2f} ms")
    print(f"{bundle} holds {result['best']}")

    image = min(images_below(Path(folder)))
    for label, probability in leanvit.Predictor(bundle).predict(image, top_k=2):
        print(f"{image}: {label} {100 * probability:.1f}%")


if __name__ == "__main__":
    main(*sys.argv[1:])
