"""Is a file that is meant to be fast any faster than the same network in float? Measured where it is exported."""

from __future__ import annotations

import tempfile
from pathlib import Path

from leanvit.bench import RUNTIME_LABELS, benchmark, describe
from leanvit.config import Opset
from leanvit.errors import LeanvitError
from leanvit.export.gate.check import Check
from leanvit.export.network import Exported
from leanvit.runtime.bundle import MODEL_NAME

FEWEST_MACS = 2**27
"""Of an image, below which calls and threads take a good part of the time: a file of a millisecond says little."""

MOST_MACS = 2**36
"""Of a batch of several images: above it one image is timed alone, as all runs would take minutes."""

BATCH_SIZES = (1, 8)
"""One image, as a server gets it, and as many as fill the cores."""

ROUNDS = 5
"""Turns of each file: a median of fewer is moved by one busy moment."""


def check_speed(folder: Path, subject: Exported, opset: Opset, minimum: float) -> list[Check]:
    """The file in `folder` beside the one with every site in float, alternated on all cores in the profile's runtime.

    subject: the quantized network of which the file was written. opset: of the file. minimum: least time in float over
    time of the file, at the batch size where that is larger; 0 measures nothing.
    Returns no check for profiles that promise no speed.
    """
    if not subject.profile.fast or not minimum:
        return []
    # Of a network in several parts each counts once, however many objects there are: at least so many are computed.
    macs = sum(site.macs for graph in subject.graphs.values() for site in graph.sites.values())
    expected = f"at least {minimum:g} times the same network in float"
    if macs < FEWEST_MACS:
        return [Check("speed", None, f"NOT verified: {macs / 1e6:.0f} million multiply-adds are too few", expected)]
    sizes = tuple(size for size in BATCH_SIZES if size == 1 or size * macs <= MOST_MACS)
    try:
        ratios, threads = _measured(folder, subject, opset, sizes)
    except (LeanvitError, OSError, AssertionError) as error:
        # multiprocessing asserts that a daemon starts no process.
        found = f"NOT verified: it could not be timed here ({' '.join(str(error).split())[:200]})"
        return [Check("speed", None, found, expected, "Leave it out with --min-speedup 0.")]
    times = ", ".join(f"{ratio:.2f} times at batch {size}" for size, ratio in ratios.items())
    found = f"{times} ({RUNTIME_LABELS[subject.profile.runtime]}, {threads} threads of this machine)"
    return [
        Check(
            "speed", max(ratios.values()) >= minimum, found, expected,
            "Use the float model here (leanvit export CHECKPOINT), compare profiles w8a8, exact and openvino (leanvit "
            "benchmark), or lower --min-speedup where the size alone is wanted.",
        )
    ]  # fmt: skip


def _measured(folder: Path, subject: Exported, opset: Opset, sizes: tuple[int, ...]) -> tuple[dict[int, float], int]:
    """{batch size: time in float over time of the file}, and the number of threads."""
    with tempfile.TemporaryDirectory() as scratch:
        float_file = Path(scratch) / "float.onnx"
        float_file.write_bytes(subject.in_onnx(subject.plan, opset).SerializeToString())
        targets = [describe(file, subject.profile.runtime) for file in (float_file, folder / MODEL_NAME)]
        timed = benchmark(targets, batch_sizes=sizes, rounds=ROUNDS)
    rows = [row for row in timed["results"] if Path(row["path"]).parent == folder]
    return {row["batch_size"]: row["ratio"] for row in rows}, timed["threads"]
