"""What images a timm network is built for, by every timm from 1.0.23 on."""

from __future__ import annotations

from typing import Any

from torch import nn


def input_config(network: nn.Module) -> dict[str, Any]:
    """Channels and size `input_size` (C, H, W), and `fixed_input_size`: whether other sizes are refused.

    network: of timm, so with a pretrained_cfg. timm tells it of itself from 1.0.31 on; of earlier ones the patch
    embedding and the first convolution are asked.
    """
    try:
        from timm.models import get_model_input_config
    except ImportError:
        return _of_modules(network)
    found: dict[str, Any] = get_model_input_config(network)
    return found


def first_convolutions(network: nn.Module) -> tuple[str, ...]:
    """Paths of the modules that read the image."""
    try:
        from timm.models import get_model_traits
    except ImportError:
        names = None
    else:
        names = get_model_traits(network).get("first_conv")
    names = names or getattr(network, "pretrained_cfg", {}).get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _of_modules(network: nn.Module) -> dict[str, Any]:
    wanted = getattr(network, "pretrained_cfg", {})
    channels, *size = wanted.get("input_size", (3, 224, 224))
    patches = getattr(network, "patch_embed", None)
    parameters = network.state_dict()
    kernels = [parameters[f"{name}.weight"] for name in first_convolutions(network) if f"{name}.weight" in parameters]
    if kernels and kernels[0].dim() == 4:
        channels = kernels[0].shape[1]
    fixed = getattr(patches, "strict_img_size", wanted.get("fixed_input_size", False))
    return {
        "input_size": (getattr(network, "in_chans", channels), *(getattr(patches, "img_size", None) or size)),
        "fixed_input_size": bool(fixed and not getattr(network, "dynamic_img_size", False)),
    }
