"""A detector of your own: annotations in COCO's form in, a proven 8-bit bundle out, and what it finds in a picture.

    python examples/detector.py FOLDER OUTPUT PICTURE

FOLDER: COCO's (annotations/, train2017/, val2017/), or train.json and val.json beside their pictures in images/.
OUTPUT: folder for the trained network and the bundle. PICTURE: any picture. For practice, without a set of your own:

    leanvit data compose scenes --train 3000 --val 500 --size 128
"""

from __future__ import annotations

import sys
from typing import Any

import leanvit
from leanvit import ExportOptions
from leanvit.annotations.load import load_scenes
from leanvit.config import TrainConfig
from leanvit.export.data import calibration_inputs
from leanvit.quant.parts import quantize_network
from leanvit.train import run

SMALL: dict[str, Any] = {
    "model": "vitaev2_micro", "img_size": (128, 128), "epochs": 12, "lr": 2e-3, "channels": 64, "anchor_scale": 4.0,
    "head_width": 256, "proposals": 200, "sampled": 64, "detections": 30,
}  # fmt: skip
"""A network for small pictures and two cores; configs/tasks has larger ones."""


def main(folder: str, output: str, picture: str, max_drop: float = 1.0, least: float = 0.5, **training: Any) -> None:
    """From the annotations to the network, to its bundle with NMS inside, to the objects of the picture."""
    result = run(TrainConfig(task="detect", data=folder, output=f"{output}/train", **{**SMALL, **training}))
    value = result.metrics[result.metric]
    print(f"trained: {result.metric} {value:.4f}")

    network, info = leanvit.load(result.checkpoint)
    train, val = (load_scenes(folder, split) for split in ("train", "val"))
    quantized = quantize_network(network, info, calibration_inputs(info, train, 128, seed=0))
    options = ExportOptions(max_drop=max_drop)  # points of the metric that 8 bits may lose, or there is no bundle
    bundle = leanvit.export(quantized, f"{output}/bundle", options, info=info, images=val, float_metric=value)
    predictor = leanvit.Predictor(bundle)
    accuracy = predictor.manifest.accuracy
    print(f"{bundle}: {accuracy['metric']} {accuracy['value']:.4f} on {len(val.scenes)} pictures")

    for found in predictor.predict(picture, score_threshold=least):
        box = ", ".join(f"{edge:.0f}" for edge in found.box)
        print(f"{picture}: {info.labels[found.label]} {100 * found.score:.0f}% at {box}")


if __name__ == "__main__":
    main(*sys.argv[1:])
