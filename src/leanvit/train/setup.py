"""What a training starts with: device, precision, network, and the share of the images that it may see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from leanvit.checkpoint import CheckpointInfo, build, preprocess_for
from leanvit.config import LoadOptions, Preprocess, TrainConfig
from leanvit.data.sets import ImageSet
from leanvit.errors import ConfigError
from leanvit.load.start import start_from


def pick_device(name: str, local_rank: int | None = None) -> torch.device:
    """The device called `name`; 'auto' is CUDA where there is one. Raises ConfigError for an absent one.

    local_rank: of this process on this machine, where each has a GPU of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}' is unknown, expected cpu, cuda, cuda:1 or auto.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{name}' is not on this machine. Use --device cpu.")
    if device.type == "cuda" and local_rank is not None:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} found, expected one for "
                "each process. Lower --nproc-per-node."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    return device


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for full precision."""
    if amp == "none":
        return None
    if amp != "auto":
        return torch.bfloat16 if amp == "bfloat16" else torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


class UnfusedAttention:
    """Build models with attention written out where that trains faster: bfloat16 on a CPU."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Take effect for a CPU with autocast only (specs: fused backward is nine times slower there)."""
        self.active = device.type == "cpu" and dtype is not None

    def __enter__(self) -> None:
        """Switch timm's fused attention off."""
        from timm.layers import set_fused_attn, use_fused_attn

        self.before = bool(use_fused_attn())
        if self.active:
            set_fused_attn(False)

    def __exit__(self, *error: object) -> None:
        """Restore timm's setting."""
        from timm.layers import set_fused_attn

        if self.active:
            set_fused_attn(self.before)


def build_model(
    config: TrainConfig,
    classes: tuple[str, ...],
    device: torch.device,
    dtype: torch.dtype | None,
    memory_format: torch.memory_format,
) -> tuple[nn.Module, CheckpointInfo]:
    """The network of `config` on `device` with its starting weights, and what its checkpoints will say of it."""
    rates = {"drop_path_rate": config.drop_path, "drop_rate": config.drop}
    kwargs: dict[str, Any] = {name: rate for name, rate in rates.items() if rate}
    kept: dict[str, Any] = {} if config.keep_tokens == 1.0 else {"keep_tokens": config.keep_tokens}
    size: dict[str, Any] = {"img_size": config.img_size} if config.img_size else {}
    with UnfusedAttention(device, dtype):
        try:
            model = build(config.model, len(classes), pretrained=config.pretrained, **kwargs, **kept, **size)
        except ConfigError:
            # A convolutional network takes any size and has no argument for it.
            if not size:
                raise
            size = {}
            model = build(config.model, len(classes), pretrained=config.pretrained, **kwargs, **kept)
    if config.initial_checkpoint:
        start_from(model, config.initial_checkpoint, LoadOptions(model_name=config.model, ema=config.ema))
    info = CheckpointInfo(
        architecture=config.model.split(".")[0],
        labels=classes,
        preprocess=_preprocess(model, config),
        kwargs=size | kept,
        data=config.data,
        val_fraction=config.val_fraction,
        seed=config.seed,
        task=config.task,
    )
    return model.to(device, memory_format=memory_format), info  # type: ignore[call-overload]


def _preprocess(model: nn.Module, config: TrainConfig) -> Preprocess:
    preprocess = preprocess_for(model)
    return replace(preprocess, input_size=config.input_size) if config.input_size else preprocess


def checkpoint_gradients(model: nn.Module) -> None:
    """Let a timm model compute activations again in the backward pass. Raises ConfigError where it can't."""
    for candidate in (model, getattr(model, "model", None)):
        try:
            candidate.set_grad_checkpointing(True)  # type: ignore[operator, union-attr]
        except (AttributeError, AssertionError):
            continue
        return
    raise ConfigError(f"{type(model).__name__} can't checkpoint gradients. Leave --grad-checkpointing out.")


def some_of_each_class(images: ImageSet, config: TrainConfig) -> ImageSet:
    """The part of the training images that `train_fraction` and `images_per_class` allow, chosen by the seed.

    At least one image of every class stays. Smaller parts are contained in larger ones of the same seed.
    """
    if config.train_fraction == 1.0 and config.images_per_class is None:
        return images
    generator = np.random.default_rng((config.seed, 1))
    kept = []
    for label in range(len(images.classes)):
        members = generator.permutation(np.flatnonzero(images.labels == label))
        count = max(1, round(config.train_fraction * len(members)))
        if config.images_per_class is not None:
            count = min(count, config.images_per_class)
        kept.append(members[:count])
    return images.subset(np.sort(np.concatenate(kept)))
