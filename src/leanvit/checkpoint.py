"""Checkpoints: one safetensors file that carries the weights, the architecture, the labels and the preprocessing."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from leanvit.config import Preprocess, from_dict, to_dict
from leanvit.errors import CheckpointError, ConfigError, UnknownModelError, did_you_mean
from leanvit.files import write_atomic
from leanvit.timm_input import input_config

if TYPE_CHECKING:
    from leanvit.models import Layout

CHECKPOINT_NAME = "model.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint says of its weights.

    architecture: timm name. kwargs: arguments of timm.create_model beside num_classes.
    labels: class names in the order of the logits. metrics: what was measured, e.g. {"top1": 98.6}.
    task: "classify", or what a network with another head does (leanvit.tasks). head: arguments of that head.
    keypoints: of a pose network: names, swapped, sigmas and skeleton (leanvit.annotations.KeypointScheme).
    source: how leanvit.load builds a network that timm does not: {"kind": "transformers", ...}; empty for timm's.
    """

    architecture: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    kwargs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    data: str | None = None
    val_fraction: float = 0.2
    seed: int = 0
    task: str = "classify"
    head: dict[str, Any] = field(default_factory=dict)
    keypoints: dict[str, Any] | None = None
    source: dict[str, Any] = field(default_factory=dict)
    version: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as files keep them; `source` is among them where there is one."""
        values = to_dict(self)
        return values if self.source else {key: value for key, value in values.items() if key != "source"}


def build(
    architecture: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    keep_tokens: float | Sequence[int] = 1.0,
    **kwargs: Any,
) -> nn.Module:
    """timm.create_model with errors that help. keep_tokens: see leanvit.models.merge_tokens.

    Raises UnknownModelError for a name that is not registered, ConfigError for an argument that the
    architecture does not take, CheckpointError where pretrained weights are not on this machine.
    """
    network = _create(architecture, num_classes, pretrained=pretrained, **kwargs)
    return network if keep_tokens == 1.0 else with_merged_tokens(network, keep_tokens)


def with_merged_tokens(network: nn.Module, keep_tokens: float | Sequence[int]) -> nn.Module:
    """merge_tokens, imported where it is asked for: it needs timm. Raises ConfigError."""
    from leanvit.models import merge_tokens

    return merge_tokens(network, keep_tokens)


def merging_layout(network: nn.Module) -> Layout:
    """leanvit.models.layout_of, likewise. Raises ConfigError."""
    from leanvit.models import layout_of

    return layout_of(network)


def _create(architecture: str, num_classes: int, *, pretrained: bool, **kwargs: Any) -> nn.Module:
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    name = architecture.split(".")[0]
    if not timm.is_model(name):
        known = timm.list_models()
        raise UnknownModelError(f"Unknown model '{architecture}'.{did_you_mean(name, known)} Run: leanvit models")
    try:
        return timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes, **kwargs)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        argument = str(error).rpartition("'")[0].rpartition("'")[2]
        raise ConfigError(
            f"model '{architecture}' takes no {argument}. Leave --{argument.replace('_', '-')} out."
        ) from error
    except Exception as error:
        if not pretrained:
            raise
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(
            f"no pretrained weights of '{architecture}' could be loaded ({reason}). Without a network: get the "
            "weights as safetensors elsewhere and give them with --initial-checkpoint FILE."
        ) from error


def whole(tensor: Tensor) -> Tensor:
    """A detached tensor on the CPU; one that is sharded over processes is gathered, so all of them must call this."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.cpu().contiguous()


def save_checkpoint(path: str | Path, model: nn.Module, info: CheckpointInfo, *, writes: bool = True) -> None:
    """Write the model's weights and `info` atomically.

    writes: False in a process that only helps to gather sharded weights.
    """
    tensors = {name: whole(t) for name, t in model.state_dict().items()}
    if not writes:
        return
    metadata = {"leanvit": json.dumps(info.as_dict()), "sha256": digest(tensors)}
    write_atomic(path, save(tensors, metadata))


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: safetensors itself accepts flipped bits."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint file at `path`, which may be the folder of a training run."""
    path = Path(path)
    candidate = path / CHECKPOINT_NAME if path.is_dir() else path
    if not candidate.is_file():
        raise CheckpointError(
            f"{candidate}: no such checkpoint, expected a safetensors file or the folder of a training run. "
            "Train one: leanvit train --data FOLDER"
        )
    return candidate


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises CheckpointError where the file is damaged, changed since it was written, or not finite.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a readable safetensors file ({error}). Copy it again or convert the checkpoint."
        ) from error
    if "sha256" in metadata and metadata["sha256"] != digest(tensors):
        raise CheckpointError(f"{path}: weights differ from their SHA-256; the file was damaged. Copy it again.")
    require_finite(tensors, path)
    return tensors, metadata


def require_finite(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Raise CheckpointError where a tensor of a file holds NaN or infinity."""
    bad = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        count = int((~tensors[bad[0]].isfinite()).sum())
        raise CheckpointError(
            f"{path}: {count} values of '{bad[0]}' are NaN or infinite ({len(bad)} tensors in all), expected "
            "finite weights. Use an earlier checkpoint or train again with a lower --lr."
        )


def load_checkpoint(path: str | Path) -> tuple[nn.Module, CheckpointInfo]:
    """Build the model of a leanvit checkpoint, in eval mode on the CPU.

    Raises CheckpointError where the file is missing, damaged, foreign, or of another architecture.
    """
    path = find_checkpoint(path)
    tensors, metadata = read_tensors(path)
    if "leanvit" not in metadata:
        raise CheckpointError(
            f"{path}: a safetensors file without leanvit's metadata. "
            "Start a training from it: leanvit train --model NAME --initial-checkpoint FILE"
        )
    info = info_from_metadata(metadata["leanvit"], path)
    if info.task != "classify":
        raise CheckpointError(f"{path} is a network for the task '{info.task}', expected a classifier.")
    model = build(info.architecture, len(info.labels), **info.kwargs)
    load_weights(model, tensors, path)
    return model.eval(), info


def info_from_metadata(text: str, path: str | Path) -> CheckpointInfo:
    """Parse the metadata of a checkpoint. Raises ConfigError naming the wrong key."""
    return from_dict(CheckpointInfo, json.loads(text), f"{path}: metadata")


def load_weights(model: nn.Module, tensors: dict[str, Tensor], path: str | Path, *, head: bool = True) -> None:
    """Copy weights into `model`.

    head: False leaves out tensors whose shape differs only because the number of classes does.
    Raises CheckpointError that lists unknown, missing and misshapen keys.
    """
    wanted = model.state_dict()
    skipped: set[str] = set()
    if not head:
        classifier = classifier_prefixes(model)
        skipped = {name for name in wanted if name.startswith(classifier) and _differs(tensors.get(name), wanted[name])}
    problems = [f"unknown {name}" for name in tensors if name not in wanted]
    problems += [f"missing {name}" for name in wanted if name not in tensors and name not in skipped]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape and name not in skipped
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(problems[:4])}{more}. Check --model."
        )
    model.load_state_dict({n: t for n, t in tensors.items() if n not in skipped}, strict=not skipped)


def _differs(tensor: Tensor | None, wanted: Tensor) -> bool:
    return tensor is None or tensor.shape != wanted.shape


def classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Module paths of a timm model's classifiers."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def with_metrics(info: CheckpointInfo, **metrics: Any) -> CheckpointInfo:
    """A copy of `info` with more measurements."""
    return dataclasses.replace(info, metrics={**info.metrics, **metrics})


def preprocess_for(model: Any, img_size: int | None = None) -> Preprocess:
    """The preprocessing that a timm model asks for: its pretrained_cfg, with the size and channels that it has.

    Of a network of other than three channels the mean and the deviation are only known where its pretrained_cfg has
    as many; else they are those of three channels, averaged.
    """
    from timm.data import resolve_model_data_config

    wanted = resolve_model_data_config(model)
    channels, *size = input_config(model)["input_size"]
    return Preprocess(
        input_size=(img_size, img_size) if img_size else (size[0], size[1]),
        mean=for_channels(wanted["mean"], channels),
        std=for_channels(wanted["std"], channels),
        interpolation=wanted["interpolation"],
        crop_pct=wanted["crop_pct"],
        crop_mode="squash" if wanted.get("crop_mode") == "squash" else "center",
    )


def for_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Mean or deviation of so many channels: as they are, or of grey the average, which further bands get as well."""
    known = tuple(float(value) for value in values)
    if len(known) == channels:
        return known
    average = sum(known) / len(known)
    return (*known, *[average] * (channels - len(known))) if 3 <= len(known) < channels else (average,) * channels
