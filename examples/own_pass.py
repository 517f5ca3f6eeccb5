"""A pass of your own, run with leanvit's: the classifier's bias takes the mean error of the logits.

    python examples/own_pass.py MODEL FOLDER

MODEL: a classifier that leanvit.load takes, whose last linear is called `head`. FOLDER: images.
"""

from __future__ import annotations

import sys

import torch

import leanvit
from leanvit import MPTQConfig
from leanvit.data.sets import load_split
from leanvit.export.data import calibration_inputs
from leanvit.quant import Pass, Work


@torch.no_grad()
def centre(work: Work) -> None:
    """What the pass does, after the quantizers are set; what it puts into notes comes into the report."""
    if work.quantized is None:
        return  # in the stages before "after" there are no quantizers yet
    error = work.graph.module(work.images).mean(0) - work.quantized.module(work.images).mean(0)
    work.quantized.module.get_parameter("head.bias").add_(error)
    work.notes["centre"] = {"largest": float(error.abs().max())}


CENTRE = Pass("centre", "logits without a mean error", "ours", "after", centre)


def main(model: str, folder: str, images: int = 128) -> None:
    """The same network at 4 bits with the pass and without."""
    network, info = leanvit.load(model)
    inputs = calibration_inputs(info, load_split(folder, "train"), images, seed=0)
    four = MPTQConfig(weight_bits=4, activation_bits=4)
    with_pass = MPTQConfig(weight_bits=4, activation_bits=4, passes=("own_pass:CENTRE",))
    for name, config in (("without", four), ("with", with_pass)):
        report = leanvit.quantize(network, inputs, config).report
        print(f"{name}: divergence {report['calibration']['kl_divergence']:.5f}, {report.get('centre', '')}")


if __name__ == "__main__":
    main(*sys.argv[1:])
