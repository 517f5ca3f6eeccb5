"""leanvit quantize: quantize a network after training, and measure what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.commands.inputs import load_model

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.QuantizeConfig) -> int:
    """Quantize a checkpoint, measure it, and save it."""
    from leanvit.export.onnx.profiles import require_known
    from leanvit.runtime.task_of import CLASSIFY, task_of

    require_known(config.profile)
    if task_of(config.model) != CLASSIFY:
        return _run_task(config)
    from leanvit.commands.quantize_classifier import quantize_and_measure
    from leanvit.config import save_yaml
    from leanvit.files import only_writer
    from leanvit.quant.store import save_quantized

    model, info = load_model(config.model)
    with only_writer(config.output):
        journal = Path(config.output) / "search.jsonl" if config.has_budget else None
        quantized, accuracy = quantize_and_measure(model, info, config, config.scheme(), journal)
        save_yaml(config, Path(config.output) / "config.yaml")
        path = save_quantized(config.output, quantized, info)
    report = quantized.report
    name = f"average {report['average_bits']:.2f} bits" if config.has_budget or config.plan else (
        f"W{config.weight_bits}A{config.activation_bits}"
    )  # fmt: skip
    drop = report["float_accuracy"]["top1"] - accuracy["top1"]
    measured = f"top-1 {accuracy['top1']:.2f}% ({accuracy['correct']} of {accuracy['images']})"
    print(f"{name} {measured}, {drop:+.2f} points lost, {_where(report)}")
    print(f"weights {report['quantized_bytes'] / 1e6:.2f} MB, float {report['float_bytes'] / 1e6:.2f} MB: {path}")
    if report["search"]:
        print(
            f"plan {path.with_name('plan.json')}: {report['search']['evaluations']} evaluations; edit it, then --plan"
        )
    print(f"next: leanvit export {config.output} --data {config.data}")
    return errors.EXIT_OK


def _where(report: dict[str, Any]) -> str:
    """In which form accuracy was measured."""
    return f"simulated in profile {report['profile']}" if report["profile"] else "simulated with every quantizer"


def _run_task(config: configs.QuantizeConfig) -> int:
    """Quantize a task's network part by part, measure it, and save it."""
    from leanvit.commands.quantize_task import quantize_and_measure
    from leanvit.config import save_yaml
    from leanvit.files import only_writer
    from leanvit.quant.parts import save_network
    from leanvit.tasks.build import load_network

    network, info = load_network(config.model)
    with only_writer(config.output):
        quantized = quantize_and_measure(network, info, config, config.scheme())
        save_yaml(config, Path(config.output) / "config.yaml")
        folder = save_network(config.output, quantized, info)
    report = quantized.report
    before, after = (report[key][report["metric"]] for key in ("float_metrics", "metrics"))
    drop = 100 * (before - after)
    print(f"{report['metric']} {after:.4f}, float {before:.4f}: {drop:+.2f} points lost, {_where(report)}")
    print(f"weights {report['quantized_bytes'] / 1e6:.2f} MB, float {report['float_bytes'] / 1e6:.2f} MB: {folder}")
    print(f"next: leanvit export {config.output} --data {config.data}")
    return errors.EXIT_OK
