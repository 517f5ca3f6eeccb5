"""leanvit export: write a network as a bundle that has passed the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.commands.inputs import known_float_top1, load_model, read_scenes
from leanvit.progress import note

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.ExportConfig) -> int:
    """Write a bundle."""
    from leanvit.export.onnx.profiles import require_known
    from leanvit.runtime.task_of import CLASSIFY, task_of

    require_known(config.profile)
    if task_of(config.model) != CLASSIFY:
        return _run_task(config)
    from leanvit.config import save_yaml
    from leanvit.data.loader import check_classes
    from leanvit.data.sets import load_split
    from leanvit.export.api import export as run_it
    from leanvit.quant.store import is_quantized, load_quantized
    from leanvit.runtime.bundle import read_manifest

    quantized = is_quantized(config.model)
    model, info = load_quantized(config.model) if quantized else load_model(config.model)
    images = float_top1 = None
    if config.data:
        images = load_split(config.data, "val", val_fraction=info.val_fraction, seed=info.seed)
        check_classes(images.classes, info.labels, config.data)
        float_top1 = known_float_top1(model, info, config)
    bundle = run_it(
        model,
        config.output,
        config.options(),
        labels=info.labels,
        preprocess=info.preprocess,
        images=images,
        float_top1=float_top1,
        architecture=info.architecture,
        data={"name": info.data, "val_fraction": info.val_fraction, "seed": info.seed},
    )
    save_yaml(config, bundle.with_name(f"{bundle.name}.config.yaml"))
    print(f"runs in {', '.join(read_manifest(bundle).runtimes)}")
    print(f"bundle {bundle}: every check passed" + ("" if config.data else "; accuracy NOT verified (give --data)"))
    print(f"next: leanvit predict {bundle} IMAGE")
    return errors.EXIT_OK


def _run_task(config: configs.ExportConfig) -> int:
    """Write a bundle with pre- and post-processing inside, proven in the runtime."""
    from leanvit.config import save_yaml
    from leanvit.export.tasks import export_network
    from leanvit.quant.parts import is_quantized_network, load_quantized_network
    from leanvit.tasks.build import load_network

    if config.min_speedup not in (0, type(config).min_speedup):
        raise errors.ConfigError(
            f"min_speedup is for classifiers, {config.model} has another task. Leave it out and time the bundles: "
            "leanvit benchmark FLOAT QUANTIZED"
        )
    quantized = is_quantized_network(config.model)
    model, info = load_quantized_network(config.model) if quantized else load_network(config.model)
    scenes = read_scenes(config.data, "val", info.task) if config.data else None
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
    from leanvit.quant.parts import QuantizedNetwork
    from leanvit.runtime.answers import METRICS

    if not config.data:
        return None
    measured = info.metrics if info.data == config.data else None
    if isinstance(model, QuantizedNetwork):
        measured = model.report["float_metrics"] if model.report["data"] == config.data else None
    if not measured:
        note(f"the float network was not measured on {config.data}: the drop is not checked")
        return None
    return float(measured[METRICS[info.task]])
