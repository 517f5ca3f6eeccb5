"""Augmentation as a pure function of (seed, epoch, step, image): nothing random needs to be saved for a resume.

Geometry, erasing and mixing work on whole batches of prepared tensors; AutoAugment and RandAugment (timm's) and crops
out of files work on one image. No draw depends on how many processes or workers share a batch.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from leanvit.config import Preprocess, TrainConfig
from leanvit.errors import ConfigError

Pixels = NDArray[np.uint8]

MIXING, ERASING, DROPPING, CROPPING, POLICY, SAMPLING = range(6)
"""First word of a seed: what the numbers are for."""

_GENERATORS = threading.Lock()


def seed_of(*words: int) -> int:
    """A seed of 63 bits that depends on every one of `words` (each at least 0) and their order."""
    high, low = np.random.SeedSequence(words).generate_state(2, np.uint32).tolist()
    return ((int(high) << 32) | int(low)) & 0x7FFF_FFFF_FFFF_FFFF


def draws(seed: int, step: int, total: int, part: slice) -> Tensor:
    """(5, part) float32 in [0, 1): what the images `part` of a step of `total` images get."""
    # Not seed_of(): the shipped recipes were measured with these draws, and shall draw the same again.
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFF_FFFF)
    return torch.rand(5, total, generator=generator)[:, part]


def resample(x: Tensor, uniform: Tensor, config: TrainConfig, size: tuple[int, int], *, crop: bool) -> Tensor:
    """Random crop, rotation and flip as one resampling of a whole batch.

    x: normalised images (B, 3, H, W). uniform: (5, B) in [0, 1). crop: False where images are crops already.
    Returns (B, 3, *size). Shares above 1 in `crop_scale` zoom out; pixels beyond the border repeat it.
    """
    zoom = _zoom(uniform, config) if crop else torch.ones(2, len(x))
    flipped = uniform[4] < config.hflip
    if not crop and not config.degrees:
        return torch.where(flipped.to(x.device)[:, None, None, None], x.flip(-1), x)
    angle = torch.deg2rad(config.degrees * (2 * uniform[1] - 1))
    room = (1 - zoom).clamp(min=0)
    flip = torch.where(flipped, -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    top = torch.stack([zoom[0] * cos * flip, -zoom[1] * sin, room[0] * (2 * uniform[2] - 1)], dim=1)
    bottom = torch.stack([zoom[0] * sin * flip, zoom[1] * cos, room[1] * (2 * uniform[3] - 1)], dim=1)
    theta = torch.stack([top, bottom], dim=1).to(x.device, non_blocking=True)
    grid = F.affine_grid(theta, [len(x), x.shape[1], *size], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _zoom(uniform: Tensor, config: TrainConfig) -> Tensor:
    """Width and height of the crops as shares of the image: (2, B)."""
    low, high = config.crop_scale
    side = torch.sqrt(low + (high - low) * uniform[0])
    if config.crop_ratio == (1.0, 1.0):
        return side.expand(2, -1)
    # One draw serves area and ratio: its lower digits are as good as independent.
    ratio = torch.exp(_between(config.crop_ratio, (uniform[0] * 4096).frac())).sqrt()
    return torch.stack([side * ratio, side / ratio]).clamp(max=max(1.0, high**0.5))


def _between(bounds: tuple[float, float], uniform: Tensor) -> Tensor:
    low, high = np.log(bounds)
    return low + (high - low) * uniform


def erase(x: Tensor, config: TrainConfig, step: int, positions: range) -> Tensor:
    """timm's random erasing with noise; image i of the step by a seed of its own. Changes x (B, 3, H, W) in place."""
    if not config.reprob:
        return x
    from timm.data.random_erasing import RandomErasing

    eraser = RandomErasing(1.0, mode="pixel", device=str(x.device))
    # Drawn here and not by timm, because its generators are set for the few images that are erased only.
    chance = np.random.default_rng(seed_of(ERASING, config.seed, step)).random(positions.stop)
    for row, position in enumerate(positions):
        if chance[position] >= config.reprob:
            continue
        with seeded(seed_of(ERASING, config.seed, step, position), torch_too=True):
            eraser(x[row : row + 1])
    return x


def mix(x: Tensor, labels: Tensor, config: TrainConfig, step: int, classes: int) -> tuple[Tensor, Tensor]:
    """Mixup or CutMix between neighbours, with one share for the whole step.

    x: (B, 3, H, W). labels: (B,), or (B, classes) of 0 and 1. Returns the images and labels (B, classes), of one label
    with sum 1; without mixing the labels as they are. timm pairs an image with its mirror in the batch; neighbours stay
    together when processes share a batch. A last image without a neighbour is paired with itself.
    Sources: Mixup arXiv 1710.09412, CutMix arXiv 1905.04899.
    """
    generator = np.random.default_rng(seed_of(MIXING, config.seed, step))
    mixed, switch = generator.random(2)
    if not config.mixes or mixed >= config.mixup_prob:
        return x, labels
    cut = config.cutmix > 0 and (config.mixup == 0 or switch < config.mixup_switch_prob)
    alpha = config.cutmix if cut else config.mixup
    share = float(generator.beta(alpha, alpha))
    partner = torch.arange(len(x), device=x.device) ^ 1
    partner = torch.where(partner < len(x), partner, partner - 1)
    if cut:
        top, bottom, left, right = _box(share, x.shape[-2:], generator)
        share = 1 - (bottom - top) * (right - left) / (x.shape[-2] * x.shape[-1])
        other = x[partner, :, top:bottom, left:right]
        x = x.clone()
        x[:, :, top:bottom, left:right] = other
    else:
        x = share * x + (1 - share) * x[partner]
    target = (F.one_hot(labels, classes) if labels.ndim == 1 else labels).float()
    return x, share * target + (1 - share) * target[partner]


def _box(share: float, size: tuple[int, ...], generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a box of about 1 - share of the area, cut off at the border."""
    height, width = size
    half_height, half_width = (int(side * (1 - share) ** 0.5) // 2 for side in size)
    y, x = (int(generator.integers(side)) for side in size)
    top, bottom = max(y - half_height, 0), min(y + half_height, height)
    return top, bottom, max(x - half_width, 0), min(x + half_width, width)


def make_policy(config: TrainConfig, preprocess: Preprocess) -> Callable[[Pixels, int], Pixels] | None:
    """timm's policy `config.aa` on (prepared pixels, seed), or None. Raises ConfigError where timm can't read it."""
    if not config.aa:
        return None
    from timm.data.auto_augment import auto_augment_transform, rand_augment_transform

    colour = tuple(min(255, round(255 * value)) for value in preprocess.mean)
    hparams: dict[str, Any] = {"translate_const": int(min(preprocess.input_size) * 0.45), "img_mean": colour}
    make = rand_augment_transform if config.aa.startswith("rand") else auto_augment_transform
    try:
        transform = make(config.aa, hparams)
    except (AssertionError, KeyError, ValueError, IndexError) as error:
        raise ConfigError(
            f"aa is '{config.aa}', which timm can't read ({error}), expected e.g. rand-m9-mstd0.5-inc1."
        ) from error

    def apply(pixels: Pixels, seed: int) -> Pixels:
        with seeded(seed):
            return np.asarray(transform(Image.fromarray(pixels)))

    return apply


@contextmanager
def seeded(seed: int, *, torch_too: bool = False) -> Iterator[None]:
    """Python's and NumPy's own generators start from `seed`, and go on as before afterwards; one thread at a time.

    torch_too: torch's as well. Only the thread that runs the network may ask for it: dropout draws from that one.
    """
    with _GENERATORS:
        python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - timm draws from the global ones
        random.seed(seed)
        np.random.seed(seed & 0xFFFF_FFFF)  # noqa: NPY002
        try:
            with torch.random.fork_rng(devices=[], enabled=torch_too):
                if torch_too:
                    torch.manual_seed(seed)
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
