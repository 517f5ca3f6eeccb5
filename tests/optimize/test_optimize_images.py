"""What optimize measures on: classes by name, photographs without classes, and no image in both parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common import save_image, smooth
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import OptimizeOptions
from leanvit.data.sets import ImageSet
from leanvit.errors import DataError
from leanvit.optimize.images import OWN_LABELS, Images, read_images
from small_vit import CLASSES, classes, pictures, small_info


class Brightest(nn.Module):
    """The class is the channel that is brightest on average."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


NETWORK = Brightest()
OPTIONS = OptimizeOptions(calibration_images=1000)


def read(data: Path, info: CheckpointInfo | None = None, options: OptimizeOptions = OPTIONS) -> Images:
    return read_images(NETWORK, info or small_info(), str(data), options)


def names(images: Images) -> list[str]:
    assert isinstance(images.val, ImageSet)
    return [str(source) for source in images.val.sources]


def test_a_folder_without_classes_is_labelled_by_the_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pictures(tmp_path / "photos", 20)
    found = read(folder)
    assert not found.labelled
    assert found.count == 4  # the share of 0.2 that a checkpoint holds out
    assert len(found.x) == 16
    assert OWN_LABELS in found.val.name
    assert isinstance(found.val, ImageSet)
    brightest = [int(np.argmax(smooth(32, 32, seed=int(Path(name).stem)).mean((0, 1)))) for name in names(found)]
    assert found.val.labels.tolist() == brightest
    assert "agreement with the float network, on 4 images" in capsys.readouterr().err


@pytest.mark.parametrize("below", ["one folder", "train and val"])
def test_folders_that_are_no_classes_have_none(below: str, tmp_path: Path) -> None:
    if below == "one folder":
        pictures(tmp_path / "photos" / "2024", 10)
    else:
        pictures(tmp_path / "photos" / "train", 8)
        pictures(tmp_path / "photos" / "val", 5, seed=1)
    found = read(tmp_path / "photos")
    assert not found.labelled
    assert (len(found.x), found.count) == ((8, 2) if below == "one folder" else (8, 5))


def test_no_image_is_calibrated_on_and_measured_on(tmp_path: Path) -> None:
    found = read(pictures(tmp_path / "photos", 30))
    assert len(set(names(found))) == found.count == 6
    held_out = {evaluated.tobytes() for evaluated in found.evaluation.pixels}
    calibrated = ((found.x * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    assert len(calibrated) == 24
    assert not held_out & {image.tobytes() for image in calibrated}


def test_some_of_the_network_classes_are_found_by_name(tmp_path: Path) -> None:
    for name, seed in (("owl", 0), ("cat", 1)):
        pictures(tmp_path / "photos" / name, 10, seed=seed)
    found = read(tmp_path / "photos")
    assert found.labelled
    assert isinstance(found.val, ImageSet)
    assert found.val.classes == found.info.labels == CLASSES
    of = {"cat": 0, "owl": 2}
    assert found.val.labels.tolist() == [of[Path(name).parent.name] for name in names(found)]


def test_folders_with_other_names_are_photographs_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("holiday", "garden"):
        pictures(tmp_path / "photos" / name, 10, seed=len(name))
    assert not read(tmp_path / "photos").labelled
    assert "taken as photographs without labels" in capsys.readouterr().err


def test_a_class_that_the_network_does_not_know_is_an_error_where_others_are_known(tmp_path: Path) -> None:
    for name in ("cat", "garden"):
        pictures(tmp_path / "photos" / name, 10, seed=len(name))
    with pytest.raises(DataError, match="cat"):
        read(tmp_path / "photos")


def test_validation_images_can_be_fewer_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = classes(tmp_path / "photos", 20)
    found = read(data, options=OptimizeOptions(val_images=5))
    assert found.count == 5
    assert "measured on 5 of 12 validation images" in capsys.readouterr().err
    assert read(data, options=OptimizeOptions(val_images=0)).count == 12


def test_another_picture_is_another_fingerprint(tmp_path: Path) -> None:
    data = pictures(tmp_path / "photos", 12)
    before = read(data).fingerprint
    assert read(data).fingerprint == before
    save_image(data / "3.png", smooth(32, 32, seed=77))
    assert read(data).fingerprint != before
