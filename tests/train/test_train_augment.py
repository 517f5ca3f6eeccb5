"""Random crops, rotations and flips of whole batches against what geometry says."""

from __future__ import annotations

from typing import Any

import torch

from leanvit.config import TrainConfig
from leanvit.train.augment import draws, resample


def augmented(x: torch.Tensor, seed: int = 0, **options: Any) -> torch.Tensor:
    size = options.pop("size", tuple(x.shape[-2:]))
    config = TrainConfig(**{"crop_scale": (1.0, 1.0), "degrees": 0.0, "hflip": 0.0} | options)
    return resample(x, draws(seed, 0, len(x), slice(0, len(x))), config, size, crop=True)


X = torch.randn(5, 3, 12, 16, generator=torch.Generator().manual_seed(1))


def test_augmentation_that_does_nothing_is_the_identity() -> None:
    torch.testing.assert_close(augmented(X), X, atol=2e-5, rtol=0)


def test_a_certain_flip_mirrors_every_image() -> None:
    torch.testing.assert_close(
        augmented(X, hflip=1.0), torch.from_numpy(X.numpy()[:, :, :, ::-1].copy()), atol=2e-5, rtol=0
    )


def test_half_the_flips_mirror_about_half_of_the_images_and_leave_the_others() -> None:
    x = X[:1].repeat(400, 1, 1, 1)
    result = augmented(x, hflip=0.5)
    mirrored = (result - x.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    same = (result - x).abs().amax((1, 2, 3)) < 1e-4
    assert bool((mirrored ^ same).all())
    assert 150 < int(mirrored.sum()) < 250


def test_augmentation_is_a_pure_function_of_images_and_generator() -> None:
    options = {"crop_scale": (0.5, 1.0), "degrees": 20.0, "hflip": 0.5}
    first = augmented(X, seed=3, **options)
    torch.rand(7)
    assert torch.equal(augmented(X, seed=3, **options), first)
    assert not torch.equal(augmented(X, seed=4, **options), first)


def test_a_crop_stays_inside_the_picture_and_magnifies_it_by_the_square_root_of_its_share() -> None:
    ramp = torch.linspace(-1, 1, 64)
    x = torch.stack([ramp.expand(64, 64), ramp[:, None].expand(64, 64), torch.zeros(64, 64)]).expand(200, 3, 64, 64)
    result = augmented(x, crop_scale=(0.25, 0.25))
    step = float(ramp[1] - ramp[0])
    slope = (result[:, 0, :, 1:] - result[:, 0, :, :-1])[:, :, 1:-1]
    torch.testing.assert_close(slope, torch.full_like(slope, step * 0.5), atol=1e-5, rtol=0)
    left, top = result[:, 0, 0, 0], result[:, 1, 0, 0]
    assert float(result[:, :2].min()) >= -1
    assert float(result[:, :2].max()) <= 1
    for start in (left, top):
        assert float(start.min()) < -0.9
        assert -0.1 < float(start.max()) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([left, top]))[0, 1])) < 0.3


def test_rotation_keeps_the_centre_and_turns_by_at_most_the_given_angle() -> None:
    ramp = torch.linspace(-1, 1, 65)
    x = torch.stack([ramp.expand(65, 65), ramp[:, None].expand(65, 65), torch.zeros(65, 65)]).expand(100, 3, 65, 65)
    result = augmented(x, degrees=30.0)
    torch.testing.assert_close(result[:, :2, 32, 32], torch.zeros(100, 2), atol=1e-5, rtol=0)
    across = result[:, :2, 32, 40] - result[:, :2, 32, 24]
    angles = torch.rad2deg(torch.atan2(across[:, 1], across[:, 0]))
    assert float(angles.abs().max()) <= 30.01
    assert float(angles.max()) > 20
    assert float(angles.min()) < -20


def test_augmentation_resizes_to_the_size_asked_for() -> None:
    assert augmented(X, size=(6, 10)).shape == (5, 3, 6, 10)
