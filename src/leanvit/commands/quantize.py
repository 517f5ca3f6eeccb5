"""leanvit quantize: quantize a network of any task after training, and measure what that costs."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.commands.inputs import named_by_data, open_network

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from leanvit import config as configs
    from leanvit.quant.elsewhere import Elsewhere


def run(config: configs.QuantizeConfig) -> int:
    """Quantize a checkpoint, measure it, and save it."""
    from leanvit.commands.measured import quantize_and_measure, save
    from leanvit.config import save_yaml
    from leanvit.export.onnx.profiles import require_known
    from leanvit.files import only_writer
    from leanvit.models import layout_of

    require_known(config.profile)
    network, info = open_network(config.model, config.load_options())
    if config.keep_tokens != 1.0:
        layout_of(network)  # what can't merge is refused before any data is read
    info = named_by_data(info, config.data)
    with only_writer(config.output), _helped(config) as elsewhere:
        quantized = quantize_and_measure(network, info, config, elsewhere=elsewhere)
        save_yaml(config, Path(config.output) / "config.yaml")
        folder = save(config.output, quantized, info)
    _print(config, quantized.report, folder)
    return errors.EXIT_OK


def _helped(config: configs.QuantizeConfig) -> AbstractContextManager[Elsewhere | None]:
    """What computes the losses of a search: a cluster, or None for this process."""
    if config.ray is None:
        return nullcontext()
    from leanvit.scale.search import searching

    return searching(config.ray, config.ray_workers)


def _print(config: configs.QuantizeConfig, report: dict[str, Any], folder: Path) -> None:
    from leanvit.export.explained import lines
    from leanvit.export.simulated import PROFILE_LOSSES_KEY
    from leanvit.runtime.task import task_named

    task = task_named(report["task"])
    before, after = (report[key][task.metric] for key in ("float_metrics", "metrics"))
    where = f"simulated in profile {report['profile']}" if report["profile"] else "simulated with every quantizer"
    print(f"{_bits(config, report)} {_found(report, after)}, {task.drop(before, after):+.2f} points lost, {where}")
    print(f"weights {report['quantized_bytes'] / 1e6:.2f} MB, float {report['float_bytes'] / 1e6:.2f} MB: {folder}")
    if report.get("search"):
        print(f"plan {folder / 'plan.json'}: {report['search']['evaluations']} evaluations; edit it, then --plan")
    for line in lines(report["explain"]) if report.get("explain") else []:
        print(f"- {line}")
    if losses := report.get(PROFILE_LOSSES_KEY):
        each = ", ".join(f"{name} {loss:.2g}" for name, loss in losses.items())
        print(f"- divergence of the outputs on calibration images by profile: {each}")
    print(f"next: leanvit export {config.output} --data {config.data}")


def _bits(config: configs.QuantizeConfig, report: dict[str, Any]) -> str:
    if not config.has_budget and not config.plan:
        return f"W{config.weight_bits}A{config.activation_bits}"
    return f"average {report['average_bits']:.2f} bits" if "average_bits" in report else "mixed bits"


def _found(report: dict[str, Any], value: float) -> str:
    """The metric in words; of a classifier also how many images that is."""
    counted = report["metrics"]
    if "correct" in counted:
        return f"top-1 {value:.2f}% ({counted['correct']} of {counted['images']})"
    return f"{report['metric']} {value:.4f}, float {report['float_metrics'][report['metric']]:.4f}"
