"""leanvit export: write a network of any task as a bundle that has passed the gate."""

from __future__ import annotations

from pathlib import Path
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
    from leanvit.evaluation.readable import readable
    from leanvit.export.api import export as run_it
    from leanvit.export.onnx.profiles import require_known
    from leanvit.quant.parts import load_any
    from leanvit.runtime.bundle import is_bundle, read_manifest

    if config.triton and is_bundle(Path(config.model)):
        _refuse_others(config)
        _add_to_triton(Path(config.model), config.triton)
        return errors.EXIT_OK
    require_known(config.profile)
    model, info = load_any(config.model, config.load_options())
    data, before = None, None
    if config.data:
        info, data = read_own_data(info, config.data, "val")
        if config.bad_images == "skip":
            data = readable(info.task, data, info.preprocess)
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
    if config.triton:
        _add_to_triton(bundle, config.triton)
    print(f"next: leanvit predict {bundle} IMAGE")
    return errors.EXIT_OK


def _refuse_others(config: configs.ExportConfig) -> None:
    """Raise ConfigError for options that say how a bundle is made, where it is made already."""
    from dataclasses import fields

    from leanvit.config.base import flag_of

    others = [item for item in fields(config) if item.name not in ("model", "triton", "version")]
    if given := [flag_of(item) for item in others if getattr(config, item.name) != item.default]:
        raise errors.ConfigError(
            f"{', '.join(given)}: of an export, but {config.model} is a bundle already. Leave it out, or give the "
            "network."
        )


def _add_to_triton(bundle: Path, repository: str) -> None:
    from leanvit.export.triton import saturates, write_triton
    from leanvit.runtime.bundle import read_manifest

    version = write_triton(bundle, repository)
    print(f"triton model {version.parent}, version {version.name}: the bundle as it is")
    if saturates(read_manifest(version)):
        print("- on a CPU without VNNI its int8 products saturate in Triton's ONNX Runtime: use leanvit serve there")
    print(f"next: tritonserver --model-repository={Path(repository).resolve()}")


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
