"""`leanvit predict` on very many images: speed, memory at two sizes, order, and what kill -9 costs.

    python benchmarks/predict.py

Makes 20,000 small images (28 to 64 pixels, PNG and JPEG, 100 of them corrupt) in a temporary folder, packs the micro
ViT that was trained on Fashion-MNIST as a bundle, and runs the command in a process of its own: on 2,000 images, on
all, and on all again with kill -9 at random moments, each time gone on with by --resume, until it ends. Memory is the
most that the process held (VmHWM, Linux only). `images_per_second` counts the start of the process,
`images_per_second_after_start` compares the two sizes; `cpu_seconds` tell what a busy machine hides. About 2 minutes on
2 cores that have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
from PIL import Image

import leanvit.models  # noqa: F401 - registers vit_micro
from leanvit import export
from leanvit.bench import memory_megabytes
from leanvit.files import write_json
from measure import SEED, facts

RESULTS = Path(__file__).parent / "results" / "predict.json"
MODEL = "vit_micro"
FOLDERS = 20


def make_bundle(folder: Path) -> Path:
    """The packed micro model as a bundle."""
    model = timm.create_model(MODEL, pretrained=True).eval()
    return export(model, folder, labels=model.pretrained_cfg["label_names"])


def make_images(folder: Path, count: int, corrupt: int) -> list[Path]:
    """Write images into numbered folders, every so many of them cut short; returns the paths of the good ones."""
    rng = np.random.default_rng(SEED)
    good = []
    for number in range(count):
        path = folder / f"{number * FOLDERS // count:02}" / f"{number:06}{('.png', '.jpg')[number % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(28, 65, 2)
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        coarse.resize((int(width), int(height)), Image.Resampling.BICUBIC).save(path)
        if number % (count // corrupt) == count // corrupt // 2:
            path.write_bytes(path.read_bytes()[:150])
        else:
            good.append(path)
    return good


class Run:
    """One `leanvit predict` in a process of its own."""

    def __init__(self, bundle: Path, images: list[Path], output: Path) -> None:
        """Start it; it goes on with what is beside `output`."""
        names = [str(path) for path in images]
        command = [sys.executable, "-m", "leanvit", "predict", str(bundle), *names, "--format", "jsonl", "--resume"]
        self.draft = output.with_name(f"{output.name}.partial")
        self.peak_mib = 0.0
        self._started = time.monotonic()
        with open(output.with_suffix(".err"), "ab") as messages:
            self._process = subprocess.Popen([*command, "--output", str(output)], stderr=messages)

    def wait(self, kill_at: int | None = None) -> int:
        """Wait for its end, or kill it once `kill_at` bytes of results are there; returns its exit code."""
        while self._process.poll() is None:
            self.peak_mib = max(self.peak_mib, memory_megabytes("VmHWM", self._process.pid) or 0.0)
            if kill_at is not None and self.draft.exists() and self.draft.stat().st_size >= kill_at:
                self._process.kill()
                return self._process.wait()
            time.sleep(0.01)
        self.seconds = time.monotonic() - self._started
        return self._process.returncode


def children_cpu_seconds() -> float:
    """Processor time of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(bundle: Path, images: list[Path], good: list[Path], count: int, output: Path) -> dict[str, Any]:
    """One uninterrupted run."""
    load, cpu = os.getloadavg()[0], children_cpu_seconds()
    run = Run(bundle, images, output)
    code = run.wait()
    cpu = children_cpu_seconds() - cpu
    written = [json.loads(line)["path"] for line in output.read_text(encoding="utf-8").splitlines()]
    return {
        "images": count,
        "classified": len(written),
        "exit_code": code,
        "in_order_and_complete": written == [str(path) for path in good],
        "seconds": round(run.seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "images_per_second": round(count / run.seconds, 1),
        "peak_mib": round(run.peak_mib, 1),
        "load_average_before": round(load, 2),
    }


def measure_kills(bundle: Path, images: list[Path], whole: bytes, kills: int, output: Path) -> dict[str, Any]:
    """Kill a run at random moments, go on with it each time, and compare the files."""
    rng = random.Random(SEED)
    moments = sorted(rng.uniform(0.02, 0.98) for _ in range(kills))
    codes, noted = [], []
    for moment in moments:
        codes.append(Run(bundle, images, output).wait(int(moment * len(whole))))
        journal = output.with_name(f"{output.name}.partial.progress").read_text(encoding="utf-8")
        noted.append(max((json.loads(line).get("images", 0) for line in journal.split("\n")[1:]), default=0))
    code = Run(bundle, images, output).wait()
    return {
        "killed_at_share": [round(moment, 3) for moment in moments],
        "exit_codes_of_killed": codes,
        "images_noted_at_kill": noted,
        "exit_code": code,
        "file_equals_uninterrupted": output.read_bytes() == whole,
        "skipped_in_summary": output.with_suffix(".err").read_text(encoding="utf-8").splitlines()[-1],
        "left_beside_the_file": sorted(p.name for p in output.parent.iterdir() if p.name.startswith(f"{output.name}.")),
    }


def main() -> None:
    """Measure all and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--corrupt", type=int, default=100)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="leanvit-predict-"))
    try:
        bundle = make_bundle(folder / "bundle")
        good = make_images(folder / "images", options.images, options.corrupt)
        few = [folder / "images" / f"{number:02}" for number in range(FOLDERS // 10)]
        good_few = [path for path in good if path.parent in few]
        rows = [
            measure(bundle, few, good_few, options.images // 10, folder / "few.jsonl"),
            measure(bundle, [folder / "images"], good, options.images, folder / "all.jsonl"),
        ]
        first, second = rows
        pace = (second["images"] - first["images"]) / (second["seconds"] - first["seconds"])
        whole = (folder / "all.jsonl").read_bytes()
        killed = measure_kills(bundle, [folder / "images"], whole, options.kills, folder / "killed.jsonl")
    finally:
        shutil.rmtree(folder)
    result = {"images_per_second_after_start": round(pace, 1), "results": rows, "killed": killed}
    given = {"model": f"{MODEL}.fmnist, fp32", "corrupt": options.corrupt}
    # The command takes all cores; the threads that facts() tells are torch's in this process.
    write_json(options.output, {**given, **result, **facts(), "threads": os.cpu_count()})
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
