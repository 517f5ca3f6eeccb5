"""A classifier of Hugging Face's transformers as a proven int8 bundle, and what both say of the same images.

    python examples/your_transformers_model.py MODEL FOLDER OUTPUT

MODEL: a folder that save_pretrained wrote, or a name of the hub, such as google/vit-base-patch16-224. FOLDER: images,
one folder a class. OUTPUT: folder for the bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

import leanvit
from leanvit import ExportOptions
from leanvit.data.sets import load_split
from leanvit.export.data import agreed_classes, calibration_inputs
from leanvit.image_paths import images_below


def main(model: str, folder: str, output: str, **options: Any) -> None:
    """From the folder of transformers to the bundle, to the label of each image by both."""
    network, info = leanvit.load(f"transformers:{model}")
    train, val = (load_split(folder, split) for split in ("train", "val"))
    _, val = agreed_classes(info.labels, val, folder)  # in the network's order
    quantized = leanvit.quantize(network, calibration_inputs(info, train, 128, seed=0))
    bundle = leanvit.export(quantized, output, ExportOptions(**options), info=info, images=val)
    accuracy = leanvit.Predictor(bundle).manifest.accuracy
    print(f"{bundle}: {accuracy['value']:.1f}% {accuracy['metric']} on {accuracy['images']} images")

    processor = AutoImageProcessor.from_pretrained(model)
    original = AutoModelForImageClassification.from_pretrained(model).eval()
    predictor = leanvit.Predictor(bundle)
    for path in sorted(images_below(Path(folder)))[:3]:
        (label, probability), *_ = predictor.predict(path, top_k=1)
        with torch.no_grad():
            logits = original(**processor(Image.open(path).convert("RGB"), return_tensors="pt")).logits
        theirs, likely = int(logits.argmax()), float(logits.softmax(1).max())
        print(f"{path}: {label} {100 * probability:.1f}%, by transformers "
              f"{original.config.id2label[theirs]} {100 * likely:.1f}%")  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
