"""A ViT of timm in the layout of Hugging Face's transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leanvit.checkpoint import build


@torch.no_grad()
def in_transformers(network: Any, labels: tuple[str, ...]) -> Any:
    """ViTForImageClassification with the weights of a timm vit_micro, by hand from both libraries' names."""
    from transformers import ViTConfig, ViTForImageClassification

    given: dict[str, Tensor] = network.state_dict()
    width, (height, _) = network.embed_dim, network.patch_embed.img_size
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=len(network.blocks), num_attention_heads=network.blocks[0].attn.num_heads,
        intermediate_size=network.blocks[0].mlp.fc1.out_features, image_size=height,
        patch_size=network.patch_embed.patch_size[0], layer_norm_eps=1e-6, id2label=dict(enumerate(labels)),
    )  # fmt: skip
    twin = ViTForImageClassification(config).eval()
    named = {
        "vit.embeddings.cls_token": given["cls_token"],
        "vit.embeddings.position_embeddings": given["pos_embed"],
    }
    for kind in ("weight", "bias"):
        named[f"vit.embeddings.patch_embeddings.projection.{kind}"] = given[f"patch_embed.proj.{kind}"]
        named[f"vit.layernorm.{kind}"], named[f"classifier.{kind}"] = given[f"norm.{kind}"], given[f"head.{kind}"]
        for i in range(len(network.blocks)):
            theirs, ours = f"vit.layers.{i}.", f"blocks.{i}."
            qkv = given[f"{ours}attn.qkv.{kind}"].chunk(3)
            named |= {f"{theirs}attention.{n}_proj.{kind}": x for n, x in zip("qkv", qkv, strict=True)}
            named |= {
                f"{theirs}{name}.{kind}": given[f"{ours}{other}.{kind}"]
                for name, other in (
                    ("layernorm_before", "norm1"), ("layernorm_after", "norm2"), ("attention.o_proj", "attn.proj"),
                    ("mlp.fc1", "mlp.fc1"), ("mlp.fc2", "mlp.fc2"),
                )
            }  # fmt: skip
    twin.load_state_dict(named)
    return twin


@torch.no_grad()
def depth_one(seed: int = 0, **changes: Any) -> Any:
    """vit_micro with one block, two classes and random weights, its classes far from equal (eval mode)."""
    torch.manual_seed(seed)
    network = build("vit_micro", 2, **{"depth": 1, **changes}).eval()
    network.head.weight.mul_(20.0)
    return network


def save_transformers(folder: Path, network: Any, labels: tuple[str, ...]) -> Path:
    """Write the network as save_pretrained does, with the processor of its preprocessing, squashed to its size."""
    from transformers import ViTImageProcessor

    in_transformers(network, labels).save_pretrained(folder)
    height, width = network.patch_embed.img_size
    half = [0.5, 0.5, 0.5]
    size = {"height": height, "width": width}
    ViTImageProcessor(size=size, image_mean=half, image_std=half, resample=2).save_pretrained(folder)
    return folder
