"""leanvit val: what a checkpoint, a quantized network or a bundle is worth on labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from leanvit import errors
from leanvit.commands.inputs import bundle_images, read_scenes
from leanvit.progress import note, print_json, print_table

if TYPE_CHECKING:
    from leanvit import config as configs
    from leanvit.annotations import SceneSet


def _accuracy(config: configs.ValConfig) -> dict[str, Any]:
    """Top-1 and top-5 alone."""
    from dataclasses import asdict

    from leanvit.data.loader import Loader, check_classes
    from leanvit.evaluation.run import read_images
    from leanvit.evaluation.subject import open_network
    from leanvit.export.gate.verify import run_logits, top1_percent
    from leanvit.runtime.bundle import is_bundle
    from leanvit.runtime.predictor import Predictor
    from leanvit.train import evaluate

    if is_bundle(Path(config.model)):
        predictor = Predictor(config.model, threads=config.threads, runtime=config.runtime or "onnxruntime")
        images, _ = read_images(config, predictor.manifest.data)
        evaluation = bundle_images(predictor.manifest, config.data, images, config.bad_images)
        logits = run_logits(predictor, evaluation.pixels, config.batch_size)
        top5 = (logits.argsort(1)[:, -5:] == evaluation.labels[:, None]).any(1)
        correct = int((logits.argmax(1) == evaluation.labels).sum())
        top1 = top1_percent(logits, evaluation.labels)
        return {"top1": top1, "top5": 100 * float(top5.mean()), "images": len(logits), "correct": correct}
    network, info, device = open_network(config)
    images, _ = read_images(config, {"val_fraction": info.val_fraction, "seed": info.seed})
    check_classes(images.classes, info.labels, config.data)
    loader = Loader(images, info.preprocess, config.batch_size, config.bad_images)
    return asdict(evaluate(network, loader, device))


def run(config: configs.ValConfig) -> int:
    """Accuracy of a checkpoint, quantized model or bundle, and on request all else that is known of its answers."""
    from leanvit.runtime.task_of import CLASSIFY, task_of

    if task_of(config.model) != CLASSIFY:
        return _run_task(config)
    if config.is_detailed:
        return _val_detailed(config)
    result = _accuracy(config)
    if config.json:
        print_json(result)
    else:
        counted = f"({result['correct']} of {result['images']} images)"
        print(f"top-1 {result['top1']:.2f}%  top-5 {result['top5']:.2f}%  {counted}")
    return errors.EXIT_OK


def _val_detailed(config: configs.ValConfig) -> int:
    from leanvit.evaluation.run import measure_model, print_result

    result = measure_model(config)
    if config.json:
        print_json(result)
    else:
        print_result(result)
    if config.output:
        note(f"next: leanvit report {config.output}")
    return errors.EXIT_OK


def _run_task(config: configs.ValConfig) -> int:
    """The task's metrics of a checkpoint, a quantized network or a bundle."""
    from leanvit.files import write_json
    from leanvit.runtime.answers import METRICS
    from leanvit.runtime.task_of import task_of

    if config.split == "test":
        raise errors.ConfigError("split is test, expected val or train: tasks have these two")
    for name in ("limit", "corruptions", "shifts", "detailed"):
        if getattr(config, name):
            raise errors.ConfigError(f"{name} is for classifiers, {config.model} has another task. Leave it out.")
    if config.bad_images != "fail":
        raise errors.ConfigError("bad_images is skip, expected fail: a task's metric is of all pictures")
    scenes = read_scenes(config.data, config.split, task_of(config.model))
    metrics = _metrics(config, scenes)
    if config.output:
        told = {"task": task_of(config.model), "model": config.model, "data": scenes.name}
        told["metric"] = METRICS[told["task"]]
        write_json(Path(config.output) / "val.json", told | {"metrics": metrics})
    if config.json:
        print_json(metrics)
        return errors.EXIT_OK
    _print_metrics(f"{config.model} on {scenes.name}", metrics)
    return errors.EXIT_OK


def _metrics(config: configs.ValConfig, scenes: SceneSet) -> dict[str, Any]:
    from leanvit.runtime.bundle import is_bundle

    if is_bundle(Path(config.model)):
        from leanvit.runtime.task_predictor import TaskPredictor
        from leanvit.tasks.measure import measure_bundle, require_classes

        runtime = config.runtime if config.runtime not in (None, "auto") else "onnxruntime"
        predictor = TaskPredictor(config.model, threads=config.threads, runtime=cast(Any, runtime))
        require_classes(predictor.labels, scenes)
        return measure_bundle(predictor, scenes)
    from leanvit.export.simulated import measured_form
    from leanvit.quant.parts import is_quantized_network, load_quantized_network
    from leanvit.tasks.build import load_network
    from leanvit.tasks.measure import measure_network
    from leanvit.train.setup import pick_device

    if is_quantized_network(config.model):
        quantized, info = load_quantized_network(config.model)
        form, _ = measured_form(quantized, config.profile)
        return measure_network(form, info, scenes, min(config.batch_size, 16))
    network, info = load_network(config.model)
    device = pick_device(config.device)
    return measure_network(network.to(device), info, scenes, min(config.batch_size, 16), device)


def _print_metrics(title: str, metrics: dict[str, Any]) -> None:
    rows = [[name, f"{value:.4f}"] for name, value in metrics.items() if isinstance(value, float)]
    print_table(title, ["metric", "value"], rows)
