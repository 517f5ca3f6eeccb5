"""Is a file that is meant to be fast any faster than the same network in float? Measured where it is exported."""

from __future__ import annotations

import tempfile
from pathlib import Path

from leanvit.bench import RUNTIME_LABELS, benchmark, describe
from leanvit.config import Opset, Preprocess
from leanvit.errors import LeanvitError
from leanvit.export.gate.check import Check
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.profiles import Profile
from leanvit.quant import QuantizedModel
from leanvit.runtime.bundle import MODEL_NAME

FEWEST_MACS = 2**27
"""Of an image, below which calls and threads take a good part of the time: a file of a millisecond says little."""

MOST_MACS = 2**36
"""Of a batch of several images: above it one image is timed alone, as all runs would take minutes."""

BATCH_SIZES = (1, 8)
ROUNDS = 5


def check_speed(
    folder: Path, model: QuantizedModel, preprocess: Preprocess, profile: Profile, opset: Opset, minimum: float
) -> list[Check]:
    """The file in `folder` beside the one with every site in float, alternated on all cores in the profile's runtime.

    opset: of the file. minimum: least time in float over time of the file, at the batch size where that is larger; 0
    measures nothing.
    Returns no check for profiles that promise no speed.
    """
    if not profile.fast or not minimum:
        return []
    macs = sum(site.macs for site in model.graph.sites.values())
    expected = f"at least {minimum:g} times the same network in float"
    if macs < FEWEST_MACS:
        return [Check("speed", None, f"NOT verified: {macs / 1e6:.0f} million multiply-adds are too few", expected)]
    sizes = tuple(size for size in BATCH_SIZES if size == 1 or size * macs <= MOST_MACS)
    try:
        ratios, threads = _measured(folder, model, preprocess, profile, opset, sizes)
    except (LeanvitError, OSError, AssertionError) as error:
        # multiprocessing asserts that a daemon starts no process.
        found = f"NOT verified: it could not be timed here ({' '.join(str(error).split())[:200]})"
        return [Check("speed", None, found, expected, "Leave it out with --min-speedup 0.")]
    times = ", ".join(f"{ratio:.2f} times at batch {size}" for size, ratio in ratios.items())
    found = f"{times} ({RUNTIME_LABELS[profile.runtime]}, {threads} threads of this machine)"
    return [
        Check(
            "speed", max(ratios.values()) >= minimum, found, expected,
            "Use the float model here (leanvit export CHECKPOINT), compare profiles w8a8, exact and openvino (leanvit "
            "benchmark), or lower --min-speedup where the size alone is wanted.",
        )
    ]  # fmt: skip


def _measured(
    folder: Path,
    model: QuantizedModel,
    preprocess: Preprocess,
    profile: Profile,
    opset: Opset,
    sizes: tuple[int, ...],
) -> tuple[dict[int, float], int]:
    """{batch size: time in float over time of the file}, and the number of threads."""
    with tempfile.TemporaryDirectory() as scratch:
        float_file = Path(scratch) / "float.onnx"
        proto = lower(model.graph, preprocess, profile, tuple(model.plan), opset=opset)
        float_file.write_bytes(proto.SerializeToString())
        targets = [describe(file, profile.runtime) for file in (float_file, folder / MODEL_NAME)]
        timed = benchmark(targets, batch_sizes=sizes, rounds=ROUNDS)
    rows = [row for row in timed["results"] if Path(row["path"]).parent == folder]
    return {row["batch_size"]: row["ratio"] for row in rows}, timed["threads"]
