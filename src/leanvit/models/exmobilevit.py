"""ExMobileViT: MobileViT whose classifier also sees the early scales.

MobileViT alternates inverted residuals (MV2) with blocks that run a small transformer over the map: the
pixels at one position of all 2x2 patches form a sequence. Its classifier sees the last, coarsest map only.
ExShortcut carries the maps of the earlier attention stages straight to the classifier: a 1x1 convolution (with
BatchNorm and SiLU) sets how many channels each scale gives, each is pooled, and the classifier takes all:

    f = concat(pool(conv1x1(x8)), pool(conv1x1(x16)), pool(conv1x1(x32))),    logits = W f

with x8, x16, x32 the maps at strides 8, 16 and 32. The shortcut needs nothing of MobileViT but its maps, so
`add_exshortcut` gives one to any timm model with intermediate maps.

Yang, Kwon, Kim: ExMobileViT, Lightweight Classifier Extension for Mobile Vision Transformer, arXiv 2309.01310.
Mehta, Rastegari: MobileViT, arXiv 2110.02178.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ConvNormAct
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from leanvit.errors import ConfigError, ShapeError

# Whole models that earlier versions pickled name these blocks in this module.
from leanvit.models._mobilevit import MobileViT, init_weights
from leanvit.models._paper import PaperResult
from leanvit.models._pretrained import fashion_mnist_cfg
from leanvit.timm_input import input_config

OFFICIAL_SIZE = 256
OFFICIAL_WINDOWS = ((25, 32), (9, 16))
"""Average windows of the authors' program on the early scales, and the side of the maps they are meant for."""


class ExShortcut(nn.Module):
    """Maps of several scales in, one map out: that of the last scale, the pooled early scales beside it.

    The early scales are constant over the grid: pooling the result pools every scale exactly once, and
    whatever takes one feature map (a class activation map, another head) takes this one.

    in_widths: channels of the maps. channels: what each scale gives. windows: for every early scale the side
    of the top-left corner to pool in place of the whole map, and the side of the map that it is meant for.
    """

    def __init__(
        self, in_widths: Sequence[int], channels: Sequence[int], windows: Sequence[tuple[int, int]] = ()
    ) -> None:
        super().__init__()
        pairs = zip(in_widths, channels, strict=True)
        self.convs = nn.ModuleList(ConvNormAct(i, o, 1, act_layer=nn.SiLU) for i, o in pairs)
        self.windows = tuple(windows)
        self.apply(init_weights)

    def forward(self, maps: Sequence[Tensor], kind: str) -> Tensor:
        """maps: (B, C_i, H_i, W_i) of each scale; kind: see pool_map. Returns (B, sum of channels, H, W)."""
        *early, last = (conv(x) for conv, x in zip(self.convs, maps, strict=True))
        if not early:
            return last
        if self.windows:
            early = [_corner(x, *window) for x, window in zip(early, self.windows, strict=True)]
        pooled = [pool_map(x, kind).expand(-1, -1, *last.shape[2:]) for x in early]
        return torch.cat([*pooled, last], dim=1)


def pool_map(x: Tensor, kind: str) -> Tensor:
    """Pool a map (B, C, H, W) to (B, C, 1, 1); kind: 'avg', 'max', or 'avgmax' for the mean of both."""
    if kind == "max":
        return x.amax(dim=(2, 3), keepdim=True)
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean if kind == "avg" else 0.5 * (mean + x.amax(dim=(2, 3), keepdim=True))


def _corner(x: Tensor, window: int, side: int) -> Tensor:
    if x.shape[2:] != (side, side):
        raise ShapeError(
            f"pool='official' averages a {window}x{window} corner of a {side}x{side} map, found a map of "
            f"{x.shape[2]}x{x.shape[3]}. Give {OFFICIAL_SIZE}x{OFFICIAL_SIZE} px or build with pool='global'."
        )
    return x[:, :, :window, :window]


class ExShortcutNet(nn.Module):
    """A backbone, an ExShortcut over its last scales, and a linear classifier, under timm's contract.

    backbone: any module with timm's `feature_info` and `forward_intermediates`, without a head of its own.
    channels: what each of the last `len(channels)` scales gives to the classifier; 0 leaves a scale out.
    windows: see ExShortcut. Raises ConfigError for channels that don't fit or an unknown pooling.
    """

    global_pool: str
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]

    def __init__(
        self,
        *,
        backbone: Any,
        channels: Sequence[int],
        num_classes: int = 1000,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        head_bias: bool = False,
        windows: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        infos = list(backbone.feature_info)
        if not 0 < len(channels) <= len(infos) or min(channels) < 0 or channels[-1] == 0:
            raise ConfigError(
                f"channels is {tuple(channels)}; {type(backbone).__name__} has {len(infos)} scales. Give one "
                "count for each of the last scales, earliest first, 0 to leave one out, the last above 0."
            )
        first = len(infos) - len(channels)
        used = {first + i: count for i, count in enumerate(channels) if count > 0}
        self.taps = list(used)
        self.feature_info = [{**info, "module": f"backbone.{info['module']}"} for info in infos]
        self.in_chans: int = input_config(backbone)["input_size"][0]
        self.num_features = self.head_hidden_size = sum(channels)
        self.drop_rate = drop_rate
        self.head_bias = head_bias
        widths = [infos[i]["num_chs"] for i in self.taps]
        self.shortcut: ExShortcut | None = ExShortcut(widths, list(used.values()), windows)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier, or none for 0 classes.

        global_pool: 'avg', 'max', 'avgmax', '' for no pooling (and no classes), None for the present one.
        Raises ConfigError for another.
        """
        kind = self.global_pool if global_pool is None else global_pool
        if kind not in ("avg", "max", "avgmax", "") or (num_classes > 0 and not kind):
            raise ConfigError(
                f"global_pool is '{kind}' with {num_classes} classes; expected 'avg', 'max' or 'avgmax', "
                "or '' with num_classes=0."
            )
        self.global_pool = kind
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes > 0:
            like = next(self.parameters())
            self.fc = nn.Linear(self.num_features, num_classes, bias=self.head_bias).to(like)
            init_weights(self.fc)

    def get_classifier(self) -> nn.Module:
        """The last linear layer, an Identity where there are no classes."""
        return self.fc

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the backbone wants undecayed, beside biases and norms."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, "no_weight_decay") else ()
        return {f"backbone.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
        """The backbone's parameter groups; shortcut and classifier form the last one."""
        matcher = self.backbone.group_matcher(coarse=coarse)
        if callable(matcher):
            prefix = "backbone."
            return lambda name: matcher(name.removeprefix(prefix)) if name.startswith(prefix) else math.inf
        return {
            name: _in_backbone(spec) if isinstance(spec, str) else [(_in_backbone(p), order) for p, order in spec]
            for name, spec in matcher.items()
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self.backbone.set_grad_checkpointing(enable)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps of the backbone's scales chosen by `indices`, in timm's signature.

        Returns the maps, and before them what `forward_features` returns unless `intermediates_only`; with
        `stop_early` before the last scale of the shortcut, the last map chosen takes its place.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        joined = not intermediates_only and (not stop_early or last >= self.taps[-1])
        wanted = sorted({*take, *(self.taps if joined else ())})
        maps = self._maps(x, wanted, norm=norm, stop_early=True, output_fmt=output_fmt)
        by_index = dict(zip(wanted, maps, strict=True))
        chosen = [by_index[i] for i in wanted if i in take]
        if intermediates_only:
            return chosen
        return (self._join([by_index[i] for i in self.taps]) if joined else chosen[-1]), chosen

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what the maps of `indices` don't need, the shortcut with the head; returns the indices."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        self.backbone.prune_intermediate_layers(take, prune_norm=prune_norm, prune_head=prune_head)
        if prune_head or last < len(self.feature_info) - 1:
            self.shortcut, self.taps = None, [last]
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0, "")
        return list(take)

    def _maps(self, x: Tensor, indices: list[int], **kwargs: Any) -> list[Tensor]:
        if torch.compiler.is_dynamo_compiling():
            # One compilation per image size: with symbolic sides the algebra of the patches takes minutes.
            operator.index(x.shape[2])
            operator.index(x.shape[3])
        return self.backbone.forward_intermediates(x, indices=indices, intermediates_only=True, **kwargs)

    def _join(self, maps: Sequence[Tensor]) -> Tensor:
        return maps[-1] if self.shortcut is None else self.shortcut(maps, self.global_pool or "avg")

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) to one map (B, num_features, h, w) of all scales on the last grid."""
        return self._join(self._maps(x, self.taps))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify what `forward_features` returned: (B, num_classes); only pool with `pre_logits`."""
        if self.global_pool:
            x = pool_map(x, self.global_pool).flatten(1)
        x = self.head_drop(x)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def fuse_(self) -> Self:
        """Inference form, in place: eval mode, BatchNorm folded into convolutions, weights channels last.

        The channels-last layout spares oneDNN a reordering of every map. Calling it again changes nothing.
        """
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvNormAct) and isinstance(module.bn, nn.BatchNorm2d):
                module.conv = fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = module.bn.act
        return self.to(memory_format=torch.channels_last)


def _in_backbone(pattern: str) -> str:
    return r"^backbone\.(?:" + re.sub(r"(?<![\\\[])\^", "", pattern) + ")"


class ExMobileViT(ExShortcutNet):
    """MobileViT-S with an ExShortcut from strides 8, 16 and 32; takes images (B, in_chans, H, W) of any size.

    channels: what the three scales give to the classifier. kwargs: see MobileViT.
    pool: 'global' averages whole maps, as the paper says; 'official' averages the windows of the authors'
    program, meant for their checkpoints: 256x256 px only, else ShapeError.
    img_size: needed for nothing but a check against `pool`. Raises ConfigError for arguments that don't fit.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        global_pool: str = "avg",
        channels: Sequence[int] = (128, 160, 640),
        pool: Literal["global", "official"] = "global",
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        official = pool == "official"
        if not official and pool != "global":
            raise ConfigError(f"pool is '{pool}'; expected 'global' for any size or 'official' for 256 px.")
        if official and img_size not in (None, OFFICIAL_SIZE, (OFFICIAL_SIZE, OFFICIAL_SIZE)):
            raise ConfigError(f"img_size is {img_size}; pool='official' takes 256 px. Use pool='global'.")
        early = [window for window, count in zip(OFFICIAL_WINDOWS, channels, strict=False) if count > 0]
        super().__init__(
            backbone=MobileViT(**kwargs),
            channels=channels,
            num_classes=num_classes,
            global_pool=global_pool,
            drop_rate=drop_rate,
            windows=early if official else (),
        )


def add_exshortcut(
    model: nn.Module,
    channels: Sequence[int],
    *,
    num_classes: int | None = None,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> ExShortcutNet:
    """Give a timm model an ExShortcut in place of its head; an extension of ours.

    model: any classification model of timm with a `features_only` form. It is taken over: its weights stay,
    its head and final norm go. channels: what each of the last `len(channels)` scales gives to the new
    classifier, earliest first. num_classes: None for the model's.
    The network takes the images (B, C, H, W) that the model takes.
    Raises ConfigError where the model has no intermediate maps or `channels` doesn't fit them.
    """
    timm_model: Any = model
    if not hasattr(model, "forward_intermediates") or not hasattr(model, "feature_info"):
        raise ConfigError(
            f"{type(model).__name__} returns no intermediate maps; expected a classification model of timm. "
            "Build it with timm.create_model(NAME), without features_only."
        )
    net = ExShortcutNet(
        backbone=model,
        channels=channels,
        num_classes=timm_model.num_classes if num_classes is None else num_classes,
        global_pool=global_pool,
        drop_rate=drop_rate,
    )
    timm_model.prune_intermediate_layers(net.taps, prune_norm=True, prune_head=True)
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    first = cfg.get("first_conv")
    net.pretrained_cfg = {
        **{key: value for key, value in cfg.items() if key not in ("url", "hf_hub_id", "file")},
        "num_classes": net.num_classes,
        "first_conv": f"backbone.{first}" if isinstance(first, str) else None,
        "classifier": "fc",
    }
    net.default_cfg = net.pretrained_cfg
    return net


def _timm_with_exshortcut(
    *,
    architecture: str,
    channels: Sequence[int],
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    **kwargs: Any,
) -> ExShortcutNet:
    model = timm.create_model(architecture, **kwargs)
    return add_exshortcut(model, channels, global_pool=global_pool, drop_rate=drop_rate)


VARIANTS: dict[str, dict[str, Any]] = {
    "mobilevit_s_exbase": {"channels": (0, 0, 640)},
    "exmobilevit_576": {"channels": (32, 64, 480)},
    "exmobilevit_640": {"channels": (32, 128, 480)},
    "exmobilevit_928": {"channels": (128, 160, 640)},
    "exmobilevit_micro": {
        "channels": (32, 48, 128),
        "widths": (16, 16, 24, 32, 48, 64),
        "dims": (48, 64, 80),
        "depths": (2, 2, 2),
        "stem_stride": 1,
    },
    "mobilevitv2_050_exshortcut": {"channels": (64, 96, 256), "architecture": "mobilevitv2_050"},
}

PAPER: dict[str, PaperResult] = {
    "mobilevit_s_exbase": PaperResult(params=5_636_720, macs=1.7601, top1=None),
    "exmobilevit_576": PaperResult(params=5_558_256, macs=1.7636, top1=None),
    "exmobilevit_640": PaperResult(params=5_630_576, macs=1.7658, top1=None),
    "exmobilevit_928": PaperResult(params=5_958_064, macs=1.7782, top1=None),
}


def _cfg(size: int = 256, grid: int = 8, **kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (grid, grid),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "backbone.stem.conv",
        "classifier": "fc",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        "mobilevit_s_exbase.in1k": _cfg(),
        "exmobilevit_576.in1k": _cfg(),
        "exmobilevit_640.in1k": _cfg(),
        "exmobilevit_928.in1k": _cfg(),
        "exmobilevit_micro.fmnist": {**_cfg(size=32, grid=2), **fashion_mnist_cfg("exmobilevit_micro")},
        "mobilevitv2_050_exshortcut.untrained": _cfg(crop_pct=0.888, mean=(0.0,) * 3, std=(1.0,) * 3),
    }
)


def _create(name: str, pretrained: bool, **kwargs: Any) -> ExShortcutNet:
    kwargs = {**VARIANTS[name], **kwargs}
    build = _timm_with_exshortcut if "architecture" in kwargs else ExMobileViT
    return build_model_with_cfg(build, name, pretrained, feature_cfg={"feature_cls": "getter"}, **kwargs)


@register_model
def mobilevit_s_exbase(pretrained: bool = False, **kwargs: Any) -> ExShortcutNet:
    """MobileViT-S of the authors, their baseline: the last scale alone."""
    return _create("mobilevit_s_exbase", pretrained, **kwargs)


@register_model
def exmobilevit_576(pretrained: bool = False, **kwargs: Any) -> ExShortcutNet:
    """ExMobileViT-576: 32 + 64 + 480 channels, smaller than the baseline."""
    return _create("exmobilevit_576", pretrained, **kwargs)


@register_model
def exmobilevit_640(pretrained: bool = False, **kwargs: Any) -> ExShortcutNet:
    """ExMobileViT-640: 32 + 128 + 480 channels, the size of the baseline."""
    return _create("exmobilevit_640", pretrained, **kwargs)


@register_model
def exmobilevit_928(pretrained: bool = False, **kwargs: Any) -> ExShortcutNet:
    """ExMobileViT-928: 128 + 160 + 640 channels, the most accurate."""
    return _create("exmobilevit_928", pretrained, **kwargs)


@register_model
def exmobilevit_micro(pretrained: bool = False, **kwargs: Any) -> ExShortcutNet:
    """A small ExMobileViT for images of 28 to 64 px, its stem at full resolution; ours."""
    return _create("exmobilevit_micro", pretrained, **kwargs)


@register_model
def mobilevitv2_050_exshortcut(pretrained: bool = False, **kwargs: Any) -> ExShortcutNet:
    """timm's MobileViTv2-0.5 with an ExShortcut; ours."""
    return _create("mobilevitv2_050_exshortcut", pretrained, **kwargs)
