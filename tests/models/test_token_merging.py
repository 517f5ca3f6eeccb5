"""Token merging beside a reference in float64 that merges one pair after the other and repeats tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from leanvit.errors import ConfigError, ShapeError
from leanvit.models._token_merging import Pairs, destinations, merge_tokens, schedule

SMALL = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
KINDS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_224_miil": {"qkv_bias": False},
    "vit_small_patch14_reg4_dinov2": {"init_values": 0.3},
    "vit_base_patch16_siglip_224": {},
    "vit_medium_patch16_gap_240": {},
}


def build(name: str = "vit_tiny_patch16_224", **kwargs: Any) -> Any:
    torch.manual_seed(0)
    network = timm.create_model(name, **{**SMALL, **KINDS.get(name, {}), **kwargs}).eval().double()
    with torch.no_grad():
        for parameter in network.parameters():  # biases and class tokens begin at zero
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


def images(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def reference(network: Any, x: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Tokens (N', dim) of one image after all blocks, and of which patches each is: by the paper's words, in loops."""
    tokens = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x[None]))))[0]
    prefix = network.num_prefix_tokens
    groups = [[-1 - i] for i in range(prefix)] + [[i] for i in range(len(tokens) - prefix)]
    for block, count in zip(network.blocks, counts, strict=True):
        normed, attn = block.norm1(tokens), block.attn
        q, k, v = attn.qkv(normed).view(len(tokens), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
        q, k = attn.q_norm(q), attn.k_norm(k)
        # A token that stands for three patches is there three times.
        repeats = torch.tensor([len(group) for group in groups])
        many_k, many_v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
        mixed = (q @ many_k.transpose(1, 2) * attn.head_dim**-0.5).softmax(-1) @ many_v
        tokens = tokens + block.ls1(attn.proj(mixed.permute(1, 0, 2).flatten(1)))
        tokens, groups = merged(tokens, groups, k.mean(0).detach().numpy(), count)
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    if prefix and network.global_pool == "token" and network.attn_pool is None:
        return network.norm(tokens)
    order = {patch: place for place, group in enumerate(groups) for patch in group}
    return network.norm(tokens[[order[patch] for patch in (*range(-1, -1 - prefix, -1), *range(64))]])


def merged(
    tokens: torch.Tensor, groups: list[list[int]], keys: np.ndarray, count: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """The first of a group is the patch that the token began as; black fields of a chessboard are destinations."""
    keys = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    black = [place for place, group in enumerate(groups) if group[0] >= 0 and sum(divmod(group[0], 8)) % 2]
    white = [place for place, group in enumerate(groups) if group[0] >= 0 and place not in black]
    pairs = []
    for a in white:
        b = max(black, key=lambda other: float(keys[a] @ keys[other]))
        pairs.append((float(keys[a] @ keys[b]), a, b))
    chosen = {a: b for _, a, b in sorted(pairs, reverse=True)[:count]}
    values, found = [], []
    for place in range(len(groups)):
        if place in chosen:
            continue
        members = [place, *(a for a, b in chosen.items() if b == place)]
        sizes = torch.tensor([float(len(groups[m])) for m in members], dtype=torch.float64)
        values.append((tokens[members] * sizes[:, None]).sum(0) / sizes.sum())
        found.append([patch for m in members for patch in groups[m]])
    return torch.stack(values), found


@pytest.mark.parametrize("name", KINDS)
def test_merging_is_that_of_the_paper(name: str) -> None:
    network, x, counts = build(name), images(), [12, 11, 6]
    with torch.no_grad():
        tokens = torch.stack([reference(network, image, counts) for image in x])
        expected = network.forward_head(tokens)
        found = merge_tokens(network, counts)(x)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_alike_is_merged_without_loss(name: str) -> None:
    """Every patch is there twice, and positions are not told: half of the tokens say all."""
    network = build(name)
    with torch.no_grad():
        network.pos_embed.zero_()
        half = torch.randn(3, 3, 8, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        x = half.repeat_interleave(2, dim=3).transpose(3, 4).reshape(3, 3, 32, 32)
        assert torch.equal(x[..., 0:4], x[..., 4:8])
        expected = network(x)
        found = merge_tokens(network, [32, 0, 0])(x)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_a_network_that_keeps_all_tokens_is_what_it_was() -> None:
    network = build()
    x = images()
    expected, names = network(x), list(network.state_dict())
    found = merge_tokens(network, 1.0)
    assert torch.equal(found(x), expected)
    assert list(found.state_dict()) == names


@pytest.mark.parametrize(("keep", "left"), [(0.9, 58), (0.6, 38), (0.25, 16)])
def test_the_last_block_has_the_share_that_was_asked_for(keep: float, left: int) -> None:
    network, seen = merge_tokens(build(), keep), []
    network.blocks[-1].norm1.register_forward_hook(lambda module, given, found: seen.append(found.shape[1]))
    network(images())
    assert seen == [1 + left]


def test_gradients_come_to_every_weight() -> None:
    network = merge_tokens(build().train(), 0.5)
    network(images()).square().sum().backward()
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in network.parameters())


@pytest.mark.parametrize(("keep", "share"), [(0.6, 1 / 2), (0.4, 1 / 3), (0.27, 1 / 4)])
def test_as_many_destinations_as_leave_enough_to_merge(keep: float, share: float) -> None:
    pattern = destinations((24, 24), sum(schedule(keep, 576, 12)))
    assert float(pattern.double().mean()) == pytest.approx(share)
    # Every source has a destination beside it, to a side or a corner.
    near = torch.nn.functional.max_pool2d(pattern.view(1, 24, 24).float(), 3, 1, 1)
    assert bool(near.all())


@pytest.mark.parametrize("count", [0, 1, 5, 7])
@pytest.mark.parametrize("tokens", [12, 13])
def test_every_patch_is_found_where_its_token_is(tokens: int, count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    pairs = Pairs(torch.randn(2, tokens, 4, generator=generator), 7, count)
    x = torch.eye(tokens)[None].expand(2, -1, -1)
    merged, size = pairs.merge(x, torch.ones(2, tokens, 1), 0)
    places = pairs.moved(torch.arange(tokens).expand(2, -1))
    assert merged.shape == (2, tokens - count, tokens)
    assert torch.equal(size.sum(1), torch.full((2, 1), float(tokens)))
    for image in range(2):
        for patch in range(tokens):
            assert merged[image, places[image, patch], patch] > 0


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (0.0, r"keep_tokens is 0.0, expected a share"),
        (1.5, r"keep_tokens is 1.5, expected a share"),
        ([5, 5], r"keep_tokens is \[5, 5\], expected 3 numbers"),
        ([5, -1, 5], r"expected 3 numbers from 0 up"),
        ([30, 19, 0], r"49 of 64 tokens are to be merged, at most 48 can be: give a keep_tokens of at least 0.25"),
        (0.2, r"51 of 64 tokens are to be merged, at most 48 can be: give a keep_tokens of at least 0.25"),
    ],
)
def test_impossible_schedules_are_refused(keep: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        merge_tokens(build(), keep)


def test_what_the_error_advises_helps() -> None:
    assert sum(schedule(0.25, 64, 3)) == 48
    assert merge_tokens(build(), 0.25)(images()).shape == (3, 7)


def test_networks_that_cannot_merge_are_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="SwinTransformer can't merge tokens"):
        merge_tokens(
            timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), embed_dim=24, num_heads=(1, 1)), 0.5
        )
    with pytest.raises(ConfigError, match="block 0 is ResPostBlock with Attention"):
        merge_tokens(build("vit_base_patch16_rpn_224"), 0.5)
    with pytest.raises(ConfigError, match="Linear can't merge"):
        merge_tokens(nn.Linear(2, 2), 0.5)


def test_other_image_sizes_and_intermediate_features_are_refused() -> None:
    network = merge_tokens(build(dynamic_img_size=True), 0.5)
    with pytest.raises(ShapeError, match="144 patches, expected 64"):
        network(torch.randn(1, 3, 48, 48, dtype=torch.float64))
    with pytest.raises(ShapeError, match="intermediate features are not to be had"):
        network.forward_intermediates(images())
