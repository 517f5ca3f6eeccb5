"""Export of a task's network as a bundle: one graph with its post-processing, proven in the runtime."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from leanvit import imaging
from leanvit.annotations import Outputs, SceneSet
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Opset, Runtime, Task
from leanvit.data.loader import to_input
from leanvit.errors import require
from leanvit.export.gate.check import require_passed
from leanvit.export.gate.golden import golden_set, records
from leanvit.export.gate.rounding import in_double, least_sqnr_db, some_tensor
from leanvit.export.gate.tasks import Measured, verify_task_bundle
from leanvit.export.gate.verify import FLOAT_SQNR_DB, least_ratios
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.profiles import AUTO, Profile, pick
from leanvit.export.onnx.simulation import executed_form
from leanvit.export.onnx.storage import opset_of
from leanvit.export.simulated import profile_for, say_other_profile
from leanvit.progress import Bar
from leanvit.quant.graph import QuantGraph, trace
from leanvit.quant.parts import QuantizedNetwork
from leanvit.runtime.answers import METRICS
from leanvit.runtime.bundle import MODEL_NAME, Manifest, finish, sign, staging_folder, versions, write_bundle
from leanvit.runtime.engines import available
from leanvit.runtime.task_golden import MATCHED_SHARE, golden_records, golden_values, least_share, worst_sqnr_db
from leanvit.runtime.task_predictor import TaskPredictor
from leanvit.tasks.build import task_of_network
from leanvit.tasks.detect import PYRAMID, Detector
from leanvit.tasks.measure import measure_bundle
from leanvit.tasks.parts import WHOLE, example_of, output_names, parts_of, with_parts

GOLDEN_PICTURES = 8
FLOAT_MAX_DROP = 0.1


def export_network(
    model: nn.Module | QuantizedNetwork,
    info: CheckpointInfo,
    output: str | Path,
    *,
    profile: str = AUTO,
    scenes: SceneSet | None = None,
    float_metric: float | None = None,
    max_drop: float = 1.0,
    runtimes: Sequence[Runtime] = ("onnxruntime",),
    opset: Opset = 23,
) -> Path:
    """Write a task's network as a bundle folder that passes the gate (leanvit.export.gate.tasks).

    model: float network or QuantizedNetwork. profile: as in leanvit.export. scenes: annotated pictures; with them the
    task's metric is measured in the runtime, and float_metric (0 to 1) allows a drop of max_drop points, 0.1 for a
    float network. runtimes: that must pass; the one that the profile is made for as well, where it is installed.
    opset: as in leanvit.export, 21 for a detector.
    Returns the folder. Raises VerificationError (the draft stays as OUTPUT.rejected), ExportError, ConfigError,
    MissingDependencyError.
    """
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module)
    output = Path(output)
    staging = staging_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with Bar(f"exporting {info.task}", 3) as bar:
            manifest = _write(model, info, profile, staging, scenes, runtimes, opset)
            bar.advance(detail="written")
            manifest, measured = _with_accuracy(staging, manifest, scenes, float_metric, max_drop)
            bar.advance(detail="measured")
            checks = verify_task_bundle(staging, scenes, measured)
            bar.advance(detail="verified")
        target = finish(staging, output, manifest, checks)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    require_passed(checks, target)
    return target


def _write(
    model: nn.Module | QuantizedNetwork,
    info: CheckpointInfo,
    profile: str,
    staging: Path,
    scenes: SceneSet | None,
    runtimes: Sequence[Runtime],
    opset: Opset,
) -> Manifest:
    """The draft: graph, manifest and golden pictures with the answers of the torch network in the executed form."""
    graphs, profiles = _graphs(model, info, profile)
    network = model.network if isinstance(model, QuantizedNetwork) else model
    executed = network
    if isinstance(model, QuantizedNetwork):
        executed = with_parts(network, {name: executed_form(graphs[name], profiles[name]) for name in graphs})
    proto = lower_network(network, graphs, info, profiles, opset)
    golden = golden_pictures(scenes, info)
    pixels = np.stack([imaging.load(image, info.preprocess, "golden picture") for image in golden])
    answers = network_outputs(executed, info, pixels)
    values, objects = golden_values(answers, info.task), golden_records(answers)
    asked = Asked(FLOAT_SQNR_DB)
    if isinstance(model, QuantizedNetwork):
        exact = in_double(executed, lambda copied: network_outputs(copied, info, pixels))
        own = worst_sqnr_db(golden_values(exact, info.task), values)
        asked = Asked(least_sqnr_db(executed, lambda: own), least_share(exact, objects, len(pixels)))
    made_for = {part.runtime for part in profiles.values()} & set(available())
    manifest = _manifest(model, info, profiles, (*runtimes, *sorted(made_for)), asked, opset_of(proto))
    kept = records(pixels, info.labels, info.preprocess) | objects
    return write_bundle(staging, proto.SerializeToString(), golden, values, manifest, **kept)


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the gate asks of golden answers: SQNR in dB, and the share of objects that are found again."""

    sqnr_db: float
    share: float = MATCHED_SHARE


def _graphs(
    model: nn.Module | QuantizedNetwork, info: CheckpointInfo, profile: str
) -> tuple[dict[str, QuantGraph], dict[str, Profile]]:
    """Every part as a graph, and the profile that runs it."""
    if isinstance(model, QuantizedNetwork):
        graphs = {name: part.graph for name, part in model.parts.items()}
        say_other_profile(model, chosen := profile_for(model, profile))
        return graphs, dict.fromkeys(graphs, chosen)
    graphs = {name: trace(part.eval().cpu(), example_of(model, name, info)) for name, part in parts_of(model).items()}
    return graphs, dict.fromkeys(graphs, pick(profile))


def lower_network(
    network: nn.Module,
    graphs: dict[str, QuantGraph],
    info: CheckpointInfo,
    profiles: dict[str, Profile],
    opset: Opset = 23,
) -> Any:
    """One onnx.ModelProto: `images` (batch, H, W, 3) uint8 in, the task's outputs out, dynamic batch.

    A detector has opset 21 always: ONNX Runtime has no RoIAlign of a later one.
    """
    opset = 21 if isinstance(network, Detector) else opset
    names = output_names(network, info)
    lowered = {
        name: lower(
            graph,
            info.preprocess if name in (WHOLE, PYRAMID) else None,
            profiles[name],
            outputs=names[name],
            opset=opset,
        )
        for name, graph in graphs.items()
    }
    if not isinstance(network, Detector):
        return lowered[WHOLE]
    from leanvit.export.onnx.detection import assemble

    return assemble(lowered, network, info.preprocess.input_size)


def network_outputs(network: nn.Module, info: CheckpointInfo, pixels: imaging.Pixels) -> Outputs:
    """Outputs of a torch network, of float32 or float64, for prepared pictures (N, H, W, 3) uint8, as a bundle's."""
    x = to_input(torch.from_numpy(pixels), info.preprocess).to(some_tensor(network).dtype)
    task = task_of_network(info)
    return task.outputs(network, x) | task.more_outputs(network, x)


def golden_pictures(scenes: SceneSet | None, info: CheckpointInfo) -> list[bytes]:
    """Encoded pictures, spread over the split or synthetic, with coloured charts between them."""
    found = scenes.scenes if scenes else ()
    return golden_set(GOLDEN_PICTURES, info.preprocess.input_size, len(found), lambda i: found[i].path.read_bytes())


def _manifest(
    model: nn.Module | QuantizedNetwork,
    info: CheckpointInfo,
    profiles: dict[str, Profile],
    runtimes: Sequence[Runtime],
    asked: Asked,
    opset: int,
) -> Manifest:
    plan: dict[str, tuple[int, int]] = {}
    quantization: dict[str, Any] = {}
    if isinstance(model, QuantizedNetwork):
        plan = model.plan
        first = next(iter(model.parts.values()))
        quantization = {
            "config": first.report["config"],
            "calibration": first.report["calibration"],
            "site_sqnr_db": _site_ratios(model),
        }
    return Manifest(
        architecture=info.architecture,
        profile=next(iter(profiles.values())).name,
        labels=info.labels,
        preprocess=info.preprocess,
        minimum_sqnr_db=asked.sqnr_db,
        plan=plan,
        quantization=quantization,
        data={"name": info.data, "seed": info.seed},
        input={"name": "images", "dtype": "uint8", "layout": "NHWC", "channels": "RGB", "batch": "dynamic"},
        opset=opset,
        versions=versions(),
        simulated=any(profile.simulated for profile in profiles.values()),
        runtimes=least_ratios(runtimes, asked.sqnr_db),
        task=info.task,
        answers={"matched_share": asked.share} | ({"keypoints": info.keypoints} if info.keypoints else {}),
    )


def _site_ratios(model: QuantizedNetwork) -> dict[str, float]:
    """SQNR in dB of every site when it was quantized; JSON has no infinity."""
    return {
        f"{name}.{site['name']}": round(max(-200.0, min(200.0, site["sqnr_db"])), 2)
        for name, part in model.parts.items()
        for site in part.report.get("sites", [])
    }


def _with_accuracy(
    staging: Path, manifest: Manifest, scenes: SceneSet | None, float_metric: float | None, max_drop: float
) -> tuple[Manifest, Measured | None]:
    """The manifest that says what was measured in the runtime, and the same for the gate."""
    if scenes is None:
        return manifest, None
    measured = Measured(measure_bundle(TaskPredictor(staging, check=False), scenes), manifest.files[MODEL_NAME])
    name, metrics = METRICS[cast(Task, manifest.task)], measured.metrics
    accuracy: dict[str, Any] = {"data": scenes.name, "metric": name, "value": metrics[name], "metrics": metrics}
    accuracy["runtime"] = "onnxruntime"
    if float_metric is not None:
        accuracy |= {"float": float_metric, "max_drop": max_drop if manifest.plan else FLOAT_MAX_DROP}
    return sign(staging, dataclasses.replace(manifest, accuracy=accuracy)), measured
