"""transformers: small random networks that its own save_pretrained wrote: outputs, labels and preprocessing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from leanvit import imaging
from leanvit.checkpoint import build as build_timm
from leanvit.checkpoint import save_checkpoint
from leanvit.config import LoadOptions
from leanvit.data.loader import to_input
from leanvit.errors import CheckpointError, ConfigError
from leanvit.load.api import load
from leanvit.load.processors import preprocess_of
from leanvit.quant.graph import trace

transformers = pytest.importorskip("transformers")

TOWER: dict[str, Any] = {
    "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 28,
    "patch_size": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 50,
    "eos_token_id": 49,
}  # fmt: skip
NAMES = {0: "cat", 1: "dog", 2: "bird"}


def vit() -> Any:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**TOWER, layer_norm_eps=1e-6, id2label=NAMES)
    network = transformers.ViTForImageClassification(config).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network


@torch.no_grad()
def in_timm(original: Any) -> nn.Module:
    """The same network in timm's layout."""
    given: dict[str, Tensor] = original.state_dict()
    network = build_timm("vit_micro", 3, depth=1).eval()
    layer = "vit.layers.0."

    def stacked(kind: str) -> Tensor:
        return torch.cat([given[f"{layer}attention.{one}_proj.{kind}"] for one in "qkv"])

    named = {
        "cls_token": "vit.embeddings.cls_token",
        "pos_embed": "vit.embeddings.position_embeddings",
        **{f"patch_embed.proj.{k}": f"vit.embeddings.patch_embeddings.projection.{k}" for k in ("weight", "bias")},
        **{f"blocks.0.norm1.{k}": f"{layer}layernorm_before.{k}" for k in ("weight", "bias")},
        **{f"blocks.0.norm2.{k}": f"{layer}layernorm_after.{k}" for k in ("weight", "bias")},
        **{f"blocks.0.attn.proj.{k}": f"{layer}attention.o_proj.{k}" for k in ("weight", "bias")},
        **{f"blocks.0.mlp.{m}.{k}": f"{layer}mlp.{m}.{k}" for m in ("fc1", "fc2") for k in ("weight", "bias")},
        **{f"norm.{k}": f"vit.layernorm.{k}" for k in ("weight", "bias")},
        **{f"head.{k}": f"classifier.{k}" for k in ("weight", "bias")},
    }
    state = {name: given[other] for name, other in named.items()}
    network.load_state_dict(state | {f"blocks.0.attn.qkv.{k}": stacked(k) for k in ("weight", "bias")})
    return network


@torch.no_grad()
def test_a_classifier_is_the_original_and_timms_twin_and_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    original = vit()
    original.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(tmp_path / "vit")
    network, info = load(f"transformers:{tmp_path / 'vit'}")
    assert load(tmp_path / "vit")[1] == info
    x = torch.rand(2, 3, 28, 28)
    torch.testing.assert_close(network(x), original(pixel_values=x).logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(network(x), in_timm(original)(x), atol=1e-5, rtol=0)
    torch.testing.assert_close(trace(network, x).module(x), network(x), atol=1e-5, rtol=0)
    assert (info.labels, info.task, info.architecture) == (
        ("cat", "dog", "bird"),
        "classify",
        "ViTForImageClassification",
    )
    found = info.preprocess
    assert (found.input_size, found.mean, found.std) == ((28, 28), (0.5,) * 3, (0.5,) * 3)
    assert (found.interpolation, found.crop_mode) == ("bilinear", "squash")
    save_checkpoint(tmp_path / "own.safetensors", network, info)
    again, told = load(tmp_path / "own.safetensors")
    assert told == info
    assert torch.equal(again(x), network(x))
    with pytest.raises(ConfigError, match=r"--model is vit_micro, but .* is a ViTForImageClassification"):
        load(tmp_path / "vit", LoadOptions(model_name="vit_micro"))


@torch.no_grad()
def test_another_size_has_the_positions_that_transformers_interpolates(tmp_path: Path) -> None:
    original = vit()
    original.save_pretrained(tmp_path)
    network, info = load(tmp_path, LoadOptions(img_size=(28, 56)))
    assert info.preprocess.input_size == (28, 56)
    x = torch.rand(2, 3, 28, 56)
    wanted = original(pixel_values=x, interpolate_pos_encoding=True).logits
    # timm's resampling is antialiased, transformers' is not; both are bicubic, and here the grid grows.
    assert (network(x) - wanted).abs().max() < 0.2 * wanted.abs().max()


@torch.no_grad()
def test_of_clip_and_dino_the_tower_embeds(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.rand(2, 3, 28, 28)
    config = transformers.CLIPConfig(vision_config=TOWER, text_config=TEXT, projection_dim=24)
    clip = transformers.CLIPModel(config).eval()
    clip.save_pretrained(tmp_path / "clip")
    network, info = load(f"transformers:{tmp_path / 'clip'}")
    vision = clip.visual_projection(clip.vision_model(pixel_values=x).pooler_output)
    torch.testing.assert_close(network(x), vision, atol=1e-6, rtol=0)
    assert (info.task, info.labels, info.architecture) == ("embed", (), "CLIPVisionModelWithProjection")
    dino = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**TOWER)).eval()
    dino.save_pretrained(tmp_path / "dino")
    network, info = load(f"transformers:{tmp_path / 'dino'}")
    torch.testing.assert_close(network(x), dino(pixel_values=x).last_hidden_state[:, 0], atol=1e-6, rtol=0)
    assert info.task == "embed"


def test_a_classifier_whose_head_is_not_in_the_files_is_refused(tmp_path: Path) -> None:
    vit().vit.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"ViTModel"', '"ViTForImageClassification"')
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=r"2 tensors of ViTForImageClassification are missing.*classifier"):
        load(f"transformers:{tmp_path}")
    with pytest.raises(CheckpointError, match="no such folder"):
        load(f"transformers:{tmp_path / 'gone'}/")


@pytest.mark.parametrize(
    ("processor", "options", "size"),
    [
        ("ViTImageProcessorPil", {"size": {"height": 28, "width": 28}}, (28, 28)),
        ("CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}}, (28, 28)),
        ("ConvNextImageProcessorPil", {"size": {"shortest_edge": 28}, "crop_pct": 0.875}, (28, 28)),
        ("ViTImageProcessorPil", {"size": {"height": 28, "width": 28}, "do_normalize": False}, (28, 28)),
    ],
)
def test_preprocessing_is_that_of_the_processor(processor: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    if not hasattr(transformers, processor):
        pytest.skip(f"this transformers has no {processor}")
    pixels = np.kron(np.random.default_rng(0).integers(0, 256, (6, 9, 3)), np.ones((9, 9, 1))).astype(np.uint8)
    theirs = getattr(transformers, processor)(**options)
    wanted = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    ours = preprocess_of(theirs.to_dict(), size, 3, "it")
    found = to_input(torch.from_numpy(imaging.resize(pixels, ours)[None].copy()), ours).numpy()
    # A grey level apart where the two round a crop's place or a share otherwise.
    assert np.abs(found - wanted).mean() < 2 / 255 / min(ours.std)
