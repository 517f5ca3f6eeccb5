"""What the verbs of the command line do for the tasks; heavy imports happen inside."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from leanvit import errors
from leanvit.progress import note, print_json, print_table

if TYPE_CHECKING:
    from leanvit import config as configs
    from leanvit.scenes import SceneSet


def train(config: configs.TaskTrainConfig) -> int:
    """Train, and say where the result is."""
    from leanvit.downstream.answers import METRICS
    from leanvit.downstream.train import run

    result = run(config)
    print(f"best {METRICS[config.task]} {result.best:.4f} in {result.cpu_seconds / 60:.1f} CPU-minutes")
    print(f"checkpoint {result.checkpoint}")
    print(f"next: leanvit quantize {config.output} --data {config.data}")
    return errors.EXIT_OK


def _scenes(data: str, split: Any, task: str) -> SceneSet:
    from leanvit.downstream.train import report_problems
    from leanvit.scenes.load import load_scenes

    scenes = load_scenes(data, split, task=cast(Any, task))
    report_problems(scenes)
    return scenes


def val(config: configs.ValConfig) -> int:
    """The task's metrics of a checkpoint, a quantized network or a bundle."""
    from leanvit.downstream.answers import METRICS
    from leanvit.files import write_json
    from leanvit.route import task_of

    if config.split == "test":
        raise errors.ConfigError("split is test, expected val or train: tasks have these two")
    for name in ("limit", "corruptions", "shifts", "detailed"):
        if getattr(config, name):
            raise errors.ConfigError(f"{name} is for classifiers, {config.model} has another task. Leave it out.")
    if config.bad_images != "fail":
        raise errors.ConfigError("bad_images is skip, expected fail: a task's metric is of all pictures")
    scenes = _scenes(config.data, config.split, task_of(config.model))
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
    from leanvit.export.bundle import is_bundle

    if is_bundle(Path(config.model)):
        from leanvit.downstream.export import measure_bundle
        from leanvit.downstream.measure import require_classes
        from leanvit.downstream.predictor import TaskPredictor

        runtime = config.runtime if config.runtime not in (None, "auto") else "onnxruntime"
        predictor = TaskPredictor(config.model, threads=config.threads, runtime=cast(Any, runtime))
        require_classes(predictor.labels, scenes)
        return measure_bundle(predictor, scenes)
    from leanvit.downstream.measure import measure_network
    from leanvit.downstream.quantize import is_quantized_network, load_quantized_network
    from leanvit.tasks.build import load_network
    from leanvit.train.setup import pick_device

    if is_quantized_network(config.model):
        quantized, info = load_quantized_network(config.model)
        return measure_network(quantized.module, info, scenes, min(config.batch_size, 16))
    network, info = load_network(config.model)
    device = pick_device(config.device)
    return measure_network(network.to(device), info, scenes, min(config.batch_size, 16), device)


def _print_metrics(title: str, metrics: dict[str, Any]) -> None:
    rows = [[name, f"{value:.4f}"] for name, value in metrics.items() if isinstance(value, float)]
    print_table(title, ["metric", "value"], rows)


def quantize(config: configs.QuantizeConfig) -> int:
    """Quantize a task's network part by part, measure it, and save it."""
    from leanvit.config import save_yaml
    from leanvit.downstream.quantize import quantize_and_measure, save_network
    from leanvit.files import only_writer
    from leanvit.tasks.build import load_network

    network, info = load_network(config.model)
    with only_writer(config.output):
        quantized = quantize_and_measure(network, info, config, config.scheme())
        save_yaml(config, Path(config.output) / "config.yaml")
        folder = save_network(config.output, quantized, info)
    report = quantized.report
    before, after = (report[key][report["metric"]] for key in ("float_metrics", "metrics"))
    print(f"{report['metric']} {after:.4f}, float {before:.4f}: {100 * (before - after):+.2f} points lost")
    print(f"weights {report['quantized_bytes'] / 1e6:.2f} MB, float {report['float_bytes'] / 1e6:.2f} MB: {folder}")
    print(f"next: leanvit export {config.output} --data {config.data}")
    return errors.EXIT_OK


def export(config: configs.ExportConfig) -> int:
    """Write a bundle with pre- and post-processing inside, proven in the runtime."""
    from leanvit.config import save_yaml
    from leanvit.downstream.export import export_network
    from leanvit.downstream.quantize import is_quantized_network, load_quantized_network
    from leanvit.tasks.build import load_network

    if config.min_speedup not in (0, type(config).min_speedup):
        raise errors.ConfigError(
            f"min_speedup is for classifiers, {config.model} has another task. Leave it out and time the bundles: "
            "leanvit benchmark FLOAT QUANTIZED"
        )
    quantized = is_quantized_network(config.model)
    model, info = load_quantized_network(config.model) if quantized else load_network(config.model)
    scenes = _scenes(config.data, "val", info.task) if config.data else None
    bundle = export_network(
        model,
        info,
        config.output,
        profile=config.profile,
        scenes=scenes,
        float_metric=_float_metric(model, info, config),
        max_drop=config.max_drop,
        runtimes=config.runtimes or ("onnxruntime",),
        opset=config.opset,
    )
    save_yaml(config, bundle.with_name(f"{bundle.name}.config.yaml"))
    print(f"bundle {bundle}: every check passed" + ("" if config.data else "; metric NOT verified (give --data)"))
    print(f"next: leanvit predict {bundle} IMAGE --draw drawn")
    return errors.EXIT_OK


def _float_metric(model: Any, info: Any, config: configs.ExportConfig) -> float | None:
    """The float network's metric, as it was measured on the same data."""
    from leanvit.downstream.answers import METRICS
    from leanvit.downstream.quantize import QuantizedNetwork

    if not config.data:
        return None
    measured = info.metrics if info.data == config.data else None
    if isinstance(model, QuantizedNetwork):
        measured = model.report["float_metrics"] if model.report["data"] == config.data else None
    if not measured:
        note(f"the float network was not measured on {config.data}: the drop is not checked")
        return None
    return float(measured[METRICS[info.task]])


def verify(config: configs.VerifyConfig) -> int:
    """Check a bundle."""
    from leanvit.downstream.verify import verify_task_bundle
    from leanvit.export.verify import print_verdict, require_passed
    from leanvit.route import task_of

    if config.model:
        raise errors.ConfigError("model is for classifiers: a task's bundle is checked on golden pictures and --data")
    scenes = _scenes(config.data, "val", task_of(config.bundle)) if config.data else None
    result = verify_task_bundle(config.bundle, scenes)
    print_verdict(result, config.bundle, as_json=config.json)
    require_passed(result, config.bundle)
    return errors.EXIT_OK


def predict(config: configs.PredictConfig) -> int:
    """Objects, class maps or keypoints of pictures."""
    from leanvit.downstream.predict import run

    run(config)
    return errors.EXIT_OK


def data_inspect(config: configs.DataInspectConfig) -> int:
    """Look at every annotated picture of a data set."""
    from leanvit.inspection import PAGE_NAME, require_readable, run

    result = run(config)
    if config.json:
        print_json(result)
    else:
        _print_inspection(result)
        print(f"page {Path(config.output) / PAGE_NAME}")
    require_readable(result)
    return errors.EXIT_OK


def _print_inspection(result: dict[str, Any]) -> None:
    from leanvit.inspection import PROBLEMS_SHOWN

    rows = []
    for split, part in result["parts"].items():
        sides = [" / ".join(f"{v:g}" for v in (part[side] or {}).values()) for side in ("width", "height")]
        counts = [str(part[key]) for key in ("images", "objects", "crowds")]
        rows.append([split, *counts, *sides, str(len(part["problems"])), str(len(part["corrupt"]))])
    sizes = ["width: min / median / max", "height"]
    columns = ["part", "pictures", "objects", "crowds", *sizes, "problems", "can't be read"]
    print_table(f"{result['data']}, {result['task']}", columns, rows)
    shares = result["task"] == "semantic"
    rows = [[name, *(_of_class(part, name, shares) for part in result["parts"].values())] for name in result["classes"]]
    print_table("share of pixels" if shares else "objects", ["class", *result["parts"]], rows)
    copies = result["duplicates"]
    print(f"{copies['extra']} duplicates, in {len(copies['groups'])} groups: {copies['leaks']} are in both parts")
    problems = [problem for part in result["parts"].values() for problem in part["problems"]]
    for problem in problems[:PROBLEMS_SHOWN]:
        print(f"problem: {problem}")
    if len(problems) > PROBLEMS_SHOWN:
        print(f"{len(problems) - PROBLEMS_SHOWN} more problems: inspect.json names them all")


def _of_class(part: dict[str, Any], name: str, shares: bool) -> str:
    """A dash where this part has no such class, which stands among its problems."""
    value = (part["pixels"]["shares"] if shares else part["per_class"]).get(name)
    return "–" if value is None else f"{value:.2%}" if shares else str(value)
