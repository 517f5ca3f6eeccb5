"""Benchmarks that can be believed: warmed up, alternated, in processes of their own, with their spread.

Every runtime works in a process of its own (ONNX Runtime beside torch gives bimodal times), and the targets
take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, cast

import numpy as np

from leanvit import imaging
from leanvit.config import LoadOptions, Runtime
from leanvit.errors import ConfigError, LeanvitError, NumericalError
from leanvit.progress import Bar
from leanvit.runtime.bundle import MANIFEST_NAME, MODEL_NAME, load_golden, read_manifest, versions
from leanvit.runtime.engines import cpuinfo, open_engine, open_session, processor
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.task_of import CLASSIFY, task_of

MIN_TURN_SECONDS = 0.05
START_TIMEOUT_SECONDS = 300.0
MODEL_FILES = (".onnx", ".xml")
CHECKPOINT_NAME = "model.safetensors"
RUNTIME_LABELS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "openvino-bf16": "OpenVINO bf16"}


@dataclass(frozen=True)
class Target:
    """One thing to time. name: what the table calls it. path: bundle or checkpoint. bytes: of its model file.

    spec: what leanvit.load takes, of a network that is timed in PyTorch, and with which options.
    """

    name: str
    path: Path
    runtime: str
    precision: str
    bytes: int
    spec: str = ""
    options: LoadOptions = LoadOptions()  # noqa: RUF009 - it is frozen


def describe(path: str | Path, runtime: str = "onnxruntime", options: LoadOptions | None = None) -> Target:
    """Find out what a path is: a bundle or a model file (run in `runtime`), or a network (PyTorch eager).

    A model file is .onnx, or for OpenVINO .xml, with the input of a bundle: uint8 (batch, H, W, 3).

    options: of leanvit.load, for a network. Raises BundleError or CheckpointError where it is neither.
    """
    spec, path = str(path), Path(path)
    label = RUNTIME_LABELS.get(runtime, runtime)
    if path.suffix in MODEL_FILES:
        weights = path.with_suffix(".bin")
        size = path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" else 0)
        return Target(f"{path.stem}, {label}", path, runtime, path.suffix[1:], size)
    if (path / MANIFEST_NAME).is_file():
        manifest = read_manifest(path)
        size = (path / MODEL_NAME).stat().st_size
        return Target(f"{label}, {manifest.profile}", path, runtime, manifest.profile, size)
    from leanvit.load.api import load_classifier

    if path.is_file():
        size = path.stat().st_size
    elif (path / CHECKPOINT_NAME).is_file():
        size = (path / CHECKPOINT_NAME).stat().st_size
    else:
        size = sum(4 * tensor.numel() for tensor in load_classifier(spec, options)[0].state_dict().values())
    return Target("PyTorch eager, float32", path, "torch", "float32", size, spec, options or LoadOptions())


def machine() -> dict[str, Any]:
    """Fingerprint of the machine: processor, cores, the instructions that matter, system."""
    info = cpuinfo()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "asimddp", "i8mm")
    return {
        "cpu": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [name for name in wanted if name in info.get("flags", info.get("Features", "")).split()],
        "system": f"{platform.system()} {platform.machine()}",
    }


def benchmark(
    targets: list[Target], *, batch_sizes: tuple[int, ...] = (1, 32), threads: int = 0, rounds: int = 15
) -> dict[str, Any]:
    """Time every target at every batch size, alternated.

    Returns JSON values: machine, versions, date, and one result a target and batch size with the median and
    the 10th and 90th percentile in milliseconds a batch; `ratio` is the first target's median over this one's,
    `load_seconds` the time until a target can answer, `peak_megabytes` (MiB) the most memory its process has held,
    None where the system does not tell.
    Raises ConfigError without targets, NumericalError where a worker process dies.
    """
    if not targets:
        raise ConfigError("no targets to time. Give bundles or checkpoints: leanvit benchmark BUNDLE CHECKPOINT")
    threads = threads or int(machine()["cores"])
    workers: list[_Worker] = []
    try:
        for target in targets:
            workers.append(_Worker(target, threads))
        results: list[dict[str, Any]] = []
        with Bar("benchmark", rounds * len(batch_sizes)) as bar:
            for batch_size in batch_sizes:
                results += _time_batch(workers, batch_size, rounds, bar)
    finally:
        for worker in workers:
            worker.close()
    return {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "rounds": rounds,
        "results": results,
    }


def _time_batch(workers: list[_Worker], batch_size: int, rounds: int, bar: Bar) -> list[dict[str, Any]]:
    repeats = [worker.warm_up(batch_size) for worker in workers]
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        for index, worker in enumerate(workers):
            times[index] += worker.run(batch_size, repeats[index])
        bar.advance(detail=f"batch {batch_size}")
    reference = statistics.median(times[0])
    results = []
    for worker, seconds in zip(workers, times, strict=True):
        median = statistics.median(seconds)
        low, high = np.percentile(seconds, [10, 90])
        results.append(
            {
                "name": worker.target.name,
                "path": str(worker.target.path),
                "runtime": worker.target.runtime,
                "precision": worker.target.precision,
                "batch_size": batch_size,
                "runs": len(seconds),
                "median_ms": 1e3 * median,
                "p10_ms": 1e3 * float(low),
                "p90_ms": 1e3 * float(high),
                "images_per_second": batch_size / median,
                "ratio": reference / median,
                "load_seconds": worker.load_seconds,
                "peak_megabytes": worker.peak_megabytes(),
                "bytes": worker.target.bytes,
            }
        )
    return results


def _spawn(body: Callable[..., None], *arguments: Any) -> tuple[SpawnProcess, Connection]:
    """Run body(connection, *arguments) in a process of its own; returns the process and our end of the pipe."""
    # Spawned, not forked: a forked process would inherit torch and its threads from the caller.
    context = multiprocessing.get_context("spawn")
    connection, child = context.Pipe()
    process = context.Process(target=body, args=(child, *arguments), daemon=True)
    with _main_hidden():
        process.start()
    child.close()
    return process, connection


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep a spawned process from importing the script that starts it, and with it whatever that imports: torch."""
    main = sys.modules["__main__"]
    before = {name: vars(main)[name] for name in ("__file__", "__spec__") if name in vars(main)}
    try:
        for name in before:
            setattr(main, name, None)
        yield
    finally:
        for name, value in before.items():
            setattr(main, name, value)


def _end(process: SpawnProcess, connection: Connection) -> None:
    connection.close()
    process.join(5)
    if process.is_alive():
        process.kill()


class _Worker:
    """A process that holds one target and times it when asked."""

    def __init__(self, target: Target, threads: int) -> None:
        self.target = target
        self.process, self.connection = _spawn(_serve, target, threads)
        self.load_seconds: float = self._receive(START_TIMEOUT_SECONDS)

    def warm_up(self, batch_size: int) -> int:
        """Run until warm; returns how many runs make one turn long enough to time."""
        fastest = min(self.run(batch_size, 5))
        return max(1, min(50, round(MIN_TURN_SECONDS / fastest)))

    def run(self, batch_size: int, repeats: int) -> list[float]:
        """Seconds of each of `repeats` runs."""
        self.connection.send((batch_size, repeats))
        seconds: list[float] = self._receive(START_TIMEOUT_SECONDS)
        return seconds

    def peak_megabytes(self) -> float | None:
        """Most memory that the process has held, in MiB."""
        self.connection.send((0, 0))
        peak: float | None = self._receive(START_TIMEOUT_SECONDS)
        return peak

    def _receive(self, timeout: float) -> Any:
        if not self.connection.poll(timeout):
            raise NumericalError(f"{self.target.name}: no answer within {timeout:.0f} s. Try a smaller batch size.")
        try:
            kind, value = self.connection.recv()
        except EOFError as error:
            raise NumericalError(
                f"{self.target.name}: the process ended unexpectedly, perhaps out of memory. Try a smaller batch size."
            ) from error
        if kind == "error":
            raise value
        return value

    def close(self) -> None:
        """End the process."""
        _end(self.process, self.connection)


def _serve(connection: Connection, target: Target, threads: int) -> None:
    """Body of the worker process: load, then answer (batch size, repeats) with times until the pipe closes.

    Batch size 0 asks for the peak of the memory.
    """
    try:
        started = time.perf_counter()
        run = _load_torch(target, threads) if target.runtime == "torch" else _load_runtime(target, threads)
        connection.send(("ready", time.perf_counter() - started))
        while True:
            batch_size, repeats = connection.recv()
            if batch_size:
                connection.send(("times", _seconds(functools.partial(run, batch_size), repeats)))
            else:
                connection.send(("peak", memory_megabytes("VmHWM")))
    except (EOFError, KeyboardInterrupt):
        return
    except LeanvitError as error:
        connection.send(("error", error))


def memory_megabytes(key: str, process: int | str = "self") -> float | None:
    """What Linux says of a process's memory, in MiB; None elsewhere or where the process has ended.

    key: VmHWM, the most it has held, or VmRSS, what it holds.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)


def table_of_times(pairs: dict[str, tuple[Path, Path]], *, threads: int = 0, rounds: int = 15) -> dict[str, Any]:
    """Time pairs of ONNX files, float and 8-bit, in turns at batch 1, in a process without torch.

    Returns JSON values: machine, versions, date, threads, and sites: {key: {"float_ms", "int8_ms"}}, medians.
    Raises NumericalError where the process dies, BundleError where a file can't be loaded.
    """
    threads = threads or int(machine()["cores"])
    process, connection = _spawn(_serve_pairs, threads, rounds)
    sites: dict[str, dict[str, float]] = {}
    try:
        with Bar("latency table", len(pairs)) as bar:
            for key, files in pairs.items():
                connection.send(files)
                try:
                    found = connection.recv()
                except EOFError as error:
                    raise NumericalError(f"{key}: the timing process ended, perhaps out of memory.") from error
                if isinstance(found, LeanvitError):
                    raise found
                sites[key] = {"float_ms": found[0], "int8_ms": found[1]}
                bar.advance()
    finally:
        _end(process, connection)
    return {
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "threads": threads,
        "sites": sites,
    }


def _serve_pairs(connection: Connection, threads: int, rounds: int) -> None:
    """Body of the timing process: two files in, two medians in milliseconds out, until the pipe closes."""
    try:
        while True:
            runs = [_load_file(path, threads) for path in connection.recv()]
            repeats = [max(1, min(200, round(0.1 * MIN_TURN_SECONDS / min(_seconds(run, 5))))) for run in runs]
            times: list[list[float]] = [[] for _ in runs]
            for _ in range(rounds):
                for index, run in enumerate(runs):
                    times[index] += _seconds(run, repeats[index])
            connection.send([1e3 * statistics.median(seconds) for seconds in times])
    except (EOFError, KeyboardInterrupt):
        return
    except LeanvitError as error:
        connection.send(error)


def _load_file(path: Path, threads: int) -> Callable[[], Any]:
    session = open_session(path, threads)
    generator = np.random.default_rng(0)
    feed = {
        i.name: generator.standard_normal([d if isinstance(d, int) else 1 for d in i.shape], dtype=np.float32)
        for i in session.get_inputs()
    }
    return lambda: session.run(None, feed)


def _seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    # The first run of a turn finds the caches filled, and perhaps a core still held, by what was timed before it.
    run()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        found.append(time.perf_counter() - started)
    return found


def _load_runtime(target: Target, threads: int) -> Callable[[int], Any]:
    runtime = cast("Runtime", target.runtime)
    if target.path.suffix not in MODEL_FILES and task_of(target.path) == CLASSIFY:
        predictor, images = Predictor(target.path, threads=threads, runtime=runtime), images_of(target)
        return lambda batch_size: predictor.logits(take_images(images, batch_size))
    engine = open_engine(model_file(target), runtime, threads)
    pictures = images_of(target, engine.input_size)
    return lambda batch_size: engine(take_images(pictures, batch_size))


def model_file(target: Target) -> Path:
    """The file that a target's runtime opens."""
    return target.path if target.path.suffix in MODEL_FILES else target.path / MODEL_NAME


def images_of(target: Target, size: tuple[int, int] | None = None) -> Any:
    """Images (N, H, W, C) uint8 to time a target with: noise, and of a task's bundle its golden pictures.

    In noise a detector finds nothing, and is done too soon. size: (height, width) that a model file takes; None opens
    the file to ask it.
    """
    generator = np.random.default_rng(0)
    if target.path.suffix in MODEL_FILES:
        size = size or open_engine(target.path, cast("Runtime", target.runtime)).input_size
        return generator.integers(0, 256, (64, *size, 3), dtype=np.uint8)
    preprocess = read_manifest(target.path).preprocess
    if task_of(target.path) == CLASSIFY:
        return generator.integers(0, 256, (256, *preprocess.input_size, preprocess.channels), dtype=np.uint8)
    return np.stack([imaging.load(image, preprocess, "golden picture") for image in load_golden(target.path)[0]])


def take_images(images: Any, batch_size: int) -> Any:
    """So many of the images, again from the first where there are too few."""
    return images[:batch_size] if batch_size <= len(images) else np.resize(images, (batch_size, *images.shape[1:]))


def _load_torch(target: Target, threads: int) -> Callable[[int], Any]:
    import torch

    from leanvit.data.loader import to_input
    from leanvit.load.api import load_classifier

    torch.set_num_threads(threads)
    model, info = load_classifier(target.spec, target.options)
    size = info.preprocess.input_size
    images = torch.randint(0, 256, (256, *size, info.preprocess.channels), dtype=torch.uint8)

    def run(batch_size: int) -> None:
        # Normalisation is inside the exported graph, so it is timed here as well.
        chosen = (
            images[:batch_size] if batch_size <= 256 else images.repeat(batch_size // 256 + 1, 1, 1, 1)[:batch_size]
        )
        with torch.inference_mode():
            model(to_input(chosen, info.preprocess))

    return run
