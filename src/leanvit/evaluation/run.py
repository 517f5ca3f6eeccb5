"""`leanvit val` beyond top-1: measures one model, saves after each part, and says what came out."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.bench import machine
from leanvit.config import ValConfig, command_line, save_yaml
from leanvit.data.loader import Loader, check_classes
from leanvit.data.sets import ImageSet, load_split
from leanvit.errors import ConfigError
from leanvit.evaluation.corruptions import CORRUPTIONS, parameter_set
from leanvit.evaluation.measure import (
    Evaluation,
    corrupted_accuracy,
    describe,
    evaluate_detailed,
    shift_robustness,
    shifts_at,
)
from leanvit.evaluation.subject import Subject, open_subject
from leanvit.files import only_writer, write_atomic, write_json
from leanvit.progress import Bar, print_table
from leanvit.runtime.bundle import versions

Json = dict[str, Any]
SCHEMA_VERSION = 1
RESULT_NAME = "val.json"
PREDICTIONS_NAME = "predictions.csv"
CLASSES_PRINTED = 20


@dataclass
class _Work:
    """One measurement on its way: everything that its parts read, and the values that they fill.

    indices: (N,) places in the split of the images, readable or not.
    """

    config: ValConfig
    subject: Subject
    images: ImageSet
    indices: NDArray[np.int64]
    loader: Loader
    bar: Bar
    result: Json = field(default_factory=dict)

    def tick(self, what: str) -> None:
        """Count a batch."""
        self.bar.advance(detail=what)

    def save(self) -> None:
        """Write what is known up to here, where it was asked for."""
        if self.config.output:
            write_json(Path(self.config.output) / RESULT_NAME, self.result)


def measure_model(config: ValConfig) -> Json:
    """Measure a model; returns what val.json holds (docs/evaluate.md).

    With `config.output` the folder has val.json, predictions.csv and config.yaml, saved whenever a part is done, so
    that an interruption costs the part it falls in.
    Raises CheckpointError or BundleError for the model, DataError for the data, ConfigError, NumericalError where a
    logit is not finite, RunLockedError where another process writes to the folder.
    """
    subject = open_subject(config)
    _check_shifts(config, subject)
    images, indices = read_images(config, subject.split)
    check_classes(images.classes, subject.labels, config.data)
    with only_writer(config.output) if config.output else contextlib.nullcontext():
        loader = Loader(images, subject.preprocess, config.batch_size, config.bad_images)
        with Bar("evaluating", len(loader) * _passes(config)) as bar:
            work = _Work(config, subject, images, indices, loader, bar)
            _measure_clean(work)
            _measure_corrupted(work)
            _measure_shifted(work)
            work.result["complete"] = True
            work.save()
    return work.result


def read_images(config: ValConfig, origin: Mapping[str, Any]) -> tuple[ImageSet, NDArray[np.int64]]:
    """The images that a configuration names: all of its split, or `config.limit` of them drawn by `config.seed`.

    origin: of the model, val_fraction and seed of the split that it was trained with.
    Returns the images and their places (N,) in the split, in rising order. Raises DataError.
    """
    split = {key: origin[key] for key in ("val_fraction", "seed") if key in origin}
    images = load_split(config.data, config.split, **split)
    # Drawn, because folders are in the order of the classes.
    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(images))[: config.limit])
    return images.subset(drawn), drawn


def _check_shifts(config: ValConfig, subject: Subject) -> None:
    side = min(subject.preprocess.input_size)
    if config.shifts >= side:
        raise ConfigError(f"shifts is {config.shifts}, expected less than the images' side of {side} pixels")


def _conditions(config: ValConfig) -> list[tuple[str, int]]:
    """(corruption, severity) in the order in which they are measured."""
    names = CORRUPTIONS if "all" in config.corruptions else [n for n in CORRUPTIONS if n in config.corruptions]
    return [(name, severity) for name in names for severity in sorted(set(config.severities))]


def _passes(config: ValConfig) -> int:
    """How often the model sees all images."""
    shifted = sum(len(shifts_at(distance)) for distance in range(config.shifts + 1)) if config.shifts else 0
    return 1 + len(_conditions(config)) + shifted


def _measure_clean(work: _Work) -> None:
    found = evaluate_detailed(work.subject.predict, work.loader, work.subject.labels, work.tick)
    work.result = {**_origin(work), **describe(found), "throughput": _throughput(work, found), "complete": False}
    if work.config.output:
        folder = Path(work.config.output)
        save_yaml(work.config, folder / "config.yaml")
        write_atomic(folder / PREDICTIONS_NAME, _predictions(work, found))
    work.save()


def _origin(work: _Work) -> Json:
    config, subject = work.config, work.subject
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command_line("val", config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "seed": config.seed,
        "model": config.model,
        "kind": subject.kind,
        "architecture": subject.architecture,
        "runtime": subject.runtime,
        "data": work.images.name,
        "split": config.split,
        "limit": config.limit,
        "input_size": list(subject.preprocess.input_size),
        "left_out": list(work.loader.bad),
    }


def _throughput(work: _Work, found: Evaluation) -> Json:
    """Images a second of the model's calls in this process: a hint, `leanvit benchmark` measures with care."""
    return {
        "images_per_second": found.images_per_second,
        "images": found.images,
        "batch_size": work.config.batch_size,
        "threads": work.subject.threads,
        "runtime": work.subject.runtime,
        "simulated": work.subject.simulated,
    }


def _predictions(work: _Work, found: Evaluation) -> bytes:
    """predictions.csv: a line an image that could be read, in the order of the data; no name for one without a file."""
    bad = set(work.loader.bad)
    kept = [
        (index, "" if isinstance(work.images.sources[place], np.ndarray) else work.images.name_of(place))
        for place, index in enumerate(work.indices.tolist())
        if work.images.name_of(place) not in bad
    ]
    labels = work.subject.labels
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["index", "image", "label", "predicted", "confidence"])
    answers = found.answers
    columns = (answers.labels.tolist(), answers.predicted.tolist(), answers.confidence.tolist())
    for (index, name), label, predicted, confidence in zip(kept, *columns, strict=True):
        writer.writerow([index, name, labels[label], labels[predicted], f"{confidence:.6f}"])
    # A name need not be UTF-8: bytes that are not become \xNN.
    text = file.getvalue().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace")


def _measure_corrupted(work: _Work) -> None:
    conditions = _conditions(work.config)
    if not conditions:
        return
    rows: list[Json] = []
    size = work.subject.preprocess.input_size
    work.result["corruptions"] = {"parameters": parameter_set(size), "seed": work.config.seed, "rows": rows}
    for name, severity in conditions:
        row = corrupted_accuracy(
            work.subject.predict, work.loader, name, severity, seed=work.config.seed, tick=work.tick
        )
        rows.append(asdict(row))
        work.save()
    work.result["corruptions"]["mean_top1"] = sum(row["top1"] for row in rows) / len(rows)


def _measure_shifted(work: _Work) -> None:
    config = work.config
    if not config.shifts:
        return
    rows = shift_robustness(work.subject.predict, work.loader, config.shifts, config.shift_padding, work.tick)
    work.result["shifts"] = {
        "pixels": config.shifts,
        "padding": config.shift_padding,
        "consistency": rows[-1].consistency,
        "rows": [asdict(row) for row in rows],
    }


def print_result(result: Json) -> None:
    """What was measured, on standard output: a line, and a table for each part."""
    print("\n".join(_summary(result)))
    if len(result["classes"]) <= CLASSES_PRINTED:
        columns = ["class", "images", "correct", "recall %", "precision %"]
        rows = [
            [c["name"], str(c["images"]), str(c["correct"]), _cell(c["recall"]), _cell(c["precision"])]
            for c in result["classes"]
        ]
        print_table("each class", columns, rows)
    if "corruptions" in result:
        _print_corruptions(result["corruptions"])
    if "shifts" in result:
        shifts = result["shifts"]
        rows = [
            [str(r["distance"]), str(r["shifts"]), _cell(r["top1"]), _cell(r["agreement"]), _cell(r["consistency"])]
            for r in shifts["rows"]
        ]
        columns = ["pixels", "shifts", "top-1 %", "as unshifted %", "consistency up to here %"]
        print_table(f"shifted images, padding {shifts['padding']}", columns, rows)


def _summary(result: Json) -> Iterator[str]:
    speed, counted = result["throughput"], f"({result['correct']} of {result['images']} images)"
    yield f"top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  {counted}"
    yield (
        f"mean over classes {result['balanced_accuracy']:.2f}%  loss {result['loss']:.4f}  "
        f"calibration error {result['calibration']['ece']:.4f}"
    )
    threads = f", {speed['threads']} threads" if speed["threads"] else ""
    note = ", simulated low bits: says nothing of their speed" if speed["simulated"] else ""
    yield (
        f"{speed['images_per_second']:.0f} images/s in {speed['runtime']}, batch {speed['batch_size']}{threads}{note}"
    )
    if result["left_out"]:
        yield f"{len(result['left_out'])} images could not be read and are left out, first {result['left_out'][0]}"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _print_corruptions(values: Json) -> None:
    severities = sorted({row["severity"] for row in values["rows"]})
    names = list(dict.fromkeys(row["name"] for row in values["rows"]))
    found = {(row["name"], row["severity"]): row["top1"] for row in values["rows"]}
    rows = [[name, *(_cell(found[name, severity]) for severity in severities)] for name in names]
    means = [sum(found[name, severity] for name in names) / len(names) for severity in severities]
    rows.append(["mean", *map(_cell, means)])
    title = f"top-1 % on corrupted images, parameters of {values['parameters']}"
    print_table(title, ["corruption", *(f"severity {severity}" for severity in severities)], rows)
