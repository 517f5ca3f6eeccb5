"""ViTAE and ViTAEv2 as their authors' program has them, for the tests of both.

The slow form works on the authors' weights under their names, one window, head and token at a time; it is
first held against the golden files itself, and is then the truth at sizes for which there is no file.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanvit.models._convert_vitae import _authors_names, convert
from leanvit.models.vitae import ViTAE
from official import fill_module, gradient_norms, load_golden

CLOSE = {"atol": 1e-4, "rtol": 0}


def official(name: str, model_class: type = ViTAE, **kwargs: Any) -> Any:
    """The network of a golden file, in eval mode."""
    weights, _, config = load_golden(name)
    converted = convert(weights, config)
    model = model_class(**{**converted.kwargs, **kwargs}).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    return model


def filled_official(model_name: str) -> dict[str, Tensor]:
    """The weights of a published network under the authors' names, as the golden files' recipe fills them."""
    fill = fill_module("fill_vitae")
    with torch.device("meta"):
        model = timm.create_model(model_name)
    authors = _authors_names(model, 2)
    weights = {}
    for name, like in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        key = f"{authors[module]}.{leaf}"
        value = fill.value(key, like.shape)
        weights[key] = torch.zeros((), dtype=torch.int64) if value is None else torch.from_numpy(value)
    return weights


def tokens_by_cell(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Tokens after every reduction cell and stage, under the names of the golden files."""
    found: dict[str, Tensor] = {}
    handles = []
    for index, stage in enumerate(model.stages):
        for name, module in ((f"feat.rc{index}", stage.reduction), (f"feat.stage{index}", stage)):
            handles.append(
                module.register_forward_hook(lambda _m, _i, out, name=name: found.update({name: out[0].clone()}))
            )
    model(x)
    for handle in handles:
        handle.remove()
    return found


def check_published_stages(found: dict[str, Tensor], golden: Any) -> None:
    """Shape, moments, first and last 32 values of every stage's tokens against a published network's file."""
    stages = [key for key in found if "stage" in key]
    assert {f"{key.removeprefix('feat.')}.shape" for key in stages} == {k for k in golden if k.endswith(".shape")}
    for key in stages:
        tokens, name = found[key], key.removeprefix("feat.")
        assert tuple(golden[f"{name}.shape"]) == tuple(tokens.shape)
        moments = torch.stack([tokens.double().mean(), tokens.double().std()])
        torch.testing.assert_close(moments, torch.from_numpy(golden[f"{name}.mean_std"]), **CLOSE)
        for part, values in (("first", tokens.flatten()[:32]), ("last", tokens.flatten()[-32:])):
            torch.testing.assert_close(values, torch.from_numpy(golden[f"{name}.{part}_token_32"]), **CLOSE)


def check_gradients(model: nn.Module, name: str) -> None:
    """Norms of the gradients of mean(logits^2) against the golden file's."""
    weights, golden, config = load_golden(name)
    norms = gradient_norms(name)
    # The converter hands tensors on as they are, so that identity tells the authors' name of each of ours.
    authors = {id(tensor): key for key, tensor in weights.items()}
    ours = {name: authors[id(tensor)] for name, tensor in convert(weights, config).state_dict.items()}
    model(golden["input"]).square().mean().backward()
    found = {ours[name]: p.grad.norm().item() for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == norms.keys()
    for key, norm in norms.items():
        assert found[key] == pytest.approx(norm, rel=1e-3), key


def random_norms(model: nn.Module) -> None:
    """Statistics and scales that make a BatchNorm anything but the identity."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(std=0.2, generator=generator)


class Slow:
    """What ViTAE and ViTAEv2 share, written out in float64 on the authors' weights."""

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
        self.weights = {key: value.double() for key, value in weights.items()}
        self.config = config

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.square().mean(-1, keepdim=True)
        return centred / (variance + eps).sqrt() * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def conv(self, x: Tensor, name: str, **options: Any) -> Tensor:
        weight = self.weights[f"{name}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, self.weights[f"{name}.bias"], groups=groups, **options)

    def sequence(self, x: Tensor, name: str, strides: tuple[int, ...], final: bool) -> Tensor:
        """A PCM as the authors' list of modules: convolutions, BatchNorms where there are any, SiLUs."""
        place = 0
        for index, stride in enumerate(strides):
            x = self.conv(x, f"{name}.{place}", stride=stride, padding=1)
            place += 1
            if (scale := self.weights.get(f"{name}.{place}.running_var")) is not None:
                mean, gain, bias = (self.weights[f"{name}.{place}.{k}"] for k in ("running_mean", "weight", "bias"))
                gain = gain / (scale + 1e-5).sqrt()
                x = x * gain[:, None, None] + (bias - mean * gain)[:, None, None]
                place += 1
            if final or index < len(strides) - 1:
                x = x * x.sigmoid()
            place += 1
        return x.flatten(2).transpose(1, 2)

    def prm(self, image: Tensor, name: str, ratio: int) -> tuple[Tensor, tuple[int, int]]:
        maps = []
        for index in range(8):
            if (weight := self.weights.get(f"{name}.{index}.0.weight")) is None:
                break
            padding = math.ceil(((weight.shape[-1] - 1) * (index + 1) + 1 - ratio) / 2)
            options = {"stride": ratio, "padding": padding, "dilation": index + 1}
            maps.append(F.gelu(self.conv(image, f"{name}.{index}.0", **options)))
        out = torch.cat(maps, 1)
        return out.flatten(2).transpose(1, 2), (out.shape[2], out.shape[3])

    def attention(self, x: Tensor, name: str, heads: int, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Softmax attention of every head by itself: the projected result, and v."""
        q, k, v = self.linear(x, f"{name}.qkv").chunk(3, -1)
        out = []
        for head, (qh, kh, vh) in enumerate(zip(*(t.chunk(heads, -1) for t in (q, k, v)), strict=True)):
            logits = qh @ kh.transpose(1, 2) / qh.shape[-1] ** 0.5
            out.append((logits if bias is None else logits + bias[head]).softmax(-1) @ vh)
        return self.linear(torch.cat(out, -1), f"{name}.proj"), v

    def mlp(self, x: Tensor, first: str, second: str) -> Tensor:
        return self.linear(F.gelu(self.linear(x, first)), second)
