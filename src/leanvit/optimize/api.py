"""optimize(): quantize, export, measure and choose, in one call.

What could win is a table (settings.py). Its rows are tried in the order of promise: quantized, written, proven by the
gate and measured in the runtime (attempt.py). Then all files are timed in turns (timing.py), and the best one that
holds the accuracy is left (choose.py). Every step is a line of the journal, from which a killed run goes on
(journal.py).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from leanvit.bench import machine
from leanvit.checkpoint import CheckpointInfo, digest, preprocess_for
from leanvit.config import OptimizeOptions, Runtime, to_dict
from leanvit.errors import LeanvitError, VerificationError, require
from leanvit.export.data import differ_in_kind
from leanvit.files import only_writer, write_json
from leanvit.load.labels import numbered, task_for
from leanvit.optimize.attempt import Workshop, attempt
from leanvit.optimize.choose import Choice, Times, advice, choose, fastest, summary
from leanvit.optimize.images import read_images
from leanvit.optimize.journal import JOURNAL_NAME, Journal
from leanvit.optimize.settings import FLOAT, Row, Setting, settings_for
from leanvit.optimize.timing import Timer, batch_size_of, milliseconds, targets_of, time_files
from leanvit.progress import Bar, note
from leanvit.report import write_report
from leanvit.runtime.bundle import is_bundle, move_into_place, read_manifest, staging_folder, versions
from leanvit.runtime.engines import available
from leanvit.runtime.task import task_named

RESULT_NAME = "optimize.json"
BUNDLE = "bundle"
CANDIDATES = "candidates"
DOT_PRODUCTS = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
"""Instructions that multiply int8, as the machine's fingerprint names them."""


def optimize(
    model: nn.Module,
    data: str | Path,
    output: str | Path,
    options: OptimizeOptions | None = None,
    *,
    info: CheckpointInfo | None = None,
    timer: Timer = time_files,
    **changes: Any,
) -> Path:
    """Leave the fastest or smallest file of a network that holds its accuracy as OUTPUT/bundle, and return that.

    model: float network of any task. data: where labelled or annotated images are, as for training; or, of a
    classifier, a folder of photographs: then agreement with the float network is held. options: what is asked for; its
    fields may be given by name as well: optimize(network, "photos/", "out/", max_drop=0.5).
    info: of the checkpoint, as `leanvit.load` returns it. timer: measures times, leanvit.bench where none is given.
    Beside the bundle are report.html, optimize.json, and what was tried; the same call goes on after a kill.
    The file never drops more than `max_drop` points against the float file on validation images, which calibration has
    not seen, and is never slower than the float file at the batch size: where none is better, it is the float file.
    Raises DataError, ConfigError, ExportError where the network can't be exported, VerificationError where its float
    file does not pass the gate, MissingDependencyError.
    """
    result = run(model, data, output, replace(options or OptimizeOptions(), **changes), info=info, timer=timer)
    return Path(result["bundle"])


def run(
    model: nn.Module, data: str | Path, output: str | Path, options: OptimizeOptions, *,
    info: CheckpointInfo | None = None, timer: Timer = time_files,
) -> dict[str, Any]:  # fmt: skip
    """`optimize` that returns what optimize.json holds."""
    for module in ("onnx", "onnxscript", "onnxruntime", "jinja2"):
        require(module)
    runtimes, folder = wanted_runtimes(options), Path(output)
    info = info or described(model)
    with only_writer(folder):
        require_free(folder / BUNDLE)
        images = read_images(model, info, str(data), options)
        differ_in_kind(images.info, images.x, images.val, options.seed)
        shop = Workshop(model, images, options, runtimes, folder / CANDIDATES)
        facts = {
            "options": {key: value for key, value in asdict(options).items() if key != "minutes"},
            "weights": digest(model.state_dict()), "info": to_dict(images.info), "images": images.fingerprint,
            "machine": machine(), "versions": versions(), "runtimes": runtimes,
        }  # fmt: skip
        journal = Journal(folder / JOURNAL_NAME, facts)
        if journal.is_new:
            shutil.rmtree(shop.folder, ignore_errors=True)
        return _Run(shop, journal, timer, str(data)).finish(folder)


def wanted_runtimes(options: OptimizeOptions) -> tuple[Runtime, ...]:
    """Runtimes in which files are measured. Raises MissingDependencyError where the wanted one is not installed."""
    if options.runtime == "openvino":
        require("openvino")
    found = available()
    return found if options.runtime == "any" else tuple(name for name in found if name.startswith(options.runtime))


def described(model: nn.Module) -> CheckpointInfo:
    """What is known of a classifier, or a network without one, that comes without a checkpoint's info."""
    claims: Any = getattr(model, "pretrained_cfg", None) or {}
    labels: tuple[str, ...] = tuple(claims.get("label_names") or ())
    name, classes = claims.get("architecture") or type(model).__name__, int(getattr(model, "num_classes", 2))
    # What its weights once classified says nothing of a network without a classifier, or with one logit.
    labels = () if classes == 0 else numbered(2) if classes == 1 else labels
    return CheckpointInfo(name, labels, preprocess_for(model), task=task_for(classes))


@dataclass
class _Run:
    """One run. rows: what is known of every setting so far. times: milliseconds by name and runtime."""

    shop: Workshop
    journal: Journal
    timer: Timer
    data: str
    rows: dict[str, Row] = field(default_factory=dict)
    times: Times = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.options, self.started, self.before = self.shop.options, time.monotonic(), self.journal.seconds
        self.task = task_named(self.shop.images.info.task)
        self.batch_size = batch_size_of(self.options, self.task.name)

    @property
    def spent(self) -> float:
        """Seconds of this run and of those that it goes on from."""
        return self.before + time.monotonic() - self.started

    def finish(self, folder: Path) -> dict[str, Any]:
        """Try, time and choose; write the bundle, the result and its page."""
        self._say_images()
        settings = settings_for(self.options.by, self.shop.runtimes)
        # What depends on others waits until those are timed.
        groups = [[s for s in settings if not s.depends], [s for s in settings if s.depends]]
        with Bar("optimize", len(settings) + len(groups) + 1) as bar:
            for group in groups:
                for setting in group:
                    self._try(setting, bar)
                self._time()
                bar.advance(detail="timed")
            choice = choose(self.rows, self.times, self.options)
            place(self.shop.path(choice.name), folder / BUNDLE)
            result = self._result(choice, folder)
            write_json(folder / RESULT_NAME, result)
            write_report(folder)
            bar.advance(detail=choice.name)
        return result

    def _say_images(self) -> None:
        images = self.shop.images
        if self.one_image > self.options.max_drop:
            note(
                f"{images.count} validation images: one of them is {self.one_image:.2f} points, more than may be lost "
                f"({self.options.max_drop:g}), so no image may"
            )

    @property
    def one_image(self) -> float:
        """Points that one validation image is; 0 where the metric does not count images."""
        return 100.0 / self.shop.images.count if self.task.data == "images" else 0.0

    # --- trying ---

    def _try(self, setting: Setting, bar: Bar) -> None:
        """Make the file of a setting, unless it is made or something speaks against it."""
        row = self._known(setting) or self._left_out(setting)
        if row is None:
            row = attempt(self.shop, setting, self.rows)
            self.journal.add("file", setting.name, row, row["seconds"])
        self.rows[setting.name] = row
        bar.advance(detail=setting.name)

    def _known(self, setting: Setting) -> Row | None:
        """What the journal says of a setting, where its file is still the one that was written."""
        row: Row | None = self.journal.get("file", setting.name)
        if row is None or row["state"] != "made":
            return row
        try:
            return row if read_manifest(self.shop.path(setting.name)).sha256 == row["sha256"] else None
        except LeanvitError as error:
            note(f"{setting.name} is made again: {error}")
            return None

    def _left_out(self, setting: Setting) -> Row | None:
        """The row of a setting that is not tried, with the reason."""
        why, state = setting.unless(self.rows, fastest(self.times)), "not tried"
        longest = max((row["seconds"] for row in self.rows.values()), default=0.0)
        limit = 60 * self.options.minutes if self.options.minutes is not None else float("inf")
        if not why and self.rows and self.spent + longest > limit:
            why, state = f"{self.spent:.0f} s of {limit:.0f} s were spent", "left out"
            note(f"{setting.name} ({setting.said}) is left out: {why}")
        if not why:
            return None
        told = {"name": setting.name, "said": setting.said, "profile": setting.profile}
        return {**told, "state": state, "why": why, "seconds": 0.0}

    # --- timing ---

    def _time(self) -> None:
        """Time every file that was made, in turns, unless just these were timed."""
        made = {name: row for name, row in self.rows.items() if row["state"] == "made"}
        key = " ".join(row["sha256"] for row in made.values())
        found = self.journal.get("times", key)
        if found is None:
            started = time.monotonic()
            targets = targets_of({name: (self.shop.path(name), row["runtimes"]) for name, row in made.items()})
            timed = self.timer([target for _, target in targets], self.batch_size, self.options.threads)
            found = milliseconds(targets, timed)
            self.journal.add("times", key, found, time.monotonic() - started)
        self.times = found

    # --- result ---

    def _result(self, choice: Choice, folder: Path) -> dict[str, Any]:
        images, info, best = self.shop.images, self.shop.images.info, fastest(self.times)
        row, float_row = self.rows[choice.name], self.rows[FLOAT]
        facts = machine()
        idle = [name for name in available() if name not in self.shop.runtimes] if self.options.runtime != "any" else []
        told = advice(
            self.rows, choice, self.options, one_image=self.one_image,
            has_integers=bool(DOT_PRODUCTS & set(facts["features"])), more_runtimes=idle,
        )  # fmt: skip
        return {
            "version": 1,
            "bundle": str(folder / BUNDLE),
            "architecture": info.architecture,
            "task": self.task.name,
            "data": self.data,
            "labelled": images.labelled,
            "images": images.count,
            "calibration_images": len(images.x),
            "metric": self.task.metric if images.labelled else "agreement",
            "points": self.task.points,
            "one_image": self.one_image,
            "least": self._least(float_row["metric"]),
            "batch_size": self.batch_size,
            "options": to_dict(self.options),
            "best": choice.name,
            "runtime": choice.runtime,
            **summary(row, float_row, best),
            "drop": row["drop"],
            "files": [self._told(name, entry, choice) for name, entry in self.rows.items()],
            "next": told,
            "seconds": round(self.spent, 1),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": facts,
            "versions": versions(),
        }

    def _least(self, value: float) -> float:
        """The worst value of the metric that --max-drop allows."""
        share = self.options.max_drop / self.task.points
        return value - share if self.task.higher_is_better else value + share

    def _told(self, name: str, row: Row, choice: Choice) -> Row:
        times: Mapping[str, float] = self.times.get(name, {})
        return {**row, "milliseconds": times, "lost": choice.lost.get(name, "")}


def require_free(target: Path) -> None:
    """Raise VerificationError where something that is no bundle is in the way of one."""
    if target.exists() and not is_bundle(target):
        raise VerificationError(f"{target} exists and is not a bundle; it is not overwritten. Choose another --output.")


def place(source: Path, target: Path) -> None:
    """Copy a bundle to its place, whole: until it is there, what was there before stays."""
    require_free(target)
    staged = staging_folder(target)
    shutil.copytree(source, staged)
    move_into_place(staged, target)
