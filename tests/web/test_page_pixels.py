"""The page resizes as leanvit.imaging does, byte for byte: every filter, crop and size, and both orders of Pillow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image

from leanvit import imaging
from leanvit.config import Preprocess, to_dict
from leanvit.runtime.decode import crop_region, pose_region
from node_run import Node

SIZES = [(2, 2), (3, 211), (97, 4), (61, 50), (128, 80), (80, 128), (64, 64), (300, 417), (517, 90), (33, 31)]
"""Of pictures: (height, width). Some are smaller than the input, some have a side of the input, one is the input."""

GREY = {"mean": (0.5,), "std": (0.5,)}

PREPARE = """
import { prepare } from "./prepare.js";
given.values.forEach(({ name, manifest }, index) => save(`found${index}`, prepare(picture(name), manifest).data));
tell(given.values.length);
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("modules"))


def pictures(sizes: list[tuple[int, int]] = SIZES) -> dict[str, np.ndarray]:
    """Noise, where a wrong weight, order or rounding shows in nearly every pixel."""
    rng = np.random.default_rng(0)
    return {f"p{i}": rng.integers(0, 256, (*size, 3), dtype=np.uint8) for i, size in enumerate(sizes)}


def manifest_of(preprocess: Preprocess, pillow: str = PIL.__version__) -> dict[str, Any]:
    return {"preprocess": to_dict(preprocess), "versions": {"pillow": pillow}}


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("crop_mode", ["center", "squash", "letterbox"])
def test_prepared_pixels_are_those_of_imaging(node: Node, interpolation: Any, crop_mode: Any) -> None:
    given = pictures()
    forms = [
        Preprocess((64, 64), interpolation=interpolation, crop_mode=crop_mode, crop_pct=0.875),
        Preprocess((40, 71), interpolation=interpolation, crop_mode=crop_mode, **GREY),
    ]
    cases = [(name, form) for name in given for form in forms]
    node.run(PREPARE, [{"name": name, "manifest": manifest_of(form)} for name, form in cases], **given)
    for index, (name, form) in enumerate(cases):
        expected = imaging.resize(given[name], form)
        assert np.array_equal(node.saved(f"found{index}").reshape(expected.shape), expected), (given[name].shape, form)


def test_a_canvas_has_four_levels_a_pixel_and_three_count(node: Node) -> None:
    given = pictures([(97, 61), (64, 64)])
    form = Preprocess((64, 64))
    canvas = {name: np.concatenate([p, np.full_like(p[:, :, :1], 255)], axis=2) for name, p in given.items()}
    node.run(PREPARE, [{"name": name, "manifest": manifest_of(form)} for name in given], **canvas)
    for index, name in enumerate(given):
        assert np.array_equal(node.saved(f"found{index}"), imaging.resize(given[name], form).ravel())


@pytest.mark.parametrize("version", ["12.3.0", "13.0.0"])
@pytest.mark.parametrize(("height", "vertical_first"), [(137, True), (136, False)])
def test_the_order_of_the_passes_is_that_of_the_pillow_that_made_the_bundle(
    node: Node, version: str, height: int, vertical_first: bool
) -> None:
    given = pictures([(height, 100)])
    image = Image.fromarray(given["p0"])
    across, down = ((64, height), (100, 64))
    first = down if vertical_first and version == "13.0.0" else across
    expected = image.resize(first, Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    form = Preprocess((64, 64), crop_mode="squash")
    node.run(PREPARE, [{"name": "p0", "manifest": manifest_of(form, version)}], **given)
    assert np.array_equal(node.saved("found0").reshape(64, 64, 3), np.asarray(expected))


def test_crops_of_objects_are_those_of_runtime_decode(node: Node) -> None:
    given = pictures([(90, 120), (300, 70)])
    boxes = [
        (0.0, 0.0, 120.0, 90.0),
        (10.25, 5.5, 40.75, 80.125),
        (-20.0, 30.0, 15.5, 33.0),
        (60.0, 80.0, 200.0, 290.5),
    ]
    form = Preprocess((48, 64), interpolation="bilinear")
    cases = [{"name": name, "box": box, "manifest": manifest_of(form)} for name in given for box in boxes]
    told = node.run(
        """
        import { cropRegion, poseRegion } from "./prepare.js";
        tell(given.values.map(({ name, box, manifest }, index) => {
          const region = poseRegion(box, 64 / 48);
          save(`found${index}`, cropRegion(picture(name), region, manifest).data);
          return region;
        }));
        """,
        cases,
        **given,
    )
    for index, case in enumerate(cases):
        region = pose_region(case["box"], 64 / 48)
        assert told[index] == list(region)
        expected = crop_region(given[case["name"]], region, (48, 64))
        assert np.array_equal(node.saved(f"found{index}").reshape(expected.shape), expected), case


def test_a_strip_that_would_grow_to_gigabytes_is_cut_before(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    given = pictures([(3, 900)])
    form = Preprocess((64, 64))
    monkeypatch.setattr(imaging, "MAX_PIXELS", 10_000)
    path = Path(node.folder / "prepare.js")
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("100_000_000", "10_000"), encoding="utf-8")
    try:
        node.run(PREPARE, [{"name": "p0", "manifest": manifest_of(form)}], **given)
    finally:
        path.write_text(text, encoding="utf-8")
    assert np.array_equal(node.saved("found0"), imaging.resize(given["p0"], form).ravel())
