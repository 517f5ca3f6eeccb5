"""Any timm backbone as a feature pyramid: maps at strides 4, 8, 16, 32, all with the same number of channels.

Backbones with stages return their own maps. One with a single resolution (ViT, ReViT) returns its last map, from which
finer and coarser ones are made (simple feature pyramid: Li et al., arXiv 2203.16527, section 3). Above both stands
torchvision's FPN (Lin et al., arXiv 1612.03144).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork

from leanvit.errors import ConfigError, UnknownModelError, did_you_mean
from leanvit.load.state_dicts import grid_of, resampled_positions

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class BackboneConfig:
    """Which backbone, and what stands on it.

    architecture: timm name. size: (height, width) of the network's input in pixels, multiples of 32.
    channels: of every map of the pyramid. kwargs: more arguments of timm.create_model, e.g. drop_path_rate.
    """

    architecture: str
    size: tuple[int, int]
    channels: int = 256
    kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if any(side < STRIDES[-1] or side % STRIDES[-1] for side in self.size):
            raise ConfigError(f"size is {self.size}, expected two multiples of {STRIDES[-1]}")


class Features(nn.Module):
    """A backbone: (B, 3, H, W) normalised images -> maps (B, widths[i], H / s, W / s) for s = 4, 8, 16, 32.

    widths: channels of the four maps. deepest: (stride, channels) of the backbone's own last map.
    """

    def __init__(self, config: BackboneConfig) -> None:
        """Build the backbone with random weights; raises UnknownModelError, ConfigError."""
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config)
        levels: Any = self.backbone.feature_info
        reductions, widths = levels.reduction(), levels.channels()
        self.channels_last = getattr(self.backbone, "output_fmt", None) == "NHWC"
        self.sources = [_source(stride, reductions) for stride in STRIDES]
        self.widths = [widths[source] for source in self.sources]
        self.deepest = (reductions[-1], widths[-1])
        self.resizers = nn.ModuleList(
            _resizer(reductions[source], stride, width)
            for source, stride, width in zip(self.sources, STRIDES, self.widths, strict=True)
        )

    def own(self, x: Tensor) -> list[Tensor]:
        """The backbone's own maps (B, C, h, w), whatever their strides."""
        found: list[Tensor] = self.backbone(x)
        return [each.permute(0, 3, 1, 2).contiguous() for each in found] if self.channels_last else found

    def forward(self, x: Tensor) -> list[Tensor]:
        """x: (B, 3, H, W) float32. Returns the maps at strides 4, 8, 16, 32, finest first."""
        found = self.own(x)
        return [resizer(found[source]) for source, resizer in zip(self.sources, self.resizers, strict=True)]


class Pyramid(nn.Module):
    """Backbone and FPN: (B, 3, H, W) normalised images -> maps (B, channels, H / s, W / s) for s = 4, 8, 16, 32."""

    def __init__(self, config: BackboneConfig) -> None:
        """Build with random weights; raises UnknownModelError, ConfigError."""
        super().__init__()
        self.features = Features(config)
        self.neck = FeaturePyramidNetwork(self.features.widths, config.channels)
        self.out_channels = config.channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """x: (B, 3, H, W) float32. Returns {"0": stride 4, ..., "3": stride 32}, each (B, channels, ...)."""
        maps = OrderedDict((str(i), each) for i, each in enumerate(self.features(x)))
        pyramid: dict[str, Tensor] = self.neck(maps)
        return pyramid


def create_backbone(config: BackboneConfig) -> nn.Module:
    """timm.create_model(features_only=True) for a fixed input size, with errors that help."""
    import timm

    import leanvit.models  # noqa: F401 - registers our architectures

    name = config.architecture.split(".")[0]
    if not timm.is_model(name):
        raise UnknownModelError(f"Unknown model '{name}'.{did_you_mean(name, timm.list_models())} Run: leanvit models")
    options = dict(config.kwargs or {})
    try:
        return timm.create_model(name, features_only=True, img_size=config.size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    except (RuntimeError, AttributeError) as error:
        raise ConfigError(
            f"model '{name}' returns no feature maps ({error}). Take one whose `features_only` works in timm."
        ) from error
    return timm.create_model(name, features_only=True, **options)


def _source(stride: int, reductions: list[int]) -> int:
    """Index of the map that a level is made of: the deepest with its stride, else the deepest of all."""
    same = [i for i, reduction in enumerate(reductions) if reduction == stride]
    if same and len(set(reductions)) > 1:
        return same[-1]
    return len(reductions) - 1


def _resizer(reduction: int, stride: int, width: int) -> nn.Module:
    """What brings a map from one stride to another: transposed convolutions, nothing, or max pooling."""
    if reduction > stride:
        steps: list[nn.Module] = []
        while reduction > stride:
            steps += [nn.ConvTranspose2d(width, width, 2, stride=2), nn.GroupNorm(1, width), nn.GELU()]
            reduction //= 2
        return nn.Sequential(*steps[:-2])
    return _Pool(stride // reduction) if reduction < stride else nn.Identity()


class _Pool(nn.Module):
    """Max pooling by a whole factor."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.factor)


def load_backbone(features: Features, classifier: nn.Module) -> list[str]:
    """Copy a classifier's weights into the backbone; position embeddings are resampled to the new size.

    classifier: the same architecture as timm.create_model returns it. Returns the names of the backbone's tensors that
    the classifier does not have; they keep their random values. Raises ConfigError where most of them are missing.
    """
    backbone = features.backbone
    own = backbone.state_dict()
    given = classifier.state_dict()
    renamed = {key: _counterpart(key, given) for key in own}
    missing = []
    for key, tensor in own.items():
        source = renamed[key]
        value = given[source] if source else None
        if source and value is not None and value.shape != tensor.shape:
            value = resampled_positions(key, value, tensor, grid_of(classifier, source), grid_of(backbone, key))
        if value is None:
            missing.append(key)
        else:
            own[key] = value.to(tensor.dtype)
    if len(missing) > len(own) // 2:
        raise ConfigError(
            f"{len(missing)} of {len(own)} tensors of {features.config.architecture}'s features are not in the given "
            f"classifier, e.g. '{missing[0]}'. Give weights of the same architecture."
        )
    features.backbone.load_state_dict(own)
    return missing


def _counterpart(key: str, given: dict[str, Tensor]) -> str | None:
    """The classifier's name of a tensor: features_only flattens modules ('stages_0.x') or wraps them ('model.x')."""
    for candidate in (key, key.removeprefix("model."), _unflattened(key)):
        if candidate in given:
            return candidate
    return None


def _unflattened(key: str) -> str:
    first, _, rest = key.partition(".")
    name, _, index = first.rpartition("_")
    return f"{name}.{index}.{rest}" if name and index.isdigit() else key


@torch.no_grad()
def check_strides(features: Features) -> None:
    """Raise ConfigError where the maps do not have the strides that the heads expect."""
    height, width = features.config.size
    features.eval()
    device = next(features.parameters()).device
    for stride, level in zip(STRIDES, features(torch.zeros(1, 3, height, width, device=device)), strict=True):
        if tuple(level.shape[-2:]) != (height // stride, width // stride):
            raise ConfigError(
                f"{features.config.architecture} returns a map of {tuple(level.shape[-2:])} at stride {stride} for "
                f"input {features.config.size}, expected {(height // stride, width // stride)}. "
                "Take another size or model."
            )
