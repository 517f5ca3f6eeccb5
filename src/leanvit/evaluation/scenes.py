"""A model measured over annotated pictures: on them as they are, corrupted and shifted; for every task with scenes.

Pictures are corrupted and shifted as the network sees them, after they were brought to its input. The annotations stay:
where an input is shifted, what is found in it is moved back, so it is compared in the picture's own pixels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from leanvit import imaging
from leanvit.annotations import Scene, SceneSet
from leanvit.annotations.load import load_scenes, note_problems, require_classes
from leanvit.config import Padding, Preprocess, ValConfig, save_yaml
from leanvit.errors import ConfigError, DataError, ImageError
from leanvit.evaluation.corruptions import corrupt, parameter_set
from leanvit.evaluation.measure import shifts_at, translate
from leanvit.evaluation.plan import RESULT_NAME, Json, batch_size_of, check_shifts, conditions, origin, passes
from leanvit.evaluation.subject import Subject
from leanvit.files import only_writer, write_json
from leanvit.passed_over import left_out
from leanvit.progress import Bar, print_table
from leanvit.runtime.inputs import Inputs, Options, Place, moved
from leanvit.runtime.predict import DECODERS, in_order
from leanvit.runtime.task import Batch, Task, measure_task

MEMORY_LIMIT_BYTES = 2 * 2**30
"""Prepared inputs are held between passes up to this size, as the trainer's loader of pictures holds its own."""

Pixels = imaging.Pixels
Change = Callable[[Pixels, int], Pixels]
"""What is done to prepared inputs (N, H, W, 3) uint8; the number is that of the first among all inputs."""


@dataclass
class SceneReader:
    """Annotated pictures as prepared network inputs, batch by batch, again for every pass.

    scenes: the pictures that can be read, once the reader is there. bad: paths of the others, where they are skipped.
    Raises ImageError for a picture that can't be read where they are not, DataError where none can.
    """

    scenes: SceneSet
    task: Task
    preprocess: Preprocess
    batch_size: int
    skip: bool = False
    bad: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Read all pictures where their inputs need no more than 2 GiB; find the bad ones where they are skipped."""
        given = self.task.given
        self.inputs = sum(len(given(scene)) if given else 1 for scene in self.scenes.scenes)
        if not self.inputs:
            raise DataError(f"{self.scenes.name}: nothing that task {self.task.name} is measured on, expected some.")
        height, width = self.preprocess.input_size
        fits = self.inputs * height * width * 3 <= MEMORY_LIMIT_BYTES
        self._kept: list[Inputs] | None = None
        if not (fits or self.skip):
            return
        good: list[int] = []
        kept: list[Inputs] = []
        count = 0
        for number, inputs in enumerate(self._decoded()):
            if inputs is None:
                continue
            good.append(number)
            count += len(inputs.images)
            # All of a large set would not fit.
            if fits:
                kept.append(_numbered(inputs, len(kept)))
        if not good:
            raise DataError(
                f"{self.scenes.name}: none of {len(self.bad)} pictures can be read: {self.bad[0]}. Replace the files."
            )
        left_out(self.bad, f"pictures of {self.scenes.name} that can't be read")
        self.scenes = replace(self.scenes, scenes=tuple(self.scenes.scenes[number] for number in good))
        self.inputs = count
        self._kept = kept if fits else None

    @property
    def data(self) -> SceneSet:
        """The pictures that can be read."""
        return self.scenes

    def __len__(self) -> int:
        """Batches of a pass."""
        return -(-self.inputs // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Pixels, list[Place]]]:
        """Inputs (B, H, W, 3) uint8 and their places, in the order of the pictures."""
        singles = (
            (image, where)
            for inputs in (self._decoded() if self._kept is None else self._kept)
            if inputs is not None
            for image, where in zip(inputs.images, inputs.places, strict=True)
        )
        while batch := list(islice(singles, self.batch_size)):
            yield np.stack([image for image, _ in batch]), [where for _, where in batch]

    def _decoded(self) -> Iterator[Inputs | None]:
        """The inputs of every picture, decoded in threads; None for one that can't be read."""
        pool = ThreadPoolExecutor(DECODERS, "decode")
        try:
            yield from in_order(pool, self._try, range(len(self.scenes.scenes)), 2 * self.batch_size)
        finally:
            pool.shutdown(cancel_futures=True)

    def _try(self, number: int) -> Inputs | None:
        scene = self.scenes.scenes[number]
        try:
            return _numbered(inputs_of(scene, self.task, self.preprocess), number)
        except ImageError as error:
            if not self.skip:
                raise ImageError(f"{error} To leave such images out: --bad-images skip") from error
            self.bad.append(str(scene.path))
            return None


def inputs_of(scene: Scene, task: Task, preprocess: Preprocess) -> Inputs:
    """What the network sees of one annotated picture; for pose a crop for each object that is measured.

    Raises ImageError for a picture that can't be read, or has another size than its annotations say.
    """
    pixels = imaging.decode(scene.path).pixels
    if pixels.shape[:2] != scene.size:
        found, expected = ("{1} x {0}".format(*size) for size in (pixels.shape, scene.size))
        raise ImageError(
            f"{scene.path}: {found} pixels, expected {expected} as its annotations say. "
            "Correct the annotations, or give the picture they were made for."
        )
    if task.given is None:
        return task.inputs(pixels, preprocess, Options())
    numbers = task.given(scene)
    made = task.inputs(pixels, preprocess, Options(boxes=[scene.instances[number].box for number in numbers]))
    places = (replace(where, instance=numbers[where.instance]) for where in made.places)
    return replace(made, places=tuple(places))


def _numbered(inputs: Inputs, index: int) -> Inputs:
    return replace(inputs, places=tuple(replace(where, index=index) for where in inputs.places))


def read_scenes(config: ValConfig, task: Task) -> SceneSet:
    """The annotated pictures of a configuration: all of its split, or `limit` of them drawn by its seed."""
    if config.split == "test":
        raise ConfigError("split is test, expected val or train: annotated pictures have these two")
    scenes = load_scenes(config.data, config.split, task=task.annotations)
    note_problems(scenes)
    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(scenes.scenes))[: config.limit])
    return replace(scenes, scenes=tuple(scenes.scenes[number] for number in drawn.tolist()))


class Reader(Protocol):
    """Prepared network inputs of a data set, again for every pass."""

    @property
    def data(self) -> Any:
        """What the task's metric is measured on: an ImageSet or SceneSet, in which places count."""

    @property
    def bad(self) -> list[str]:
        """Names of the pictures that can't be read."""

    @property
    def batch_size(self) -> int:
        """Inputs that run at a time."""

    @property
    def inputs(self) -> int:
        """Network inputs of a pass."""

    def __len__(self) -> int:
        """Batches of a pass."""

    def __iter__(self) -> Iterator[tuple[Pixels, list[Place]]]:
        """Inputs (B, H, W, 3) uint8 and their places."""


@dataclass
class _Work:
    """One measurement on its way; seconds: that the model itself took for the inputs as they are."""

    config: ValConfig
    subject: Subject
    reader: Reader
    bar: Bar
    seconds: float = 0.0

    def metrics(self, what: str, change: Change | None = None, shift: tuple[int, int] = (0, 0)) -> Json:
        """The task's metrics on changed inputs; shift: by which the change moved them, down and right."""
        batches = self._batches(what, change, shift)
        return measure_task(self.subject.task, self.reader.data, batches, self.subject.thresholds)

    def _batches(self, what: str, change: Change | None, shift: tuple[int, int]) -> Iterator[Batch]:
        done, size = 0, self.subject.preprocess.input_size
        for pixels, places in self.reader:
            changed = change(pixels, done) if change else pixels
            started = time.perf_counter()
            outputs = self.subject.outputs(np.ascontiguousarray(changed))
            self.seconds += time.perf_counter() - started
            done += len(pixels)
            self.bar.advance(detail=what)
            yield outputs, [moved(where, *shift, size) for where in places] if any(shift) else places


def measure_scenes(config: ValConfig, subject: Subject) -> Json:
    """The task's metrics of a model, and with them what `config` asks for beside them (docs/evaluate.md).

    With `config.output` the folder has val.json and config.yaml, saved whenever a part is done.
    Raises DataError for the data, ConfigError, RunLockedError where another process writes to the folder.
    """
    check_shifts(config, subject)
    scenes = read_scenes(config, subject.task)
    require_classes(subject.labels, scenes)
    with only_writer(config.output) if config.output else contextlib.nullcontext():
        batch_size = batch_size_of(config, subject)
        reader = SceneReader(scenes, subject.task, subject.preprocess, batch_size, config.bad_images == "skip")
        return measure_read(config, subject, reader)


def measure_read(config: ValConfig, subject: Subject, reader: Reader) -> Json:
    """The same of inputs of any kind of data, as a reader hands them over."""
    with Bar("evaluating", len(reader) * passes(config)) as bar:
        return _measure(_Work(config, subject, reader, bar))


def _measure(work: _Work) -> Json:
    metrics = work.metrics("pictures as they are")
    result: Json = dict(metrics)
    if work.reader.bad:
        result["left_out"] = sorted(work.reader.bad)
    if work.config.detailed:
        result["throughput"] = _throughput(work)
    _save(work, metrics, result, complete=False)
    for name, measure in (("corruptions", _corrupted), ("shifts", _shifted)):
        for part in measure(work, metrics):
            result[name] = part
            _save(work, metrics, result, complete=False)
    _save(work, metrics, result, complete=True)
    return result


def _save(work: _Work, metrics: Json, result: Json, *, complete: bool) -> None:
    if not work.config.output:
        return
    folder, task = Path(work.config.output), work.subject.task
    more = {key: value for key, value in result.items() if key not in metrics and key != "left_out"}
    known = origin(work.config, work.subject, work.reader.data.name, sorted(work.reader.bad))
    told = {"task": task.name, "metric": task.metric, "metrics": metrics, "complete": complete}
    save_yaml(work.config, folder / "config.yaml")
    write_json(folder / RESULT_NAME, known | told | more)


def _throughput(work: _Work) -> Json:
    """Inputs a second of the model's calls in this process: a hint, `leanvit benchmark` measures with care."""
    return {
        "images_per_second": work.reader.inputs / max(work.seconds, 1e-9),
        "images": work.reader.inputs,
        "batch_size": work.reader.batch_size,
        "threads": work.subject.threads,
        "runtime": work.subject.runtime,
        "simulated": work.subject.simulated,
    }


def _corrupted(work: _Work, metrics: Json) -> Iterator[Json]:
    """The metric under each corruption; handed over whenever one is done."""
    config, task, rows = work.config, work.subject.task, []
    size = work.subject.preprocess.input_size
    for name, severity in conditions(config):

        def change(pixels: Pixels, first: int, name: str = name, severity: int = severity) -> Pixels:
            return corrupt(pixels, name, severity, seed=config.seed, first_index=first)

        value = work.metrics(f"{name} {severity}", change)[task.metric]
        drop = task.drop(metrics[task.metric], value)
        rows.append({"name": name, "severity": severity, "value": value, "drop": drop})
        mean = sum(row["value"] for row in rows) / len(rows)
        known = {"parameters": parameter_set(size), "seed": config.seed, "metric": task.metric}
        yield {**known, "mean": mean, "rows": list(rows)}


def _shifted(work: _Work, metrics: Json) -> Iterator[Json]:
    """The metric where inputs are moved, mean over the shifts of each distance; handed over at each distance."""
    config, task, rows = work.config, work.subject.task, []
    for distance in range(config.shifts + 1 if config.shifts else 0):
        values = [
            work.metrics(f"shift {distance}", _translation(down, right, config.shift_padding), (down, right))
            for down, right in shifts_at(distance)
        ]
        found = [one[task.metric] for one in values]
        value = sum(found) / len(found)
        drop = task.drop(metrics[task.metric], value)
        worst = max(found, key=lambda one: task.drop(metrics[task.metric], one))
        rows.append({"distance": distance, "shifts": len(found), "value": value, "worst": worst, "drop": drop})
        yield {"pixels": config.shifts, "padding": config.shift_padding, "metric": task.metric, "rows": list(rows)}


def _translation(down: int, right: int, padding: Padding) -> Change:
    return lambda pixels, first: translate(pixels, down, right, padding)


def print_scenes(result: Json, title: str) -> None:
    """What was measured on annotated pictures, on standard output: a table for each part."""
    numbers = [[name, f"{value:.4f}"] for name, value in result.items() if isinstance(value, float)]
    print_table(title, ["metric", "value"], numbers)
    if "throughput" in result:
        speed = result["throughput"]
        hint = ", simulated low bits: says nothing of their speed" if speed["simulated"] else ""
        print(f"{speed['images_per_second']:.1f} inputs/s in {speed['runtime']}, batch {speed['batch_size']}{hint}")
    if "corruptions" in result:
        found = result["corruptions"]
        rows = [[r["name"], str(r["severity"]), f"{r['value']:.4f}", f"{r['drop']:.2f}"] for r in found["rows"]]
        above = f"corrupted pictures, parameters of {found['parameters']}, mean {found['mean']:.4f}"
        print_table(above, ["corruption", "severity", found["metric"], "drop in points"], rows)
    if "shifts" in result:
        found = result["shifts"]
        rows = [
            [str(r["distance"]), str(r["shifts"]), f"{r['value']:.4f}", f"{r['worst']:.4f}", f"{r['drop']:.2f}"]
            for r in found["rows"]
        ]
        columns = ["pixels", "shifts", found["metric"], "of the worst shift", "drop in points"]
        print_table(f"shifted pictures, padding {found['padding']}", columns, rows)
    if "left_out" in result:
        left = result["left_out"]
        print(f"{len(left)} pictures could not be read and are left out, first {left[0]}")
