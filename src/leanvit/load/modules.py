"""Networks as people have them: wrapped, in half precision, with more than one output."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.errors import ModelError, ShapeError
from leanvit.progress import note
from leanvit.timm_input import input_config

FIRST_KEYS = ("logits", "image_embeds", "pooler_output", "x_norm_clstoken", "output", "outputs", "out", "pred")
"""What answers are called in what a forward returns: transformers' classifiers, its towers and its backbones, DINOv2's
own code, and what people write; the first that is there is taken."""


class OneOutput(nn.Module):
    """A network whose forward returns a dictionary, a tuple or a dataclass: this one's returns the tensor in it."""

    def __init__(self, network: nn.Module) -> None:
        """Share the weights of `network`, and what timm says of it."""
        super().__init__()
        self.network = network
        if hasattr(network, "pretrained_cfg"):
            self.pretrained_cfg = network.pretrained_cfg
            self._traits = getattr(network, "_traits", {})

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns logits or embeddings (B, N)."""
        return chosen_output(self.network(x))[0]


def chosen_output(outputs: Any) -> tuple[Any, str]:
    """The tensor among what a forward returned, and what it is called there; itself and '' where it is one.

    Of a list or tuple that is the first of shape (B, N); feature maps alone are left as they are. Raises ModelError
    where none can be told.
    """
    if isinstance(outputs, Tensor):
        return outputs, ""
    if dataclasses.is_dataclass(outputs) and not isinstance(outputs, type | Mapping):
        outputs = {field.name: getattr(outputs, field.name) for field in dataclasses.fields(outputs)}
    if isinstance(outputs, Mapping):
        tensors = {str(key): value for key, value in outputs.items() if isinstance(value, Tensor)}
        key = next((key for key in FIRST_KEYS if key in tensors), None)
        if key is None and len(tensors) == 1:
            key = next(iter(tensors))
        if key is None:
            raise ModelError(
                f"the network's forward returned {', '.join(map(str, outputs)) or 'an empty dictionary'}, expected a "
                f"tensor of logits, or one under {', '.join(FIRST_KEYS[:3])}. Wrap it in a module that returns one."
            )
        return tensors[key], key
    if isinstance(outputs, tuple | list) and outputs:
        place = next((i for i, one in enumerate(outputs) if isinstance(one, Tensor) and one.dim() == 2), None)
        if place is not None:
            return outputs[place], str(place)
        if all(isinstance(one, Tensor) for one in outputs):
            return outputs, ""
    raise ModelError(
        f"the network's forward returned {type(outputs).__name__}, expected a tensor of logits (batch, classes). "
        "Wrap it in a module that returns one."
    )


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def in_single_precision(model: nn.Module) -> nn.Module:
    """The network, or where any of its tensors has half or double precision, a copy in float32."""
    tensors = (*model.parameters(), *model.buffers())
    if all(tensor.dtype == torch.float32 for tensor in tensors if tensor.is_floating_point()):
        return model
    return copy.deepcopy(model).float()


def as_network(model: nn.Module, x: Tensor) -> nn.Module:
    """The network inside of wrappers, in float32, whose forward returns one tensor; the given one is not changed.

    x: an example (1, C, H, W) float32. A network that is one already is returned itself.
    Raises ShapeError where it can't run on images of that shape, ModelError where its output can't be told.
    """
    network = in_single_precision(unwrapped(model))
    modes = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            outputs = network.eval()(x)
    except Exception as error:  # whatever the network's own code raises
        raise ShapeError(_cannot_run(network, x, error)) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    _, key = chosen_output(outputs)
    if not key:
        return network
    kind = type(outputs).__name__
    note(f"{type(network).__name__} returns {kind}: its '{key}' is taken" if not key.isdigit() else
         f"{type(network).__name__} returns {kind} of {len(outputs)}: number {int(key) + 1} is taken")  # fmt: skip
    return OneOutput(network).train(network.training)


def _cannot_run(network: nn.Module, x: Tensor, error: Exception) -> str:
    shape = "x".join(map(str, x.shape[1:]))
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    built = ""
    if hasattr(network, "pretrained_cfg"):
        built = f" It is built for {'x'.join(map(str, input_config(network)['input_size']))}."
    return (
        f"{type(network).__name__} can't run on images of {shape} (channels, height, width): {reason}.{built} Give "
        "images and a preprocessing of its own size and channels."
    )
