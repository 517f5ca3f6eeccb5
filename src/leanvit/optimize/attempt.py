"""One file that could win: quantized, written, proven by the gate, and held against the float file."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from leanvit.config import ExportOptions, MPTQConfig, OptimizeOptions, Runtime
from leanvit.errors import (
    CalibrationError,
    ConfigError,
    ExportError,
    LeanvitError,
    NumericalError,
    VerificationError,
)
from leanvit.export.api import export
from leanvit.export.explain import explain
from leanvit.export.gate.evaluation import in_batches
from leanvit.export.gate.given import images_at_a_time
from leanvit.export.network import Model
from leanvit.export.onnx.latency import measure_table
from leanvit.export.onnx.profiles import find, scheme_for
from leanvit.models import layout_of
from leanvit.optimize.images import Images
from leanvit.optimize.settings import FLOAT, Row, Rows, Setting
from leanvit.progress import note
from leanvit.quant import QuantizedModel
from leanvit.quant.costs import site_key
from leanvit.quant.losses import kl_from_logits
from leanvit.quant.parts import QuantizedNetwork, models_of, quantize_any
from leanvit.runtime.bundle import MODEL_NAME, read_manifest
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.task import compare_values, kept_values, task_named
from leanvit.tasks.parts import WHOLE

Quantized = QuantizedModel | QuantizedNetwork
Table = Mapping[str, Mapping[str, float]]

TABLE_ROUNDS = 7
"""Turns of each product: half of what `leanvit benchmark --table` takes, as only large differences count here."""

NEAR_IMAGES = 256
"""Validation images on which outputs are compared with those of the float file: a hundredth of a point of agreement
is beyond them, and they take a second or two."""

LOSES = (VerificationError, ConfigError, ExportError, NumericalError, CalibrationError)
"""What only says that this one file can't win; a full disk or a missing package ends the run."""

LEAST_BLOCKS = 3
"""Blocks of a network of which merged tokens are tried: one before, one that merges, one that is spared."""


@dataclass
class Workshop:
    """What every attempt needs. runtimes: in which files may run. folder: where they are written, one below it each."""

    network: nn.Module
    images: Images
    options: OptimizeOptions
    runtimes: tuple[Runtime, ...]
    folder: Path
    quantized: dict[str, Quantized] = field(default_factory=dict)

    def path(self, name: str) -> Path:
        """Bundle of a setting."""
        return self.folder / name

    @cached_property
    def float_values(self) -> Any:
        """Outputs of the float file on the first validation images, without a threshold in them: (N, values)."""
        return self._values(FLOAT)

    def _values(self, name: str) -> Any:
        pixels = self.images.evaluation.pixels[:NEAR_IMAGES]
        predictor = Predictor(self.path(name), runtime=self._first_runtime(name), check=False)
        outputs = in_batches(predictor.outputs, pixels, images_at_a_time(pixels))
        return kept_values(task_named(self.images.info.task), outputs)

    def _first_runtime(self, name: str) -> Runtime:
        proved = read_manifest(self.path(name)).runtimes
        return next((runtime for runtime in self.runtimes if runtime in proved), "onnxruntime")

    @cached_property
    def table(self) -> Table | None:
        """Milliseconds of every product in float and in 8 bits, for one image; None where that is not the aim.

        Of a network in parts nobody knows how often each runs for an image.
        """
        info = self.images.info
        if self.options.by != "latency" or task_named(info.task).data != "images":
            return None
        try:
            example = self.images.x[:1]
            table: Table = measure_table(self.network, example, threads=self.options.threads, rounds=TABLE_ROUNDS)[
                "sites"
            ]
        except LeanvitError as error:
            note(f"products could not be timed one by one, so only their multiply-adds are told: {error}")
            return None
        return table

    def slower_sites(self, model: Quantized, explained: Mapping[str, Any]) -> tuple[list[str], int]:
        """Sites on integer kernels that are no faster in 8 bits than in float here, and how many there are in all."""
        if self.table is None:
            return [], 0
        in_float = {name for entry in explained["float"] for name in entry["sites"]}
        sites = {name: site for name, site in models_of(model)[WHOLE].graph.sites.items() if name not in in_float}
        rows = {name: self.table.get(site_key(site)) for name, site in sites.items()}
        return [name for name, row in rows.items() if row and row["int8_ms"] >= row["float_ms"]], len(sites)

    def nearness(self, name: str) -> dict[str, float]:
        """How near a file's outputs are to those of the float file: agreement in percent and KL in nats, or SQNR."""
        truth, found = self.float_values, self._values(name)
        task = task_named(self.images.info.task)
        if task.returns != "label":
            return {"sqnr_db": round(compare_values(task, truth, found), 2)}
        return {"agreement": 100.0 * float((truth.argmax(1) == found.argmax(1)).mean()), "kl": _kl(truth, found)}

    def quantize(self, scheme: MPTQConfig) -> Quantized:
        """The network quantized by a scheme, once."""
        key = repr(scheme)
        if key not in self.quantized:
            images = self.images
            self.quantized[key] = quantize_any(self.network, images.info, images.x, scheme, folder=self.folder)
        return self.quantized[key]


def _kl(truth: Any, found: Any) -> float:
    """Mean KL divergence in nats of one softmax of logits (N, classes) from another, as JSON can hold it."""
    from torch import from_numpy

    value = kl_from_logits(from_numpy(truth), from_numpy(found))
    return value if math.isfinite(value) else 1e9


def attempt(shop: Workshop, setting: Setting, rows: Rows) -> Row:
    """Make the file of a setting, and say what is known of it; a setting that can't win has the reason.

    rows: of the settings before, the float one's among them but for itself. Raises what the float file raises: there is
    nothing to fall back on without it.
    """
    started = time.monotonic()
    row: Row = {"name": setting.name, "said": setting.said, "profile": setting.profile, "state": "made", "why": ""}
    try:
        row |= _made(shop, setting, rows)
    except LOSES as error:
        if setting.name == FLOAT:
            raise
        row |= {"state": "failed", "why": _reason(error, shop.path(setting.name))}
        note(f"{setting.name} is out: {row['why']}")
        row["explain"] = _explained_anyway(shop, setting, rows)
    return row | {"seconds": round(time.monotonic() - started, 2)}


def _explained_anyway(shop: Workshop, setting: Setting, rows: Rows) -> dict[str, Any] | None:
    """Which sites break a file that is out, where it could be quantized."""
    try:
        model = shop.quantize(_scheme(shop, setting, rows))
        return explain(model, shop.network, shop.images.x, find(setting.profile), seed=shop.options.seed)
    except LOSES:
        return None


def _scheme(shop: Workshop, setting: Setting, rows: Rows) -> MPTQConfig:
    if setting.scheme is None:
        raise ConfigError(f"setting {setting.name} is the float network, which is not quantized.")
    return scheme_for(replace(setting.scheme(rows), seed=shop.options.seed), setting.profile)


def _reason(error: Exception, folder: Path) -> str:
    """Why a setting is out; the rejected draft goes, as its reason is kept."""
    shutil.rmtree(folder.with_name(f"{folder.name}.rejected"), ignore_errors=True)
    text = " ".join(str(error).split())
    return text.removeprefix(f"{folder}.rejected: ")


def _made(shop: Workshop, setting: Setting, rows: Rows) -> Row:
    model: Model = shop.network
    if setting.scheme is not None:
        model = shop.quantize(_scheme(shop, setting, rows))
    images, path = shop.images, shop.path(setting.name)
    before = None if setting.name == FLOAT else float(rows[FLOAT]["metric"])
    export(
        model, path,
        ExportOptions(
            profile=setting.profile, max_drop=shop.options.max_drop, min_speedup=0.0, runtimes=_required(shop, setting)
        ),
        info=images.info, images=images.val, float_metric=before,
    )  # fmt: skip
    manifest = read_manifest(path)
    task = task_named(images.info.task)
    accuracy = manifest.accuracy or {}
    runtimes = [name for name in manifest.runtimes if name in shop.runtimes]
    if not runtimes:
        raise VerificationError(f"{path}: proved in {', '.join(manifest.runtimes)}, not in {', '.join(shop.runtimes)}.")
    lifted = list(manifest.quantization.get("lifted", []))
    row: Row = {
        "metric": accuracy["value"],
        "metrics": {key: value for key, value in accuracy["metrics"].items() if isinstance(value, int | float)},
        "drop": 0.0 if before is None else task.drop(before, accuracy["value"]),
        "bytes": (path / MODEL_NAME).stat().st_size,
        "runtimes": runtimes,
        "sha256": manifest.sha256,
        "lifted": lifted,
        "weight_bytes": 0,
        "slower_sites": [],
        "near": shop.nearness(setting.name),
        "explain": None,
    }
    if isinstance(model, nn.Module):
        return row | {"keeps_tokens": _why_tokens_stay(model)}
    profile = find(setting.profile)
    table = shop.table if profile.linears == "integer" else None
    explained = explain(model, shop.network, images.x, profile, lifted, table, shop.options.seed)
    slower, count = shop.slower_sites(model, explained) if table else ([], 0)
    return row | {
        "slower_sites": slower,
        "integer_sites": count,
        "weight_bytes": sum(part.report["quantized_bytes"] for part in models_of(model).values()),
        "explain": explained,
    }


def _why_tokens_stay(network: nn.Module) -> str:
    """Why a network does not merge tokens; empty where it can, and there are blocks behind that gain from it."""
    try:
        depth = layout_of(network).depth
    except ConfigError as error:
        return str(error)
    return "" if depth >= LEAST_BLOCKS else f"{depth} blocks are too few to gain from merged tokens"


def _required(shop: Workshop, setting: Setting) -> tuple[Runtime, ...]:
    """Runtimes that a file must pass in; with several at hand those that it fails in are left out instead."""
    own = tuple(runtime for runtime in shop.runtimes if runtime in setting.for_runtimes)
    return own if len(own) == 1 else ()
