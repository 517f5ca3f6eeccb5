"""Your photos, from training to a page that classifies in the browser, where no picture leaves the machine.

    python examples/photos_to_browser.py FOLDER OUTPUT

FOLDER: photos, one folder a class, or train/ and val/ with such folders in them. OUTPUT: folder for the trained
network, the proven bundle and the page. The page needs Node's npm once, which downloads onnxruntime-web.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import leanvit
from leanvit import ExportOptions
from leanvit.config import TrainConfig
from leanvit.data.sets import load_split
from leanvit.export.data import calibration_inputs
from leanvit.train import run
from leanvit.web.site import write_site


def main(folder: str, output: str, max_drop: float = 1.0, **training: Any) -> None:
    """From the photos to the network, to its 8-bit bundle, to the folder that any web server serves."""
    model = training.pop("model", "revit_micro")  # photographs want more pixels: vit_small_patch16_224 and its like
    result = run(TrainConfig(data=folder, model=model, output=f"{output}/train", hflip=0.5, **training))
    value = result.metrics[result.metric]
    print(f"trained: {value:.1f}% {result.metric}")

    network, info = leanvit.load(result.checkpoint)
    train, val = (load_split(folder, split) for split in ("train", "val"))
    quantized = leanvit.quantize(network, calibration_inputs(info, train, 128, seed=0))
    options = ExportOptions(max_drop=max_drop)  # points that 8 bits may lose, or there is no bundle
    bundle = leanvit.export(quantized, f"{output}/bundle", options, info=info, images=val, float_metric=value)
    accuracy = leanvit.Predictor(bundle).manifest.accuracy
    print(f"{bundle}: {accuracy['value']:.1f}% {accuracy['metric']} on {accuracy['images']} images")

    site = write_site(bundle, Path(output) / "page")
    print(f"{site.folder}: {site.bytes / 1e6:.1f} MB")
    print(f"look at it: leanvit web {bundle} {site.folder} --serve")


if __name__ == "__main__":
    main(*sys.argv[1:])
