"""leanvit verify: let the gate check a bundle again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from leanvit import errors
from leanvit.commands.inputs import bundle_images, read_scenes

if TYPE_CHECKING:
    from leanvit import config as configs


def _network_as_exported(path: str, manifest: Any) -> Any:
    """The torch network that a bundle was written from, in the form that its profile runs."""
    from leanvit.checkpoint import load_checkpoint
    from leanvit.export.simulated import simulated
    from leanvit.quant.store import is_quantized, load_quantized

    if not is_quantized(path):
        return load_checkpoint(path)[0]
    quantized, _ = load_quantized(path)
    return simulated(quantized, manifest.profile, manifest.quantization.get("lifted", ()))


def run(config: configs.VerifyConfig) -> int:
    """Check a bundle."""
    from leanvit.runtime.task_of import CLASSIFY, task_of

    if task_of(config.bundle) != CLASSIFY:
        return _run_task(config)
    from dataclasses import replace

    from leanvit.data.sets import load_split
    from leanvit.export.gate.check import print_verdict, require_passed
    from leanvit.export.gate.verify import verify_bundle
    from leanvit.runtime.bundle import read_manifest

    manifest = read_manifest(config.bundle)
    evaluation = None
    if config.data:
        split = {key: manifest.data[key] for key in ("val_fraction", "seed") if key in manifest.data}
        evaluation = bundle_images(manifest, config.data, load_split(config.data, "val", **split))
    if config.model:
        from leanvit.export.api import synthetic_images, torch_logits
        from leanvit.export.gate.verify import Evaluation

        network = _network_as_exported(config.model, manifest)
        if evaluation is None:
            import numpy as np

            pixels = np.stack(synthetic_images(32, manifest.preprocess.input_size, seed=1))
            evaluation = Evaluation(pixels, np.full(len(pixels), -1, np.int64), "synthetic images")
        expected = torch_logits(network, evaluation.pixels, manifest.preprocess)
        evaluation = replace(evaluation, expected=expected)
    result = verify_bundle(config.bundle, evaluation)
    print_verdict(result, config.bundle, as_json=config.json)
    require_passed(result, config.bundle)
    return errors.EXIT_OK


def _run_task(config: configs.VerifyConfig) -> int:
    """Check a bundle."""
    from leanvit.export.gate.check import print_verdict, require_passed
    from leanvit.export.gate.tasks import verify_task_bundle
    from leanvit.runtime.task_of import task_of

    if config.model:
        raise errors.ConfigError("model is for classifiers: a task's bundle is checked on golden pictures and --data")
    scenes = read_scenes(config.data, "val", task_of(config.bundle)) if config.data else None
    result = verify_task_bundle(config.bundle, scenes)
    print_verdict(result, config.bundle, as_json=config.json)
    require_passed(result, config.bundle)
    return errors.EXIT_OK
