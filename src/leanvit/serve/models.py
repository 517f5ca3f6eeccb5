"""The bundles that are served, by name: loaded and checked, and swapped when their folder is replaced."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leanvit.config import ServeConfig, to_dict
from leanvit.errors import ConfigError, LeanvitError
from leanvit.files import read_json
from leanvit.runtime.bundle import SERVED_NAME, VERIFY_NAME
from leanvit.runtime.predictor import Predictor
from leanvit.serve import log
from leanvit.serve.batcher import Batcher
from leanvit.serve.metrics import Metrics
from leanvit.serve.tensors import DATATYPES

KEPT, SWAPPED = "kept", "swapped"
"""What became of a bundle when its folder was replaced: it is still served, or the new one is."""

Fingerprint = tuple[tuple[str, int, int, int], ...]


@dataclass(eq=False)
class Model:
    """One bundle in use.

    pending: requests that were taken and are not answered yet. facts: what GET /v1/models/NAME says.
    """

    name: str
    predictor: Predictor
    batcher: Batcher
    facts: dict[str, Any]
    fingerprint: Fingerprint
    pending: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 of the bundle's manifest."""
        return self.predictor.manifest.sha256

    @property
    def seconds_to_wait(self) -> float:
        """About how long the requests that were taken will keep the network busy."""
        return self.pending * self.batcher.seconds_an_image


def named_folders(bundles: list[str]) -> dict[str, Path]:
    """Folders by the name under which each is served, from FOLDER and NAME=FOLDER.

    Raises ConfigError for a name that can't stand in a path of a URL, and for one that occurs twice.
    """
    if not bundles:
        raise ConfigError("no bundle given. Run: leanvit serve BUNDLE")
    found: dict[str, Path] = {}
    for text in bundles:
        name, equals, folder = text.partition("=")
        # A folder may have = in its path.
        if not equals or "/" in name:
            name, folder = Path(text).resolve().name, text
        if not SERVED_NAME.fullmatch(name):
            raise ConfigError(
                f"'{name}' can't be the name of a model, expected letters, digits, _, - and . in it. Give NAME={folder}"
            )
        if name in found:
            raise ConfigError(f"two bundles are named {name}, expected names of their own. Give NAME={folder}")
        found[name] = Path(folder)
    return found


class Models:
    """All models of a server. `reload` swaps one: requests that were taken before end with the old one."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        """Load every bundle. Raises what Predictor raises."""
        self.config = config
        self.metrics = metrics
        self.folders = named_folders(config.bundles)
        self._reloading = threading.Lock()
        self._failed: dict[str, Fingerprint] = {}
        self._models = {name: self._load(name) for name in self.folders}
        for model in self:
            self._tell(model, 1)
            # From 0 on, as REASONS in metrics.py.
            for outcome in (KEPT, SWAPPED):
                metrics.swaps.labels(model.name, outcome)

    def __iter__(self) -> Iterator[Model]:
        return iter(list(self._models.values()))

    def get(self, name: str) -> Model | None:
        """The model of this name."""
        return self._models.get(name)

    def _load(self, name: str) -> Model:
        folder = self.folders[name]
        while True:
            seen = fingerprint(folder)
            predictor = Predictor(folder, threads=self.config.threads, runtime=self.config.runtime)
            gate = read_json(folder / VERIFY_NAME) if VERIFY_NAME in predictor.manifest.files else None
            # Whoever replaces the folder meanwhile must not leave us with one's manifest and the other's network.
            if fingerprint(folder) == seen:
                break
        outputs = warm_up(predictor, self.config.max_batch)

        def observe(count: int, seconds: float) -> None:
            self.metrics.batch.labels(name).observe(count)

        cores = os.cpu_count() or 1
        takes_all = 1 < cores <= (self.config.threads or cores)
        batcher = Batcher(predictor.outputs, self.config.max_batch, observe, takes_all_cores=takes_all)
        return Model(name, predictor, batcher, {**facts(name, predictor, gate, self.config), "outputs": outputs}, seen)

    def replaced(self) -> list[str]:
        """Names of the models whose folder is another one than when it was loaded, or tried last."""
        found = []
        for model in self:
            now = fingerprint(self.folders[model.name])
            if now and now not in (model.fingerprint, self._failed.get(model.name)):
                found.append(model.name)
        return found

    def reload(self, names: list[str]) -> None:
        """Load bundles beside those that are served and swap them; one that fails is named, and the old one kept."""
        with self._reloading:
            for name in names:
                self._reload(name)

    def _reload(self, name: str) -> None:
        old, started = self._models[name], time.perf_counter()
        seen = fingerprint(self.folders[name])
        try:
            new = self._load(name)
        except (LeanvitError, OSError) as error:
            self._failed[name] = seen
            self.metrics.swaps.labels(name, KEPT).inc()
            log.write("bundle kept", model=name, bundle=old.digest, error=str(error))
            return
        self._failed.pop(name, None)
        self._models[name] = new
        old.batcher.close()
        self._tell(old, 0)
        self._tell(new, 1)
        self.metrics.swaps.labels(name, SWAPPED).inc()
        took = round(time.perf_counter() - started, 3)
        log.write("bundle swapped", model=name, bundle=new.digest, before=old.digest, seconds=took)

    def _tell(self, model: Model, value: int) -> None:
        labels = (model.name, model.digest, model.predictor.task.name, model.predictor.runtime)
        if value:
            self.metrics.serving.labels(*labels).set(1)
        elif model.digest != self._models[model.name].digest:
            self.metrics.serving.labels(*labels).set(0)


def fingerprint(folder: Path) -> Fingerprint:
    """Names, inodes, times and sizes of a folder's files: differs as soon as one was replaced; empty without folder."""
    try:
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return ()
    return tuple((name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in found)


def warm_up(predictor: Predictor, max_batch: int) -> list[dict[str, Any]]:
    """Run the smallest and the largest batch, so that the first requests find memory and kernels ready.

    Returns the outputs as protocol v2 describes them.
    """
    height, width = predictor.size
    for count in (max_batch, 1):
        outputs = predictor.outputs(np.zeros((count, height, width, predictor.channels), np.uint8))
    return [
        {"name": name, "datatype": DATATYPES[values.dtype.name], "shape": [-1, *values.shape[1:]]}
        for name, values in outputs.items()
    ]


def summary(name: str, predictor: Predictor) -> dict[str, Any]:
    """What the list of models says of one."""
    manifest = predictor.manifest
    height, width = predictor.size
    return {
        "name": name,
        "task": predictor.task.name,
        "title": predictor.task.title or predictor.task.name,
        "architecture": manifest.architecture,
        "profile": manifest.profile,
        "runtime": predictor.runtime,
        "bundle": manifest.sha256,
        "input": {"height": height, "width": width, "channels": predictor.channels},
    }


QUERY = ("top_k", "score_threshold", "boxes")
"""Options of a prediction that a request may give in its query, where the task follows them."""


def facts(name: str, predictor: Predictor, gate: Any, config: ServeConfig) -> dict[str, Any]:
    """What a model is and what its bundle proves, as JSON values. gate: what verify.json holds."""
    manifest, task = predictor.manifest, predictor.task
    names = [*manifest.files]
    return {
        **summary(name, predictor),
        "labels": list(manifest.labels),
        "options": [option for option in QUERY if option in task.options],
        "drawn": list(task.drawn) if task.draw else [],
        "keypoints": manifest.answers.get("keypoints"),
        "preprocess": to_dict(manifest.preprocess),
        "gate": gate,
        "golden": {"runtime": predictor.runtime, "minimum_db": predictor.minimum_sqnr_db},
        "accuracy": manifest.accuracy,
        "bits": mean_bits(manifest.plan),
        "bytes": {file: (predictor.folder / file).stat().st_size for file in names},
        "simulated": manifest.simulated,
        "versions": manifest.versions,
        "limits": {"body_bytes": config.max_body, "pixels": config.max_pixels},
    }


def mean_bits(plan: dict[str, tuple[int, int]]) -> dict[str, float] | None:
    """Mean bits of weights and activations over the quantized sites; None where there are none."""
    if not plan:
        return None
    weights, activations = (round(float(np.mean([bits[i] for bits in plan.values()])), 3) for i in (0, 1))
    return {"weights": weights, "activations": activations, "sites": len(plan)}
