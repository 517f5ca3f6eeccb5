"""leanvit convert: any network, or a checkpoint of the papers' authors, becomes a leanvit checkpoint."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from leanvit import errors
from leanvit.checkpoint import CheckpointInfo, save_checkpoint
from leanvit.config import ConvertConfig, Preprocess
from leanvit.errors import CheckpointError, ConfigError, VerificationError
from leanvit.load import files, own
from leanvit.load.api import load_classifier
from leanvit.load.describe import adjusted
from leanvit.load.labels import labels_for
from leanvit.load.state_dicts import without_prefixes
from leanvit.models import model_names
from leanvit.models._convert import FAMILIES, from_official
from leanvit.models.exmobilevit import ExMobileViT


def convert_checkpoint(config: ConvertConfig) -> str:
    """Convert `config.checkpoint` to `config.output`; returns the architecture's name.

    A file of the papers' authors is recognised by trying each family; all else is what leanvit.load takes.
    Raises CheckpointError where the file can't be read safely or fits nothing, ConfigError for an unknown family or a
    network that is none of the registered ones.
    """
    model, info = _authors_network(config) or _any_network(config)
    save_checkpoint(config.output, model, info)
    _require_equal(model, load_classifier(config.output)[0], info.preprocess, config.output)
    return info.architecture


def _any_network(config: ConvertConfig) -> tuple[nn.Module, CheckpointInfo]:
    try:
        return load_classifier(config.checkpoint, config.load_options())
    except CheckpointError as error:
        if not files.claims(config.checkpoint):
            raise
        raise CheckpointError(f"{error} (The file fits no family of the papers' authors either.)") from error


def _authors_network(config: ConvertConfig) -> tuple[nn.Module, CheckpointInfo] | None:
    """The network of an authors' checkpoint and its description; None where the file is of none of their families.

    Raises CheckpointError where --family is given and the file does not fit it.
    """
    if config.family is None and (
        config.model_name or not files.claims(config.checkpoint) or own.claims(config.checkpoint)
    ):
        return None
    weights = files.read_weights(config.checkpoint, ema=config.ema)
    found = _build(without_prefixes(weights.tensors), config.family)
    if found is None:
        return None
    family, model = found
    architecture = _architecture(family, model)
    info = CheckpointInfo(
        architecture=architecture,
        labels=labels_for(int(model.num_classes), None, config.checkpoint),
        preprocess=_preprocess(architecture),
        # The authors' ExMobileViT pools a corner of its maps; only their weights want that.
        kwargs={"pool": "official"} if isinstance(model, ExMobileViT) else {},
    )
    return model, adjusted(model, info, config.load_options(), config.checkpoint)


@torch.inference_mode()
def _require_equal(model: nn.Module, loaded: nn.Module, preprocess: Preprocess, path: str) -> None:
    """Raise VerificationError where the written checkpoint does not return the converted network's logits."""
    x = torch.randn(1, preprocess.channels, *preprocess.input_size, generator=torch.Generator().manual_seed(0))
    difference = float((model(x) - loaded(x)).abs().max())
    if difference > 1e-4:
        raise VerificationError(
            f"{path}: logits differ by {difference:.2g} from the converted network, expected at most 1e-4. "
            "Report this with the family's name."
        )


def _build(tensors: dict[str, Tensor], family: str | None) -> tuple[str, Any] | None:
    if family is not None:
        return family, from_official(family, tensors)
    for name in FAMILIES:
        with contextlib.suppress(CheckpointError, ConfigError):
            return name, from_official(name, tensors)
    return None


def _architecture(family: str, model: Any) -> str:
    """The registered name whose network has these parameters."""
    import timm

    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in model_names():
        with torch.device("meta"):
            candidate = timm.create_model(name, num_classes=model.num_classes)
        same = {name: tuple(t.shape) for name, t in candidate.state_dict().items()} == shapes
        if same and type(candidate) is type(model):
            return name
    raise ConfigError(
        f"the checkpoint is a {family} of sizes that no registered architecture has. "
        "Build it in Python: leanvit.models.from_official(family, state_dict)."
    )


def _preprocess(architecture: str) -> Preprocess:
    """Preprocessing of a registered architecture."""
    import timm

    from leanvit.checkpoint import preprocess_for

    with torch.device("meta"):
        return preprocess_for(timm.create_model(architecture))


def run(config: ConvertConfig) -> int:
    """Convert a network."""
    print(f"{config.output}: {convert_checkpoint(config)}")
    return errors.EXIT_OK
