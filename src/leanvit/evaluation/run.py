"""`leanvit val`: measures one model of any task, saves after each part, and says what came out."""

from __future__ import annotations

import contextlib
import csv
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from leanvit.config import ValConfig, save_yaml
from leanvit.data.classes import agreed
from leanvit.data.loader import Loader
from leanvit.data.sets import ImageSet, load_split
from leanvit.data.sets.multi_label import load_multi_label
from leanvit.evaluation.corruptions import parameter_set
from leanvit.evaluation.measure import (
    Evaluation,
    corrupted_accuracy,
    describe,
    evaluate_detailed,
    plain_accuracy,
    shift_robustness,
)
from leanvit.evaluation.own_metric import measure_own
from leanvit.evaluation.plan import RESULT_NAME, Json, batch_size_of, check_shifts, conditions, origin, passes
from leanvit.evaluation.scenes import measure_scenes, print_scenes
from leanvit.evaluation.subject import Subject, open_subject
from leanvit.files import only_writer, write_atomic, write_json
from leanvit.progress import Bar, print_table

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
    """Measure a model on what its task is measured on; returns JSON values (docs/evaluate.md).

    Without anything beyond top-1 a classifier's are its accuracy alone. Raises as `measure_images` and
    leanvit.evaluation.scenes.measure_scenes do.
    """
    subject = open_subject(config)
    if subject.task.data == "scenes":
        return measure_scenes(config, subject)
    if subject.task.returns != "label":
        labels, images = agreed(subject.labels, read_images(config, subject.split, subject.task.name)[0], config.data)
        return measure_own(config, replace(subject, labels=labels), images)
    return measure_images(config, subject) if config.is_detailed else measure_accuracy(config, subject)


def measure_accuracy(config: ValConfig, subject: Subject) -> Json:
    """top1, top5, loss, images and correct of a model on labelled images; raises as `measure_images` does."""
    _, _, _, loader = _read(config, subject)
    with Bar("evaluating", len(loader)) as bar:
        found = plain_accuracy(subject.predict, loader, lambda what: bar.advance(detail=what))
    return found | ({"left_out": list(loader.bad)} if loader.bad else {})


def _read(config: ValConfig, subject: Subject) -> tuple[Subject, ImageSet, NDArray[np.int64], Loader]:
    """The images of a configuration, their places (N,) in the split, readable or not, and batches of the readable.

    The subject's classes have the names of the data where they only had numbers.
    """
    images, indices = read_images(config, subject.split)
    labels, images = agreed(subject.labels, images, config.data)
    subject = replace(subject, labels=labels)
    return (
        subject,
        images,
        indices,
        Loader(images, subject.preprocess, batch_size_of(config, subject), config.bad_images),
    )


def measure_images(config: ValConfig, subject: Subject) -> Json:
    """Measure a model of labelled images; returns what val.json holds (docs/evaluate.md).

    With `config.output` the folder has val.json, predictions.csv and config.yaml, saved whenever a part is done, so
    that an interruption costs the part it falls in.
    Raises CheckpointError or BundleError for the model, DataError for the data, ConfigError, NumericalError where a
    logit is not finite, RunLockedError where another process writes to the folder.
    """
    check_shifts(config, subject)
    with only_writer(config.output) if config.output else contextlib.nullcontext():
        subject, images, indices, loader = _read(config, subject)
        with Bar("evaluating", len(loader) * passes(config)) as bar:
            work = _Work(config, subject, images, indices, loader, bar)
            _measure_clean(work)
            _measure_corrupted(work)
            _measure_shifted(work)
            work.result["complete"] = True
            work.save()
    return work.result


def read_images(
    config: ValConfig, origin: Mapping[str, Any], task: str = "classify"
) -> tuple[ImageSet, NDArray[np.int64]]:
    """The images that a configuration names: all of its split, or `config.limit` of them drawn by `config.seed`.

    task: of the model. origin: val_fraction and seed of the split that it was trained with.
    Returns the images and their places (N,) in the split, in rising order. Raises DataError.
    """
    split = {key: origin[key] for key in ("val_fraction", "seed") if key in origin}
    load = load_multi_label if task == "multilabel" else load_split
    images = load(config.data, config.split, **split)
    # Drawn, because folders are in the order of the classes.
    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(images))[: config.limit])
    return images.subset(drawn), drawn


def _measure_clean(work: _Work) -> None:
    found = evaluate_detailed(work.subject.predict, work.loader, work.subject.labels, work.tick)
    work.result = {
        **origin(work.config, work.subject, work.images.name, list(work.loader.bad)),
        **describe(found),
        "throughput": _throughput(work, found),
        "complete": False,
    }
    if work.config.output:
        folder = Path(work.config.output)
        save_yaml(work.config, folder / "config.yaml")
        write_atomic(folder / PREDICTIONS_NAME, _predictions(work, found))
    work.save()


def _throughput(work: _Work, found: Evaluation) -> Json:
    """Images a second of the model's calls in this process: a hint, `leanvit benchmark` measures with care."""
    return {
        "images_per_second": found.images_per_second,
        "images": found.images,
        "batch_size": work.loader.batch_size,
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
    known = found.predictions
    columns = (known.labels.tolist(), known.predicted.tolist(), known.confidence.tolist())
    for (index, name), label, predicted, confidence in zip(kept, *columns, strict=True):
        writer.writerow([index, name, labels[label], labels[predicted], f"{confidence:.6f}"])
    # A name need not be UTF-8: bytes that are not become \xNN.
    text = file.getvalue().encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text.encode("utf-8", "backslashreplace")


def _measure_corrupted(work: _Work) -> None:
    wanted = conditions(work.config)
    if not wanted:
        return
    rows: list[Json] = []
    size = work.subject.preprocess.input_size
    work.result["corruptions"] = {"parameters": parameter_set(size), "seed": work.config.seed, "rows": rows}
    for name, severity in wanted:
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


def print_result(result: Json, title: str = "metrics") -> None:
    """What was measured, on standard output: a line, and a table for each part. title: of a task's metrics."""
    if "top1" not in result:
        print_scenes(result, title)
    elif "classes" not in result:
        print(_top_line(result))
    else:
        print_images(result)


def _top_line(result: Json) -> str:
    counted = f"({result['correct']} of {result['images']} images)"
    five = f"  top-5 {result['top5']:.2f}%" if "top5" in result else ""
    return f"top-1 {result['top1']:.2f}%{five}  {counted}"


def print_images(result: Json) -> None:
    """What was measured on labelled images, with its tables."""
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
    speed = result["throughput"]
    yield _top_line(result)
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
