"""What the benchmarks share: memory of one run in a process of its own, and where a result comes from."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from leanvit.bench import machine, memory_megabytes
from leanvit.quant.memory import give_back
from leanvit.runtime.bundle import versions

SEED = 0


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments) in a new interpreter. Raises BrokenProcessPool where the system kills it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run_with_peak(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What run() returns, the megabytes (MiB) it adds to the memory in use, and the peak of the whole process.

    Linux only. The kernel's high-water mark VmHWM is set back before; `ru_maxrss` can't be, and a child even
    inherits it from its parent.
    """
    gc.collect()
    # Free memory that the allocator still holds would hide as much of what the run needs.
    give_back()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _status("VmRSS")
    result = run()
    peak = _status("VmHWM")
    return result, peak - before, peak


def _status(key: str) -> float:
    found = memory_megabytes(key)
    if found is None:
        raise RuntimeError(f"/proc/self/status has no {key}: memory is measured on Linux only")
    return found


def facts() -> dict[str, Any]:
    """Machine and how busy it is, versions, commit, time and seed."""
    command = ["git", "rev-parse", "HEAD"]
    commit = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False).stdout
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit.strip() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def merged(path: Path, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The rows stored in `path`, renewed by these where they agree in `keys`, and the others of these."""
    stored = json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else []
    by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in [*stored, *rows]:
        by_key.setdefault(tuple(row[key] for key in keys), {}).update(row)
    return list(by_key.values())
