"""leanvit verify: let the gate check a bundle of any task again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leanvit import errors

if TYPE_CHECKING:
    from leanvit import config as configs
    from leanvit.export.gate.evaluation import Evaluation


def run(config: configs.VerifyConfig) -> int:
    """Check a bundle."""
    from leanvit.export.gate.check import print_verdict, require_passed
    from leanvit.export.gate.verify import verify_bundle
    from leanvit.runtime.bundle import read_manifest

    # A folder that is no bundle, or a file that is not the one that was written, is an error and no verdict.
    read_manifest(config.bundle)
    result = verify_bundle(config.bundle, _evaluation(config))
    print_verdict(result, config.bundle, as_json=config.json)
    require_passed(result, config.bundle)
    return errors.EXIT_OK


def _evaluation(config: configs.VerifyConfig) -> Evaluation | None:
    """What the bundle is measured on and compared with; needs torch only where data or a network is given."""
    from leanvit.runtime.bundle import read_manifest

    if not config.data and not config.model:
        return None
    from leanvit.evaluation.readable import readable
    from leanvit.export.data import agreed_classes, evaluation_of, read_data, synthetic_evaluation

    manifest = read_manifest(config.bundle)
    evaluation = None
    if config.data:
        data = read_data(manifest.task, config.data, "val", **manifest.data)
        _, data = agreed_classes(manifest.labels, data, config.data)
        if config.bad_images == "skip":
            data = readable(manifest.task, data, manifest.preprocess)
        evaluation = evaluation_of(manifest.task, data, manifest.preprocess)
    if not config.model:
        return evaluation
    return _compared(config.model, manifest, evaluation or synthetic_evaluation(manifest.preprocess))


def _compared(path: str, manifest: Any, evaluation: Evaluation) -> Evaluation:
    """With the outputs of the network that a bundle was written from, in the form that its profile runs.

    Raises ConfigError where that network has another task.
    """
    from dataclasses import replace

    from torch import nn

    from leanvit.export.network import network_outputs
    from leanvit.export.simulated import simulated
    from leanvit.quant.parts import load_any

    model, info = load_any(path)
    if info.task != manifest.task:
        raise errors.ConfigError(
            f"model {path} is for task {info.task}, the bundle for {manifest.task}, expected the network that the "
            "bundle was written from. Give its checkpoint or quantized folder."
        )
    if not isinstance(model, nn.Module):
        model = simulated(model, manifest.profile, manifest.quantization.get("lifted", ()))
    told = replace(info, preprocess=manifest.preprocess)
    return replace(evaluation, expected=network_outputs(model, told, evaluation.pixels))
