"""Digests of the micro models' bundles: a change that must not alter results gives the same list before and after.

    python benchmarks/digests.py --output before.json                    all (about 10 minutes)
    python benchmarks/digests.py --output after.json --against before.json
    python benchmarks/digests.py --models vit_micro --tasks --output some.json

Works through the command line alone, so that PYTHONPATH decides which tree is measured. Classifiers have their own
weights and are quantized on Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist). Networks of the tasks are
trained for one epoch on composed pictures, once: --work keeps them, and a second tree is measured on the same weights.
Exit code 1 where a file of --against is missing or differs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

MODELS = (
    "vit_micro", "deit_micro", "swin_micro", "revit_micro", "reswin_micro", "exmobilevit_micro", "vitae_micro",
    "vitaev2_micro",
)  # fmt: skip
PROFILES = {"w8a8": ("w8a8", "openvino", "exact", "w4a16", "accelerator"), "w4a8": ("w4a8", "mixed")}
HEADS = {
    "detect": "--channels 16 --anchor-scale 2 --head-width 32 --proposals 40 --sampled 24 --detections 12",
    "segment": "--channels 16 --anchor-scale 2 --head-width 32 --proposals 40 --sampled 24 --detections 12 "
    "--mask-width 16 --mask-layers 2",
    "semantic": "--decoder fpn --decoder-width 64",
    "pose": "--decoder-width 32",
}
FILES = ("model.onnx", "golden.npz")
"""bundle.json and verify.json say versions and what was found in words, which a change may word anew."""


REJECTED = 5
"""Exit code of the gate. A file that a CPU can't run well is written all the same: OpenVINO saturates without VNNI."""


def leanvit(*words: object, may_be_rejected: bool = False) -> int:
    """Run one verb; returns its exit code, raises CalledProcessError where it fails."""
    print("leanvit", *words, file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "leanvit", *map(str, words)]
    done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    if not (may_be_rejected and done.returncode == REJECTED):
        done.check_returncode()
    return done.returncode


@functools.cache
def without_names() -> tuple[str, ...]:
    """Flags that leave names out of files, in trees that write them: names say nothing of results."""
    command = [sys.executable, "-m", "leanvit", "export", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return ("--smallest",) if "--smallest" in told.stdout else ()


def export(model: object, bundle: Path, *words: object) -> dict[str, str]:
    """Write a bundle; SHA-256 of what it computes and of what it was compared with."""
    if leanvit("export", model, *words, *without_names(), "--output", bundle, may_be_rejected=True):
        bundle = bundle.with_name(f"{bundle.name}.rejected")
    return {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest() for name in FILES}


def classifiers(models: list[str], work: Path) -> dict[str, dict[str, str]]:
    found = {}
    for model in models:
        tag, bundle = f"{model}.fmnist", work / "bundle"
        found[f"{model} fp32"] = export(tag, bundle)
        for scheme, profiles in PROFILES.items():
            quantized, bits = work / f"{model}-{scheme}", scheme[1]
            leanvit("quantize", tag, "--data", "fashion-mnist", "--weight-bits", bits, "--output", quantized)
            for profile in profiles:
                how = ("--profile", profile, "--min-speedup", 0)
                found[f"{model} {scheme} {profile}"] = export(quantized, bundle, *how)
    return found


def tasks(names: list[str], kept: Path, work: Path) -> dict[str, dict[str, str]]:
    found, scenes = {}, kept / "scenes"
    if names and not scenes.is_dir():
        leanvit("data", "compose", scenes, "--train", 32, "--val", 8, "--size", 64, "--classes", "groups")
    for task in names:
        run = kept / task
        if not (run / "model.safetensors").is_file():
            flags = "--model mobilenetv3_small_050 --epochs 10 --batch-size 8 --img-size 64 64 --lr 3e-3 --amp none"
            leanvit("train", "--task", task, "--data", scenes, "--output", run, *flags.split(), *HEADS[task].split())
        quantized, bundle = work / f"{task}-w8a8", work / "bundle"
        found[f"{task} fp32"] = export(run, bundle)
        leanvit("quantize", run, "--data", scenes, "--calibration-images", 32, "--output", quantized)
        found[f"{task} w8a8"] = export(quantized, bundle, "--min-speedup", 0)
    return found


def main() -> int:
    """Measure, write, and compare where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--tasks", nargs="*", default=list(HEADS))
    parser.add_argument("--work", type=Path, default=Path("runs/digests"), help="keeps the tasks' checkpoints")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--against", type=Path)
    arguments = parser.parse_args()
    work = arguments.work / arguments.output.stem
    found = classifiers(arguments.models, work) | tasks(arguments.tasks, arguments.work, work)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    if not arguments.against:
        return 0
    before = json.loads(arguments.against.read_text())
    different = [case for case in before if case.rsplit(" ")[0] in {c.split(" ")[0] for c in found}]
    different = [case for case in different if found.get(case) != before[case]]
    print(f"{len(found)} bundles, {len(different)} differ", *different, sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
