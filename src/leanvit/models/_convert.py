"""Authors' checkpoints become leanvit models: one entry for every family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from leanvit.errors import CheckpointError, ConfigError, did_you_mean
from leanvit.models import _convert_exmobilevit, _convert_remvit, _convert_reswin, _convert_revit, _convert_vitae
from leanvit.models.exmobilevit import ExMobileViT
from leanvit.models.remvit import ReMViT
from leanvit.models.reswin import ReSwin
from leanvit.models.revit import ReViT
from leanvit.models.vitae import ViTAE
from leanvit.models.vitaev2 import ViTAEv2

_EXMOBILEVIT = (_convert_exmobilevit.convert, ExMobileViT)
FAMILIES: dict[str, tuple[Any, type[nn.Module]]] = {
    "revit": (_convert_revit.convert, ReViT),
    "remvitv2": (_convert_remvit.convert, ReMViT),
    "reswin": (_convert_reswin.convert, ReSwin),
    "mobilevit": _EXMOBILEVIT,
    "exmobilevit_576": _EXMOBILEVIT,
    "exmobilevit_640": _EXMOBILEVIT,
    "exmobilevit_928": _EXMOBILEVIT,
    "vitae": (_convert_vitae.convert, ViTAE),
    "vitaev2": (_convert_vitae.convert, ViTAEv2),
}
_WRAPPERS = ("model_state", "state_dict_ema", "state_dict", "model")


def from_official(family: str, state_dict: Mapping[str, Any], config: dict[str, Any] | None = None) -> nn.Module:
    """Build the model of an authors' checkpoint, in eval mode, equal to their program to 1e-4.

    family: revit, remvitv2, reswin, mobilevit, exmobilevit_{576,640,928}, vitae or vitaev2.
    state_dict: the authors' key names; a checkpoint that wraps it under a usual key is unwrapped.
    config: settings of a reduced network in the authors' names; None for the published ones.
    Raises ConfigError for an unknown family, CheckpointError that lists unknown, missing and misshapen keys.
    """
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"unknown family '{family}'.{did_you_mean(family, FAMILIES)} Families: {known}")
    convert, model_class = FAMILIES[family]
    converted = convert(unwrap(state_dict), config)
    model: nn.Module = model_class(**converted.kwargs)
    model.load_state_dict(converted.state_dict, strict=True)
    return model.eval()


def unwrap(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights inside a training checkpoint, without the prefix of DistributedDataParallel.

    Raises CheckpointError where there are none.
    """
    for key in _WRAPPERS:
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    weights = {name.removeprefix("module."): t for name, t in checkpoint.items() if isinstance(t, Tensor)}
    if not weights:
        raise CheckpointError(
            f"no weights in the checkpoint; its keys are {', '.join(map(str, list(checkpoint)[:5]))}. "
            f"Expected tensors, or one of {', '.join(_WRAPPERS)}."
        )
    return weights
