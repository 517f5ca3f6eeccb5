"""Read the bits that a search chose, give the worst sites more, and prove the file of the edited plan.

    python examples/edit_a_plan.py MODEL FOLDER OUTPUT

MODEL: what leanvit.load takes, such as vit_micro.fmnist. FOLDER: images. OUTPUT: folder for the bundle.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import leanvit
from leanvit import Budget, ExportOptions, MPTQConfig
from leanvit.data.sets import load_split
from leanvit.export.data import calibration_inputs

LIFTED = 2
"""Sites whose weights and activations get 8 bits."""


def main(model: str, folder: str, output: str, images: int = 128) -> None:
    """From a search for 4 bits on average, to the sites with the least signal over noise, to the edited plan's file."""
    network, info = leanvit.load(model)
    train = load_split(folder, "train")
    inputs = calibration_inputs(info, train, images, seed=0)
    config = MPTQConfig(budget=Budget(average_bits=4, levels=(8, 4)))
    found = leanvit.quantize(network, inputs, config)

    worst = [row["name"] for row in sorted(found.report["sites"], key=lambda row: float(row["sqnr_db"]))[:LIFTED]]
    print(f"8 bits for {' and '.join(worst)}")
    plan = {site: (8 if bits[0] else 0, 8) if site in worst else bits for site, bits in found.plan.items()}
    edited = leanvit.quantize(network, inputs, replace(config, budget=None), plan=plan)
    for name, one in (("searched", found), ("edited", edited)):
        report = one.report
        print(f"{name}: {report['average_bits']:.2f} bits, divergence {report['calibration']['kl_divergence']:.4f}")
    options = ExportOptions(min_speedup=0.0)  # a mix of bits is chosen for its size
    print(leanvit.export(edited, output, options, info=info, images=load_split(folder, "val")))


if __name__ == "__main__":
    main(*sys.argv[1:])
