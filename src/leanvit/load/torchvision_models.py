"""Source: torchvision:NAME[.WEIGHTS], the classifiers of torchvision."""

from __future__ import annotations

from typing import Any

from torch import nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import LoadOptions, Preprocess
from leanvit.errors import CheckpointError, UnknownModelError, did_you_mean
from leanvit.load.hub import require_reachable
from leanvit.load.labels import labels_for
from leanvit.load.source import Source
from leanvit.load.timm_names import require_no_other_name

KIND = "torchvision"
_PREFIX = "torchvision:"


def open_spec(spec: str, options: LoadOptions) -> tuple[nn.Module, CheckpointInfo]:
    """A classifier with its weights; those that torchvision takes by default where none are named.

    Raises UnknownModelError, CheckpointError where the weights are not there or, within seconds, can't be fetched.
    """
    from torchvision import models

    name, _, wanted = spec.removeprefix(_PREFIX).partition(".")
    known = models.list_models(module=models)
    if name not in known:
        raise UnknownModelError(f"torchvision has no classifier '{name}'.{did_you_mean(name, known)}")
    require_no_other_name(spec, name, options)
    weights = _weights(name, wanted, spec)
    require_reachable(weights.url, spec)
    network = models.get_model(name, weights=weights).eval()
    names = weights.meta.get("categories")
    labels = labels_for(len(names or ()), names, spec)
    return network, CheckpointInfo(name, labels, _preprocess(weights), source={"kind": KIND, "name": name})


def _weights(name: str, wanted: str, spec: str) -> Any:
    from torchvision import models

    known = list(models.get_model_weights(name))
    if not known:
        raise CheckpointError(f"{spec}: torchvision has no weights of {name}. Take another network.")
    if not wanted:
        return models.get_model_weights(name).DEFAULT
    found = next((one for one in known if one.name == wanted), None)
    if found is None:
        names = [one.name for one in known]
        raise CheckpointError(f"{spec}: no such weights.{did_you_mean(wanted, names)} Known: {', '.join(names)}")
    return found


def _preprocess(weights: Any) -> Preprocess:
    """As torchvision's own transform of these weights: the shorter side resized, the middle cropped."""
    told = weights.transforms()
    crop, side = int(told.crop_size[0]), int(told.resize_size[0])
    return Preprocess(
        (crop, crop), tuple(map(float, told.mean)), tuple(map(float, told.std)), str(told.interpolation.value),  # type: ignore[arg-type]
        crop / side,
    )  # fmt: skip


def build(info: CheckpointInfo) -> nn.Module:
    """The network of a description with random weights."""
    from torchvision import models

    network: nn.Module = models.get_model(info.source["name"], weights=None, num_classes=len(info.labels))
    return network


SOURCE = Source(
    name=KIND,
    form="torchvision:NAME[.WEIGHTS]",
    claims=lambda spec: spec.startswith(_PREFIX),
    open=open_spec,
    build=build,
)
