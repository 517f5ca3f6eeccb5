"""Which images a step has, and what happens to them, whoever loads them and however many share the work."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from leanvit.config import Preprocess, TrainConfig
from leanvit.data.loader import Loader, epoch_order
from leanvit.data.sets import load_split
from leanvit.errors import ConfigError, ImageError
from leanvit.train.augment import draws, erase, make_policy, mix, resample, seed_of
from leanvit.train.batches import Batches, Part, split_step
from leanvit.train.processes import Processes

SIZE = (24, 24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty-two noisy pictures of 40 x 30 pixels in two classes."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for index in range(11):
            Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(root / name / f"{index}.png")
    return root


def batches(folder: Path, processes: Processes | None = None, **options: object) -> Batches:
    config = TrainConfig(data=str(folder), val_fraction=0.1, batch_size=6, **options)
    memory = None if config.cache == "auto" else config.cache == "memory"
    loader = Loader(
        load_split(config.data, "train", val_fraction=0.1), Preprocess(input_size=SIZE), 6, config.bad_images,
        in_memory=memory,
    )  # fmt: skip
    return Batches(loader, config, processes or Processes())


def together(parts: list[Part]) -> tuple[np.ndarray, torch.Tensor]:
    return np.concatenate([p.indices for p in parts]), torch.cat([p.images for p in parts])


@given(st.integers(1, 200), st.integers(1, 9))
def test_parts_of_a_step_are_its_images_in_order_and_neighbours_stay_together(total: int, parts: int) -> None:
    pieces = split_step(total, parts)
    assert len(pieces) == parts
    assert [i for piece in pieces for i in range(total)[piece]] == list(range(total))
    assert all(piece.start % 2 == 0 or piece.start == total for piece in pieces)
    sizes = [piece.stop - piece.start for piece in pieces]
    assert max(sizes) - min(sizes) <= 3


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_processes_and_parts_share_an_epoch_without_gap_or_overlap(folder: Path, world: int, accumulated: int) -> None:
    every = [
        list(batches(folder, Processes(rank, world), grad_accum_steps=accumulated).epoch(3)) for rank in range(world)
    ]
    order = epoch_order(20, 0, 3)
    for step in range(4):
        parts = [p for parts in every for p in parts if p.step == step]
        assert np.concatenate([p.indices for p in parts]).tolist() == order[step * 6 : step * 6 + 6].tolist()
        assert {p.total for p in parts} == {len(order[step * 6 : step * 6 + 6])}
        assert [p.position for p in parts] == np.cumsum([0, *(len(p.labels) for p in parts)])[:-1].tolist()
    assert all(sum(p.last for p in parts) == 4 for parts in every)


@pytest.mark.parametrize("cache", ["memory", "none"])
@pytest.mark.parametrize("aa", [None, "rand-m9-mstd0.5-inc1"])
def test_worker_processes_give_the_same_images_as_none(folder: Path, cache: str, aa: str | None) -> None:
    found = [together(list(batches(folder, cache=cache, aa=aa, workers=w).epoch(1))) for w in (0, 2)]
    assert found[0][0].tolist() == found[1][0].tolist()
    assert torch.equal(found[0][1], found[1][1])
    other = together(list(batches(folder, cache=cache, aa=aa).epoch(2)))
    same_image = np.flatnonzero(other[0] == found[0][0][0])[0]
    unchanged = cache == "memory" and aa is None
    assert torch.equal(other[1][same_image], found[0][1][0]) == unchanged


def test_an_epoch_can_start_in_its_middle(folder: Path) -> None:
    whole, rest = (list(batches(folder, cache="none").epoch(0, first)) for first in (0, 2))
    assert [p.step for p in rest] == [2, 3]
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[2:], rest, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_file_fails_by_name_or_is_left_out(folder: Path, tmp_path: Path, workers: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for path in (folder / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / "a" / "5.png"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(ImageError, match=r"a/5\.png.*--bad-images skip"):
        list(batches(tmp_path, cache="none", workers=workers).epoch(0))
    parts = list(batches(tmp_path, cache="none", workers=workers, bad_images="skip").epoch(0))
    assert sum(len(p.labels) for p in parts) == 19
    assert [reason for p in parts for reason in p.unreadable if "5.png" in reason]


def test_crops_of_files_have_the_size_of_the_input(folder: Path) -> None:
    for part in batches(folder, cache="none", crop_scale=(0.1, 1.0), crop_ratio=(0.5, 2.0)).epoch(0):
        assert part.images.shape[1:] == (*SIZE, 3)


def test_resampling_without_anything_random_leaves_an_image_as_it_is() -> None:
    config = TrainConfig(crop_scale=(1.0, 1.0), degrees=0.0, hflip=0.0)
    x = torch.rand(3, 3, *SIZE)
    uniform = torch.rand(5, 3)
    assert torch.allclose(resample(x, uniform, config, SIZE, crop=True), x, atol=1e-5)
    flipped = resample(x, uniform, replace(config, hflip=1.0), SIZE, crop=True)
    assert torch.allclose(flipped, x.flip(-1), atol=1e-5)
    assert torch.equal(resample(x, uniform, replace(config, hflip=1.0), SIZE, crop=False), x.flip(-1))


def test_a_crop_of_a_quarter_shows_every_other_pixel_step() -> None:
    """A ramp from 0 to 1 across the image: a crop of a quarter of the area spans half of the ramp."""
    config = TrainConfig(crop_scale=(0.25, 0.25), degrees=0.0)
    ramp = torch.linspace(0, 1, 24).expand(1, 3, 24, 24)
    found = resample(ramp, torch.rand(5, 1), config, SIZE, crop=True)
    assert float(found[..., -1].mean() - found[..., 0].mean()) == pytest.approx(0.5, abs=0.03)
    wide = resample(ramp, torch.rand(5, 1), replace(config, crop_ratio=(4.0, 4.0)), SIZE, crop=True)
    assert float(wide[..., -1].mean() - wide[..., 0].mean()) == pytest.approx(1.0, abs=0.05)


def test_draws_do_not_depend_on_how_a_step_is_shared() -> None:
    whole = draws(3, 7, 10, slice(0, 10))
    assert torch.equal(torch.cat([draws(3, 7, 10, slice(0, 4)), draws(3, 7, 10, slice(4, 10))], dim=1), whole)
    assert not torch.equal(draws(3, 8, 10, slice(0, 10)), whole)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixed_images_and_labels_have_the_same_shares(mixup: float, cutmix: float) -> None:
    """Images of one value each, so that the mean of a mixed one tells the share of either."""
    config = TrainConfig(mixup=mixup, cutmix=cutmix)
    labels = torch.tensor([0, 1, 2, 3, 4])
    x = labels.float().view(5, 1, 1, 1).expand(5, 3, *SIZE)
    kinds = set()
    for step in range(12):
        mixed, target = mix(x, labels, config, step, 5)
        assert torch.allclose(target.sum(1), torch.ones(5))
        assert torch.allclose(mixed.mean((1, 2, 3)), target @ torch.arange(5.0), atol=1e-5)
        assert target[4].tolist() == [0, 0, 0, 0, 1]
        assert set(target[0].nonzero().flatten().tolist()) <= {0, 1}
        halves = [mix(x[:2], labels[:2], config, step, 5), mix(x[2:], labels[2:], config, step, 5)]
        assert torch.equal(torch.cat([h[0] for h in halves]), mixed)
        kinds.add(len(mixed[0].unique()))
    # A mixture has one value, a cut image mostly two.
    assert (1 in kinds, 2 in kinds) >= (mixup > 0, cutmix > 0)
    assert cutmix > 0 or kinds == {1}


def test_without_mixing_labels_stay_numbers() -> None:
    x, labels = torch.rand(4, 3, *SIZE), torch.arange(4)
    assert mix(x, labels, TrainConfig(), 0, 4)[1] is labels
    assert mix(x, labels, TrainConfig(mixup=1.0, mixup_prob=0.0), 0, 4)[1] is labels


def test_erasing_is_by_image_and_leaves_the_generators_alone() -> None:
    config = TrainConfig(reprob=1.0)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    whole = erase(torch.zeros(6, 3, *SIZE), config, 2, range(6))
    assert torch.equal(torch.get_rng_state(), before)
    shared = [erase(torch.zeros(3, 3, *SIZE), config, 2, range(start, start + 3)) for start in (0, 3)]
    assert torch.equal(torch.cat(shared), whole)
    assert all(0 < int((image != 0).sum()) < image.numel() for image in whole)
    assert torch.equal(erase(torch.zeros(2, 3, 4, 4), TrainConfig(), 0, range(2)), torch.zeros(2, 3, 4, 4))


def test_a_policy_is_a_function_of_its_seed_and_a_wrong_one_is_named() -> None:
    preprocess = Preprocess(input_size=SIZE)
    policy = make_policy(TrainConfig(aa="rand-m9-mstd0.5-inc1"), preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    assert policy is not None
    results = [policy(pixels, seed) for seed in (1, 1, 2, 3, 4)]
    assert np.array_equal(results[0], results[1])
    assert any(not np.array_equal(results[0], other) for other in results[2:])
    with pytest.raises(ConfigError, match="aa is 'nonsense'"):
        make_policy(TrainConfig(aa="nonsense"), preprocess)


@given(st.tuples(*[st.integers(0, 2**32)] * 3), st.tuples(*[st.integers(0, 2)] * 3))
def test_seeds_tell_every_word_apart(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    assert (seed_of(*first) == seed_of(*second)) == (first == second)
