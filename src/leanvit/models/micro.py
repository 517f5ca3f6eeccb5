"""ViT, DeiT and Swin in micro size: timm's own classes with options for images of 28 to 32 px.

They are the plain members of the micro family: every pass that claims to work on timm's transformers is tried on
them in seconds. ViT (arXiv 2010.11929), DeiT with a class and a distillation token (arXiv 2012.12877), whose
logits are the mean of both heads, and Swin (arXiv 2103.14030). All three have weights of Fashion-MNIST.
"""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from leanvit.models._pretrained import fashion_mnist_cfg

_VIT = {"img_size": 28, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 3, "mlp_ratio": 2.0}

VARIANTS: dict[str, dict[str, Any]] = {
    "vit_micro": _VIT,
    "deit_micro": _VIT,
    # timm's Swin alone drops paths unless told otherwise: too much for six blocks.
    "swin_micro": {
        "img_size": 32,
        "patch_size": 2,
        "embed_dim": 32,
        "depths": (2, 2, 2),
        "num_heads": (1, 2, 4),
        "window_size": 4,
        "drop_path_rate": 0.0,
    },
}


def _cfg(name: str, size: int, classifier: str | tuple[str, ...], paper: str) -> dict[str, Any]:
    return {
        **fashion_mnist_cfg(name),
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "pool_size": None,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": classifier,
        "paper_ids": f"arXiv:{paper}",
    }


default_cfgs = generate_default_cfgs(
    {
        "vit_micro.fmnist": _cfg("vit_micro", 28, "head", "2010.11929"),
        "deit_micro.fmnist": _cfg("deit_micro", 28, ("head", "head_dist"), "2012.12877"),
        "swin_micro.fmnist": _cfg("swin_micro", 32, "head.fc", "2103.14030"),
    }
)


@register_model
def vit_micro(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Small ViT for 28 px images: patch 4, width 96, depth 6, 3 heads (ours)."""
    return _create(VisionTransformer, "vit_micro", pretrained, **kwargs)


@register_model
def deit_micro(pretrained: bool = False, **kwargs: Any) -> VisionTransformerDistilled:
    """vit_micro with a distillation token and a second head (ours)."""
    return _create(VisionTransformerDistilled, "deit_micro", pretrained, **kwargs)


@register_model
def swin_micro(pretrained: bool = False, **kwargs: Any) -> SwinTransformer:
    """Small Swin for 32 px images: patches of 2, width 32 to 128, depths 2 2 2, windows of 4 (ours)."""
    out_indices = kwargs.pop("out_indices", (0, 1, 2))
    features = {"out_indices": out_indices, "flatten_sequential": True}
    return _create(SwinTransformer, "swin_micro", pretrained, features, **kwargs)


def _create(cls: type[Any], name: str, pretrained: bool, features: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    features = features or {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(cls, name, pretrained, feature_cfg=features, **{**VARIANTS[name], **kwargs})
