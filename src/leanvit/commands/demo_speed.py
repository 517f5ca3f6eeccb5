"""The last part of leanvit demo: what 8 bits give a network of the size that people ship, on this machine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from leanvit.bench import RUNTIME_LABELS, benchmark, describe
from leanvit.checkpoint import preprocess_for
from leanvit.config import MPTQConfig
from leanvit.data.loader import to_input
from leanvit.export.gate.golden import synthetic_images
from leanvit.export.onnx.lower import lower
from leanvit.files import write_json
from leanvit.quant import quantize
from leanvit.quant.graph import trace
from leanvit.runtime.engines import available

FILE = "speed.json"
MODEL = "vit_small_patch16_224"
TITLE = "A ViT-S at 224 px on this machine (random weights, so speed only)"
BATCH_SIZES = (1, 8)
PROFILES = {"onnxruntime": "w8a8", "openvino": "openvino"}
"""Runtimes that are timed where they are installed, and the profile that is meant for each."""
ROUNDS = 7
SCHEME = MPTQConfig(range_search=False, ratio_search=False)
"""Ranges of smooth noise are nothing to search for, and the files run as fast."""


def time_vit_small(folder: Path) -> dict[str, Any]:
    """Time a ViT-S at 224 px, float32 against W8A8, in every installed runtime; into folder/speed.json.

    Its weights are random and its images smooth noise: times depend on shapes only. Returns what bench.benchmark
    does, each result with `speedup` over the float32 file of the same runtime.
    """
    torch.manual_seed(0)
    model = timm.create_model(MODEL).eval()
    preprocess = preprocess_for(model)
    pixels = np.stack(synthetic_images(8, preprocess.input_size))
    images = to_input(torch.from_numpy(pixels), preprocess)
    runtimes = [runtime for runtime in PROFILES if runtime in available()]
    with tempfile.TemporaryDirectory(prefix="leanvit-demo-") as scratch:
        graphs = {"fp32": trace(model, images[:2])}
        graphs |= dict.fromkeys((PROFILES[runtime] for runtime in runtimes), quantize(model, images, SCHEME).graph)
        files = {profile: Path(scratch) / f"{profile}.onnx" for profile in graphs}
        for profile, graph in graphs.items():
            files[profile].write_bytes(lower(graph, preprocess, profile).SerializeToString())
        pairs = [(files[profile], runtime) for runtime in runtimes for profile in ("fp32", PROFILES[runtime])]
        timings = benchmark([describe(*pair) for pair in pairs], batch_sizes=BATCH_SIZES, rounds=ROUNDS)
    _compare(timings["results"], len(pairs))
    write_json(folder / FILE, timings)
    return timings


def _compare(results: list[dict[str, Any]], targets: int) -> None:
    """Name each result as people do, and set beside it how much faster than the runtime's own float32 file it is."""
    for i, result in enumerate(results):
        int8 = i % targets % 2
        result["name"] = f"ViT-S, {'W8A8' if int8 else 'float32'}, {RUNTIME_LABELS[result['runtime']]}"
        result["speedup"] = results[i - int8]["median_ms"] / result["median_ms"]


def format_rows(timings: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and cells of the table of speed."""
    results = timings["results"]
    targets = len(results) // len(BATCH_SIZES)
    columns = ["file", "size", *(f"batch {size}, {unit}" for size in BATCH_SIZES for unit in ("time", "speed"))]
    cells = []
    for i in range(targets):
        rows = results[i::targets]
        times = [cell for row in rows for cell in (f"{row['median_ms']:.1f} ms", f"{row['speedup']:.2f}x")]
        cells.append([rows[0]["name"].removeprefix("ViT-S, "), f"{rows[0]['bytes'] / 1e6:.1f} MB", *times])
    return columns, cells
