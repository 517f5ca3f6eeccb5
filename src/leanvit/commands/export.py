"""leanvit export: write a network of any task as a bundle that has passed the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.commands.inputs import read_own_data

if TYPE_CHECKING:
    from leanvit import config as configs
    from leanvit.runtime.bundle import Manifest


def run(config: configs.ExportConfig) -> int:
    """Write a bundle."""
    from leanvit.commands.measured import float_metric
    from leanvit.config import save_yaml
    from leanvit.export.api import export as run_it
    from leanvit.export.onnx.profiles import require_known
    from leanvit.quant.parts import load_any
    from leanvit.runtime.bundle import read_manifest

    require_known(config.profile)
    model, info = load_any(config.model, config.load_options())
    data, before = None, None
    if config.data:
        info, data = read_own_data(info, config.data, "val")
        before = float_metric(model, info, data, str(config.data), config.batch_size)
    bundle = run_it(
        model, config.output, config.options(), info=info, images=data, float_metric=before,
        batch_size=config.batch_size,
    )  # fmt: skip
    save_yaml(config, bundle.with_name(f"{bundle.name}.config.yaml"))
    manifest = read_manifest(bundle)
    print(f"runs in {', '.join(manifest.runtimes)}")
    print(f"bundle {bundle}: every check passed" + ("" if config.data else "; accuracy NOT verified (give --data)"))
    if config.explain:
        _explain(model, manifest)
    print(f"next: leanvit predict {bundle} IMAGE")
    return errors.EXIT_OK


def _explain(model: Any, manifest: Manifest) -> None:
    """What of a bundle runs on integer kernels, and which sites cost most, as quantize found it."""
    from torch import nn

    from leanvit.export.explain import integer_share
    from leanvit.export.explained import lines
    from leanvit.export.onnx.profiles import find

    if isinstance(model, nn.Module):
        print("- all of a float network runs in float; for integer kernels: leanvit quantize, or leanvit optimize")
        return
    found = integer_share(model, find(manifest.profile), manifest.quantization.get("lifted", []))
    known = model.report.get("explain") or {}
    costs = known.get("costs", []) if known.get("profile") == manifest.profile else []
    for line in lines(found | {"costs": costs}):
        print(f"- {line}")
    if not costs:
        print(f"- what each site costs was not measured in profile {manifest.profile}: quantize with --profile of it")
