"""leanvit val: what a checkpoint, a quantized network or a bundle of any task is worth on labelled data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leanvit import errors
from leanvit.progress import note, print_json

if TYPE_CHECKING:
    from leanvit import config as configs


def run(config: configs.ValConfig) -> int:
    """The task's metrics, and on request all else that is known of the model's predictions."""
    from leanvit.evaluation.run import measure_model, print_result
    from leanvit.export.onnx.profiles import require_known

    require_known(config.profile)
    result = measure_model(config)
    if config.json:
        print_json(result)
    else:
        print_result(result, f"{config.model} on {config.data}")
    if config.output:
        note(f"next: leanvit report {config.output}")
    return errors.EXIT_OK
