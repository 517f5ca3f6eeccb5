"""Small networks that write their forward as families of timm do which are no plain ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PackedAttention(nn.Module):
    """Queries, keys and values as BEiT writes them: keys have no bias, and the rest is put together in forward."""

    def __init__(self, width: int = 12, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(width)) for _ in range(2))
        self.register_buffer("k_bias", torch.zeros(width), persistent=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        batch, tokens, width = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(batch, tokens, width)).mean(1)


class LinearAttention(nn.Module):
    """Attention without a softmax in a part without autocast, divided by a sum, as EfficientViT writes it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.patches(x)).flatten(2).transpose(1, 2).chunk(3, -1)
        q, k, v = q.relu(), k.relu(), F.pad(v, (0, 1), value=1.0)
        with torch.autocast("cpu", enabled=False):
            mixed = q.float() @ (k.float().transpose(-1, -2) @ v.float())
            mixed = mixed[..., :-1] / (mixed[..., -1:] + 1e-5)
        return self.head(mixed.mean(1))


class RelativePositions(nn.Module):
    """Logits with what rows and columns of the map add by einsum, as SAM and MViTv2 write it."""

    def __init__(self, width: int = 12, side: int = 4) -> None:
        super().__init__()
        self.side = side
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.qkv = nn.Linear(width, 3 * width)
        self.rows, self.columns = (nn.Parameter(torch.randn(side, side, width)) for _ in range(2))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).chunk(3, -1)
        grid = q.reshape(-1, self.side, self.side, q.shape[-1])
        rows = torch.einsum("bhwc,hkc->bhwk", grid, self.rows)[..., :, None]
        columns = torch.einsum("bhwc,wkc->bhwk", grid, self.columns)[..., None, :]
        bias = (rows + columns).reshape(-1, self.side**2, self.side**2)
        return self.head(((q @ k.transpose(-1, -2) / 4 + bias).softmax(-1) @ v).mean(1))


class AdditiveAttention(nn.Module):
    """One weight a token by a product with a column, as SwiftFormer writes it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.column = nn.Parameter(torch.randn(width, 1))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        query, key = F.normalize(self.query(x), dim=-1), F.normalize(self.key(x), dim=-1)
        weights = F.normalize(query @ self.column * 0.3, dim=1)
        return self.head(((weights * query).sum(1, keepdim=True) * key + query).mean(1))


NETWORKS = (PackedAttention, LinearAttention, RelativePositions, AdditiveAttention)
