"""Calibration images: collected, and judged before they are trusted; a probe that shows later changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leanvit.errors import CalibrationError, NumericalError
from leanvit.files import fingerprint
from leanvit.quant.losses import outputs_from, sqnr_db

MOST_CHANNELS = 4
"""Of an image: red, green, blue and perhaps transparency."""

LARGEST_VALUE = 1000.0
"""Beyond what any 8-bit image reaches, also one normalised with the statistics of very dark images."""

NOISE_CORRELATION = 0.2
"""Of neighbouring pixels: photographs have above 0.8, independent noise below 0.1 (tests/quant/test_mptq.py)."""

KIND = ("brightness", "contrast", "smoothness")
"""What is compared of two sets of images: mean, logarithm of the standard deviation, correlation of neighbours."""

UNLIKE = 1.0
"""Standard deviations between the means of two sets from which they differ in kind. Of 128 training and 128 validation
images of Fashion-MNIST and of digits no feature differs by more than 0.2; of one against the other, of one inverted,
darkened, blurred or noisy, at least one by more than 1.05 (tests/quant/test_calibration_images.py)."""

PIXELS = 24
PROBE_IMAGES = 4
PROBE_LOGITS = 16
"""How much of calibration images and of outputs a report keeps: enough to recognise them, few enough to read."""


def collect_batches(images: Tensor | Iterable[Any]) -> list[Tensor]:
    """Calibration images as a list of (B, 3, H, W) batches of at most 64."""
    if isinstance(images, Tensor):
        return list(torch.split(images, 64))
    batches = [item[0] if isinstance(item, tuple | list) else item for item in images]
    for batch in batches:
        if not isinstance(batch, Tensor) or batch.dim() != 4:
            found = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise CalibrationError(f"a calibration batch is {found}, expected a tensor (B, 3, H, W).")
    return batches


def check_weights(model: nn.Module) -> None:
    """Raise NumericalError where a weight is not finite: no quantizer can be set for it."""
    bad = {name: p for name, p in model.named_parameters() if not p.isfinite().all()}
    if bad:
        name, parameter = next(iter(bad.items()))
        raise NumericalError(
            f"{int((~parameter.isfinite()).sum())} values of '{name}' are NaN or infinite ({len(bad)} tensors in all), "
            "expected finite weights. Use an earlier checkpoint or train again with a lower --lr."
        )


def check_calibration(batches: list[Tensor]) -> dict[str, Any]:
    """Facts about the calibration images that a gate can judge (leanvit.export.gate.calibration).

    noisy: images whose neighbouring pixels do not correlate. minimum, maximum, channel_std: per channel.
    pixels: a few pixels as "R G B", by which a gate that knows the preprocessing recognises 8-bit images.
    fingerprints: one an image, to count the different ones and to find them among evaluation images.
    Raises CalibrationError for no images, values that are not finite or far out, or a range that was not
    normalised.
    """
    if not batches or not len(batches[0]):
        raise CalibrationError("no calibration images, expected at least 32. Give more --data.")
    images = torch.cat([batch.detach().float().cpu() for batch in batches])
    if not images.isfinite().all():
        raise CalibrationError("calibration images hold NaN or infinity, expected finite values. Check the loader.")
    mean, std = float(images.mean()), float(images.std())
    far = int((images.abs() > LARGEST_VALUE).sum())
    if 0 < far < 0.01 * images.numel():  # where it is most of them, they were not normalised
        raise CalibrationError(
            f"{far} values of the calibration images are beyond {LARGEST_VALUE:.0f} (up to "
            f"{float(images.abs().max()):.3g}), expected normalised pixels, a few units from 0. One such pixel "
            "takes the range of every quantizer: check the loader for damaged images."
        )
    # Features that a later part of a network reads have more channels and whatever range training gave them.
    if images.shape[1] <= MOST_CHANNELS and (abs(mean) > 10 or std > 20):
        raise CalibrationError(
            f"calibration images have mean {mean:.1f} and standard deviation {std:.1f}; a network expects input "
            "normalised to about 0 and 1. Normalise them with leanvit.data.to_input(images, preprocess_for(model))."
        )
    correlations = torch.stack([_neighbour_correlation(image) for image in images])
    return {
        "images": len(images),
        "mean": mean,
        "std": std,
        "neighbour_correlation": float(correlations.mean()),
        "noisy": int((correlations < NOISE_CORRELATION).sum()),
        "minimum": images.amin((0, 2, 3)).tolist(),
        "maximum": images.amax((0, 2, 3)).tolist(),
        "channel_std": images.std((0, 2, 3)).tolist(),
        "pixels": _some_pixels(images),
        "fingerprints": [fingerprint(image.numpy().tobytes()) for image in images],
    }


def unlike(images: Tensor, others: Tensor) -> dict[str, float]:
    """By how many standard deviations two sets of normalised images (N, C, H, W) differ, for each feature of KIND in
    which that is more than UNLIKE."""
    (mean, spread), (other_mean, other_spread) = (_kind_of(values) for values in (images, others))
    distance = (mean - other_mean).abs() / ((spread + other_spread) / 2).sqrt().clamp(min=1e-6)
    return {name: round(far, 2) for name, far in zip(KIND, distance.tolist(), strict=True) if far > UNLIKE}


def _kind_of(images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances of the features of KIND over some images, (3,) float64 each."""
    images = images.detach().float().cpu()
    contrast = images.std((1, 2, 3)).clamp(min=1e-6).log()
    smoothness = torch.stack([_neighbour_correlation(image) for image in images])
    features = torch.stack([images.mean((1, 2, 3)).double(), contrast.double(), smoothness], 1)
    return features.mean(0), features.var(0, correction=0)


def _neighbour_correlation(image: Tensor) -> Tensor:
    """Correlation of horizontal neighbours within the channels: near 1 for images, near 0 for noise, 1 for blank."""
    rows = image[:, :: max(1, image.shape[1] // 32)].double()
    a, b = (part - part.mean((1, 2), keepdim=True) for part in (rows[..., :-1], rows[..., 1:]))
    scale = (a.square().sum() * b.square().sum()).sqrt()
    return torch.where(scale > 1e-9, (a * b).sum() / scale.clamp(min=1e-9), 1.0)


def _some_pixels(images: Tensor) -> list[str]:
    """Up to PIXELS different pixels from all over the images, as text, so that a manifest stays readable."""
    count, _, height, width = images.shape
    n, y, x = torch.from_numpy(np.random.default_rng(0).integers(0, (count, height, width), (100 * PIXELS, 3))).T
    pixels = dict.fromkeys(" ".join(f"{value:.6f}" for value in row) for row in images[n, :, y, x].tolist())
    return list(pixels)[:PIXELS]


def probe_images(size: tuple[int, ...]) -> Tensor:
    """Smooth pictures (PROBE_IMAGES, C, H, W) in the range of normalised ones; the same on every machine."""
    coarse = np.random.default_rng(0).standard_normal((PROBE_IMAGES, size[0], 5, 5), np.float32)
    return F.interpolate(torch.from_numpy(coarse), size[1:], mode="bicubic")


def make_probe(reference: nn.Module, quantized: nn.Module, size: tuple[int, ...]) -> dict[str, Any]:
    """What the float network returns on the probe, and how near the quantized one is: kept in the report.

    size: (C, H, W) of one image. Quantizers that change later, for example to the scales of another
    calibration, show as a lower SQNR.
    """
    outputs = [[float(f"{value:.7g}") for value in row] for row in _outputs(reference, size).tolist()]
    return {"logits": outputs, "sqnr_db": repeat_probe(quantized, outputs, size)}


def repeat_probe(quantized: nn.Module, logits: list[list[float]], size: tuple[int, ...]) -> float:
    """SQNR in dB of a quantized network on the probe, against the float outputs that its report keeps."""
    found = sqnr_db(torch.tensor(logits), _outputs(quantized, size))
    return found if math.isfinite(found) else -200.0


@torch.no_grad()
def _outputs(network: nn.Module, size: tuple[int, ...]) -> Tensor:
    device = next((t.device for t in (*network.parameters(), *network.buffers())), torch.device("cpu"))
    outputs = outputs_from(network(probe_images(size).to(device)))
    # A network without classes returns maps: some values of each of them, spread over the map.
    flat = [output.reshape(PROBE_IMAGES, -1).float() for output in outputs]
    each = max(1, PROBE_LOGITS // len(flat))
    return torch.cat([values[:, :: max(1, values.shape[1] // each)][:, :each] for values in flat], 1).cpu()
