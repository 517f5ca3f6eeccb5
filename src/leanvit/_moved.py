"""Import paths of leanvit 0.1, for one release: each still works, says so once, and names the new one.

A path is looked up here only when Python finds no module of that name, so that nothing else gets slower.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from importlib.abc import Loader

MOVED = {
    "leanvit._svg": "leanvit.report.svg",
    "leanvit.convert": "leanvit.commands.convert",
    "leanvit.datasets": "leanvit.data.sets",
    "leanvit.datasets.hub": "leanvit.data.sets.hub",
    "leanvit.datasets.image_set": "leanvit.data.sets.image_set",
    "leanvit.datasets.local": "leanvit.data.sets.local",
    "leanvit.datasets.shards": "leanvit.data.sets.shards",
    "leanvit.datasets.specs": "leanvit.data.sets.specs",
    "leanvit.datasets.torchvision_sets": "leanvit.data.sets.torchvision_sets",
    "leanvit.demo": "leanvit.commands.demo",
    "leanvit.distill": "leanvit.train.distill",
    "leanvit.doctor": "leanvit.commands.doctor",
    "leanvit.downstream": "leanvit.tasks",
    "leanvit.downstream.answers": "leanvit.runtime.task",
    "leanvit.downstream.export": "leanvit.export.api",
    "leanvit.downstream.golden": "leanvit.runtime.golden_objects",
    "leanvit.downstream.measure": "leanvit.tasks.measure",
    "leanvit.downstream.pictures": "leanvit.commands.report",
    "leanvit.downstream.predict": "leanvit.runtime.predict",
    "leanvit.downstream.predictor": "leanvit.runtime.predictor",
    "leanvit.downstream.quantize": "leanvit.quant.parts",
    "leanvit.downstream.train": "leanvit.train.scenes",
    "leanvit.downstream.verify": "leanvit.export.gate.verify",
    "leanvit.engines": "leanvit.runtime.engines",
    "leanvit.export.attention": "leanvit.export.onnx.attention",
    "leanvit.export.bundle": "leanvit.runtime.bundle",
    "leanvit.export.detection": "leanvit.export.onnx.detection",
    "leanvit.export.detection_glue": "leanvit.export.onnx.detection_glue",
    "leanvit.export.executed": "leanvit.export.onnx.simulation",
    "leanvit.export.facts": "leanvit.export.gate.calibration",
    "leanvit.export.golden": "leanvit.export.gate.golden",
    "leanvit.export.graph": "leanvit.export.gate.onnx_file",
    "leanvit.export.latency": "leanvit.export.onnx.latency",
    "leanvit.export.lower": "leanvit.export.onnx.lower",
    "leanvit.export.operators": "leanvit.export.onnx.quantizers",
    "leanvit.export.packing": "leanvit.export.onnx.storage",
    "leanvit.export.products": "leanvit.export.onnx.fused_matmul",
    "leanvit.export.rounding": "leanvit.export.gate.rounding",
    "leanvit.export.speed": "leanvit.export.gate.speed",
    "leanvit.export.verify": "leanvit.export.gate.verify",
    "leanvit.export.view": "leanvit.export.onnx.matching",
    "leanvit.inspection.examine": "leanvit.inspection.look",
    "leanvit.inspection.page": "leanvit.inspection.labelled_page",
    "leanvit.loading": "leanvit.checkpoint",
    "leanvit.predict": "leanvit.runtime.predict",
    "leanvit.quant.allocate": "leanvit.quant.greedy_mp",
    "leanvit.quant.check": "leanvit.quant.calibration_images",
    "leanvit.quant.measure": "leanvit.commands.measured",
    "leanvit.quant.outputs": "leanvit.quant.convolution_outputs",
    "leanvit.quant.search": "leanvit.quant.opt_m",
    "leanvit.quant.smooth": "leanvit.quant.sq_b",
    "leanvit.report.shell": "leanvit.report.html",
    "leanvit.report.style": "leanvit.report.html",
    "leanvit.report.task_evaluation": "leanvit.report.metrics",
    "leanvit.report.task_quantization": "leanvit.report.quantization",
    "leanvit.report.task_training": "leanvit.report.training",
    "leanvit.report.task_words": "leanvit.report.metrics",
    "leanvit.results": "leanvit.runtime.result_files",
    "leanvit.route": "leanvit.runtime.task_of",
    "leanvit.scenes": "leanvit.annotations",
    "leanvit.scenes.checks": "leanvit.annotations.checks",
    "leanvit.scenes.coco": "leanvit.annotations.coco",
    "leanvit.scenes.compose": "leanvit.data.compose.compose",
    "leanvit.scenes.decode": "leanvit.runtime.decode",
    "leanvit.scenes.draw": "leanvit.runtime.draw",
    "leanvit.scenes.garments": "leanvit.data.compose.garments",
    "leanvit.scenes.keypoints": "leanvit.annotations.keypoints",
    "leanvit.scenes.letterbox": "leanvit.runtime.letterbox",
    "leanvit.scenes.load": "leanvit.annotations.load",
    "leanvit.scenes.maps": "leanvit.annotations.maps",
    "leanvit.scenes.masks": "leanvit.annotations.masks",
    "leanvit.scenes.metrics": "leanvit.annotations.metrics",
    "leanvit.scenes.photos": "leanvit.data.compose.photos",
    "leanvit.scenes.types": "leanvit.annotations.types",
    "leanvit.scenes.yolo": "leanvit.annotations.yolo",
    "leanvit.tasks.augment": "leanvit.data.scene_augment",
    "leanvit.tasks.loader": "leanvit.data.scene_loader",
    "leanvit.tasks.samples": "leanvit.data.scene_samples",
    "leanvit.tasks.segment": "leanvit.tasks.semantic",
}
"""Old module: where its names are now. `leanvit.verbs` had none that were meant to be imported."""

NAMES = {
    **{f"leanvit.export.verify.{name}": f"leanvit.export.gate.limits.{name}" for name in (
        "AGREEMENT", "BATCH_SIZES", "FLOAT_SQNR_DB", "LOW_BIT_SQNR_DB", "MAX_PIXEL_DIFFERENCE", "QUANTIZED_SQNR_DB",
    )},
    **{f"leanvit.inspection.examine.{name}": f"leanvit.inspection.labelled.{name}" for name in (
        "balance", "examine", "find_duplicates", "look", "summarize",
    )},
    "leanvit._svg.Markup": "markupsafe.Markup",
    "leanvit.export.operators.CodePair": "leanvit.export.onnx.quantizers.QDQPair",
    "leanvit.export.operators.FloatGrid": "leanvit.export.onnx.quantizers.FloatQuantizer",
    "leanvit.data.epoch_order": "leanvit.data.loader.epoch_order",
    "leanvit.imaging.find_images": "leanvit.image_paths.find_images",
    "leanvit.downstream.answers.PCK_SHARE": "leanvit.runtime.tasks.pose.PCK_SHARE",
    "leanvit.downstream.export.FLOAT_MAX_DROP": "leanvit.export.gate.limits.FLOAT_MAX_DROP",
    "leanvit.downstream.export.GOLDEN_PICTURES": "leanvit.export.gate.golden.GOLDEN_PICTURES",
    "leanvit.downstream.golden.VALUES_KEPT": "leanvit.runtime.task.VALUES_KEPT",
    "leanvit.downstream.quantize.calibration_inputs": "leanvit.export.data.calibration_inputs",
    "leanvit.downstream.quantize.quantize_and_measure": "leanvit.commands.measured.quantize_and_measure",
    "leanvit.downstream.train.SUMMARY_NAME": "leanvit.train.logs.SUMMARY_NAME",
    "leanvit.downstream.train.run": "leanvit.train.loop.run",
    "leanvit.downstream.verify.Measured": "leanvit.export.gate.evaluation.Measured",
    "leanvit.export.verify.MAX_RUNTIME_DROP": "leanvit.export.gate.limits.SAME_POINTS",
    "leanvit.export.verify.gate_result": "leanvit.export.gate.check.verdict",
    "leanvit.export.verify.print_verdict": "leanvit.export.gate.check.print_verdict",
    "leanvit.export.verify.require_passed": "leanvit.export.gate.check.require_passed",
    "leanvit.inspection.page.render": "leanvit.inspection.labelled_page.render_images",
}  # fmt: skip
"""Names that went elsewhere than the rest of their module, or have another name now."""

_PREDICT = "leanvit.Predictor, whose predict(source, score_threshold=..., boxes=...) serves every task"

GONE = {
    "leanvit.config.Profile": "str: a name in leanvit.export.onnx.profiles.PROFILES, or auto",
    "leanvit.downstream.answers.METRICS": "leanvit.runtime.task.TASKS[task].metric",
    "leanvit.downstream.answers.decode_map": _PREDICT,
    "leanvit.downstream.answers.decode_objects": _PREDICT,
    "leanvit.downstream.answers.decode_pose": _PREDICT,
    "leanvit.downstream.answers.measure": "leanvit.runtime.task.measure_task(task, data, batches)",
    "leanvit.downstream.export.export_network": "leanvit.export(model, output, ExportOptions(...), info=info, "
    "images=scenes, float_metric=...)",
    "leanvit.downstream.export.measure_bundle": "leanvit.evaluation.run.measure_model(ValConfig(model=BUNDLE, ...))",
    "leanvit.downstream.golden.golden_values": "leanvit.runtime.task.kept_values(task, outputs)",
    "leanvit.downstream.golden.worst_sqnr_db": "leanvit.runtime.task.compare_values(task, expected, found)",
    "leanvit.downstream.predictor.SCORE_THRESHOLD": "leanvit.runtime.task.Options().least_score",
    "leanvit.downstream.predictor.TaskPredictor": _PREDICT,
    "leanvit.downstream.predictor.plain": "leanvit.runtime.tasks.objects.plain(found, labels)",
    "leanvit.downstream.train.TaskResult": "leanvit.train.TrainResult",
    "leanvit.downstream.train.TaskTrainer": "leanvit.train.Trainer",
    "leanvit.downstream.verify.verify_task_bundle": "leanvit.export.gate.verify.verify_bundle(folder, evaluation)",
    "leanvit.engines.runtime_of": "leanvit.export.onnx.profiles.find(profile).runtime",
    "leanvit.export.verify.run_logits": "leanvit.Predictor(folder).logits(images)",
    "leanvit.export.verify.top1_percent": "leanvit.runtime.tasks.classify.accuracy",
    "leanvit.export.detection_glue.Glue": "leanvit.export.onnx.steps.Steps",
    "leanvit.export.view.GraphView": "onnx_ir.Value.producer() and .uses(), of onnx_ir.from_proto(model)",
    "leanvit.export.view.attribute": "onnx_ir.Node.attributes",
    "leanvit.export.view.rewrite": "onnx_ir.convenience.replace_nodes_and_values and onnx_ir.passes.common."
    "RemoveUnusedNodesPass",
    "leanvit.predict.classify": "leanvit.runtime.predict.find(predictor, paths, batch_size, options)",
    "leanvit.quant.allocate.Greedy": "leanvit.quant.greedy_mp.allocate",
    "leanvit.quant.allocate.plain_greedy": "leanvit.quant.greedy_mp.greedy_mp",
}
"""Names that have no successor of the same form, and what to use instead."""

GONE_MODULES = {
    "leanvit.quant.outliers": "benchmarks/outliers.py of the repository: it made hard networks for benchmarks",
}
"""Modules that are no part of the package any more, and where what they did is."""

NAMES_OF_RUNTIME = {
    **dict.fromkeys(("Predictor", "run_prepared"), "leanvit.runtime.predictor"),
    **dict.fromkeys(
        ("GOLDEN_NAME", "Logits", "MANIFEST_NAME", "MODEL_NAME", "Manifest", "SCHEMA_VERSION", "VERIFY_NAME",
         "load_golden", "load_golden_records", "read_manifest", "save_golden", "sqnr_db", "write_manifest"),
        "leanvit.runtime.bundle",
    ),
}  # fmt: skip
"""leanvit.runtime was one module and is a room now."""


def warn(old: str, new: str, stacklevel: int) -> None:
    """Say where something is now."""
    warnings.warn(f"{old} is {new} now; the old path goes with leanvit 0.3", FutureWarning, stacklevel=stacklevel)


def refuse(old: str) -> None:
    """Raise ImportError that says what to use instead of a name or module that is gone."""
    if new := GONE.get(old) or GONE_MODULES.get(old):
        raise ImportError(f"{old} went with leanvit 0.1. Use {new}.", name=old)


def find_name(module: str, name: str) -> Any:
    """A name of leanvit 0.1 of a module that is still there, for its __getattr__. Raises AttributeError for others."""
    old = f"{module}.{name}"
    refuse(old)
    if old not in NAMES:
        raise AttributeError(f"module '{module}' has no attribute '{name}'")
    # 4: past this function and the module's own, to who asks for the name.
    warn(old, NAMES[old], stacklevel=4)
    place, _, now = NAMES[old].rpartition(".")
    return getattr(importlib.import_module(place), now)


class _OldPaths:
    """A finder of modules that hands on to the new ones (the protocol of importlib's meta path)."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        refuse(name)
        if name not in MOVED:
            return None
        loader = cast("Loader", _Forward(MOVED[name]))
        return ModuleSpec(name, loader, is_package=any(old.startswith(f"{name}.") for old in MOVED))


class _Forward:
    """A loader of modules whose names are those of another module."""

    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> None:
        """An empty module, as Python makes it."""

    def exec_module(self, module: ModuleType) -> None:
        # 5: past the frames of importlib, to the import statement.
        warn(module.__name__, self.new, stacklevel=5)
        source = importlib.import_module(self.new)

        def get(name: str) -> Any:
            old = f"{module.__name__}.{name}"
            refuse(old)
            if old not in NAMES:
                return getattr(source, name)
            place, _, now = NAMES[old].rpartition(".")
            return getattr(importlib.import_module(place), now)

        module.__dict__["__getattr__"] = get
        module.__dict__["__doc__"] = source.__doc__


def install() -> None:
    """Make old paths importable; once."""
    if not any(isinstance(finder, type) and finder.__name__ == _OldPaths.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_OldPaths)
