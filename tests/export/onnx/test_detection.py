"""One graph for a two-stage detector: its outputs and its pieces against torchvision's own forward."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import MultiScaleRoIAlign, batched_nms, clip_boxes_to_image, nms, remove_small_boxes
from torchvision.ops.poolers import initLevelMapper

from leanvit.config import Preprocess
from leanvit.errors import ExportError, is_installed
from leanvit.export.onnx import detection_glue as glue
from leanvit.export.onnx.detection import assemble
from leanvit.export.onnx.detection_glue import EMPTY
from leanvit.export.onnx.inputs import ImageInput
from leanvit.export.onnx.quantizers import OPSET, OnnxLinear
from leanvit.export.onnx.storage import pack_four_bits
from leanvit.runtime.engines import openvino_core
from leanvit.tasks.build import raw_outputs
from leanvit.tasks.detect import LEVELS, PART_OUTPUTS, Detector, DetectorConfig
from leanvit.tasks.features import STRIDES, BackboneConfig
from sessions import open_model

SIZE = (96, 128)
CHANNELS = 8
CLASSES = 4
CONFIG = DetectorConfig(
    anchor_scale=1, head_width=32, mask_width=16, mask_layers=1, proposals=50, sampled=32, detections=10
)
PREPROCESS = Preprocess(SIZE)
TOLERANCES = {"boxes": 1e-2, "scores": 1e-4, "labels": 0, "masks": 1e-3}
RUNTIMES = ["onnxruntime", "openvino"]
Arrays = dict[str, NDArray[Any]]


def detector_of(config: DetectorConfig) -> Detector:
    """The same random weights for every configuration, loud enough that objects are found on all levels."""
    backbone = BackboneConfig("test_resnet", SIZE, CHANNELS)
    detector = Detector(backbone, CLASSES, config).eval()
    weights = random_weights()
    detector.load_state_dict({name: weights[name] for name in detector.state_dict()})
    return detector


@lru_cache(maxsize=1)
def random_weights() -> dict[str, torch.Tensor]:
    """Weights that give each output a spread worth testing, where torchvision's own start near 0."""
    torch.manual_seed(0)
    detector = Detector(BackboneConfig("test_resnet", SIZE, CHANNELS), CLASSES, CONFIG).eval()
    head, heads = detector.network.rpn.head, detector.network.roi_heads
    x = normalised(images_of(2))
    with torch.no_grad():
        for block, found in zip(detector.pyramid.neck.layer_blocks, detector.pyramid(x).values(), strict=True):
            block[0].weight /= found.std()
        seen = head.conv(detector.pyramid(x)["0"])
        head.cls_logits.weight *= 3.0 / head.cls_logits(seen).std()
        head.bbox_pred.weight *= 0.9 / head.bbox_pred(seen).std()
        head.bbox_pred.bias += torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(3)  # larger than anchors: up to the last level
        seen = heads.box_head(torch.randn(50, CHANNELS, 7, 7))
        heads.box_predictor.cls_score.weight *= 3.0 / heads.box_predictor.cls_score(seen).std()
        heads.box_predictor.bbox_pred.weight *= 2.0 / heads.box_predictor.bbox_pred(seen).std()
    return detector.state_dict()


def lowered(module: nn.Module, example: torch.Tensor, name: str) -> onnx.ModelProto:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad():
        program = torch.onnx.export(
            module.eval(),
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=OPSET,
            input_names=["images" if name == "pyramid" else "cells"],
            output_names=list(PART_OUTPUTS[name]),
            verbose=False,
        )
    assert program is not None
    return program.model_proto


@lru_cache(maxsize=1)
def float_parts() -> dict[str, onnx.ModelProto]:
    """Parts of the detector with masks; weights don't depend on the rest of the configuration."""
    parts = detector_of(CONFIG).parts()
    return {
        "pyramid": lowered(ImageInput(parts["pyramid"], PREPROCESS), torch.zeros(2, *SIZE, 3).byte(), "pyramid"),
        "box": lowered(parts["box"], torch.zeros(2, CHANNELS, 7, 7), "box"),
        "mask": lowered(parts["mask"], torch.zeros(2, CHANNELS, 14, 14), "mask"),
    }


def parts_for(config: DetectorConfig) -> dict[str, onnx.ModelProto]:
    return {name: part for name, part in float_parts().items() if name != "mask" or config.masks}


def runner(model: onnx.ModelProto, runtime: str = "onnxruntime") -> Callable[[Arrays], Arrays]:
    names = [each.name for each in model.graph.output]
    if runtime == "onnxruntime":
        session = open_model(model)
        return lambda inputs: dict(zip(names, session.run(None, inputs), strict=True))
    if not is_installed("openvino"):
        pytest.skip("openvino is not installed")
    core = openvino_core()
    compiled = core.compile_model(
        core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )

    def run(inputs: Arrays) -> Arrays:
        found = compiled(inputs)
        return {name: np.array(found[name]) for name in names}

    return run


def images_of(batch: int, seed: int = 0) -> NDArray[np.uint8]:
    """Blocks of several sizes."""
    rng = np.random.default_rng(seed)
    fine = rng.integers(0, 256, (batch, *SIZE, 3))
    coarse = np.kron(rng.integers(0, 256, (batch, SIZE[0] // 16, SIZE[1] // 16, 3)), np.ones((1, 16, 16, 1)))
    return ((fine + 3 * coarse) // 4).astype(np.uint8)


def normalised(images: NDArray[np.uint8]) -> torch.Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(each).view(1, 3, 1, 1) for each in (PREPROCESS.mean, PREPROCESS.std))
    return (x - mean) / std


def expected(detector: Detector, images: NDArray[np.uint8]) -> Arrays:
    return raw_outputs(detector, "segment" if detector.config.masks else "detect", normalised(images))


def assert_answers(found: Arrays, wanted: Arrays) -> None:
    assert set(found) == {*wanted, "objectness"}
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert found[name].dtype == value.dtype
        np.testing.assert_allclose(found[name], value, rtol=0, atol=TOLERANCES[name], err_msg=name)


@dataclass(frozen=True)
class Seen:
    """What torchvision's second stage gets: proposals of each image, and the level of each."""

    counts: list[int]
    levels: list[int]


def seen_by_heads(detector: Detector, images: NDArray[np.uint8]) -> Seen:
    seen: list[Seen] = []
    pooler = detector.network.roi_heads.box_roi_pool

    def look(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        seen.append(Seen([len(each) for each in inputs[1]], pooler.map_levels(inputs[1]).tolist()))

    handle = pooler.register_forward_hook(look)
    expected(detector, images)
    handle.remove()
    return seen[0]


# --- the whole graph ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("masks", [True, False])
def test_answers_are_those_of_torchvision_at_every_batch_size(masks: bool, runtime: str) -> None:
    detector = detector_of(replace(CONFIG, masks=masks))
    run = runner(assemble(parts_for(detector.config), detector, SIZE), runtime)
    for batch in (1, 2, 3):
        images = images_of(batch, seed=batch)
        wanted = expected(detector, images)
        assert (wanted["scores"] > 0).sum() >= 3 * batch
        assert_answers(run({"images": images}), wanted)


def test_the_other_tests_use_every_level_and_several_classes() -> None:
    detector = detector_of(replace(CONFIG, proposals=300, detections=100))
    images = images_of(3)
    assert set(seen_by_heads(detector, images).levels) == {0, 1, 2, 3}
    answers = expected(detector, images)
    assert len(np.unique(answers["labels"][answers["scores"] > 0])) >= 3


CASES = {
    "many overlapping boxes": replace(CONFIG, proposals=300, detections=100, nms_threshold=0.95, score_threshold=0.02),
    "strict suppression": replace(CONFIG, proposals=300, detections=100, nms_threshold=0.05),
    "every score counts": replace(CONFIG, proposals=60, detections=100, score_threshold=0.0),
    "fewer candidates than proposals": replace(CONFIG, proposals=5000, detections=30),
    "fewer boxes than detections": replace(CONFIG, proposals=2, detections=40, score_threshold=0.0),
    "one proposal, one detection": replace(CONFIG, proposals=1, detections=1, score_threshold=0.0),
    "nothing found in any image": replace(CONFIG, score_threshold=1.0),
    "another anchor scale": replace(CONFIG, anchor_scale=4.0, proposals=200),
}


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", CASES)
def test_unusual_settings(case: str, runtime: str) -> None:
    detector = detector_of(CASES[case])
    images = images_of(3, seed=7)
    run = runner(assemble(parts_for(detector.config), detector, SIZE), runtime)
    assert_answers(run({"images": images}), expected(detector, images))


def test_the_cases_are_what_their_names_say() -> None:
    images = images_of(3, seed=7)
    crowded = expected(detector_of(CASES["many overlapping boxes"]), images)
    assert (crowded["scores"] > 0).sum() > 150
    assert max(seen_by_heads(detector_of(CASES["fewer candidates than proposals"]), images).counts) < 3060
    few = expected(detector_of(CASES["fewer boxes than detections"]), images)["scores"]
    assert 0 < (few > 0).sum(1).max() <= 2 * CLASSES
    assert not expected(detector_of(CASES["nothing found in any image"]), images)["scores"].any()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_an_image_without_detections_between_others(runtime: str) -> None:
    images = images_of(3, seed=3)
    best = expected(detector_of(CONFIG), images)["scores"].max(1)
    poorest = int(best.argmin())
    images = images[[*(i for i in range(3) if i != poorest), poorest]][[0, 2, 1]]
    lowest, next_lowest = np.sort(best)[:2]
    detector = detector_of(replace(CONFIG, score_threshold=float((lowest + next_lowest) / 2)))
    wanted = expected(detector, images)
    assert (wanted["scores"] > 0).any(1).tolist() == [True, False, True]
    assert_answers(runner(assemble(parts_for(CONFIG), detector, SIZE), runtime)({"images": images}), wanted)


def test_objectness_is_in_the_order_of_torchvision() -> None:
    detector = detector_of(CONFIG)
    images = images_of(2)
    with torch.no_grad():
        found = detector.parts()["pyramid"](normalised(images))
    logits, _ = concat_box_prediction_layers(list(found[4:8]), list(found[8:]))
    got = runner(assemble(parts_for(CONFIG), detector, SIZE))({"images": images})["objectness"]
    np.testing.assert_allclose(got, logits.reshape(2, -1).numpy(), rtol=1e-4, atol=1e-3)


# --- the file -------------------------------------------------------------------------------------------------


def test_the_file_is_valid_deterministic_and_says_nothing_of_this_machine() -> None:
    detector = detector_of(CONFIG)
    model = assemble(parts_for(CONFIG), detector, SIZE)
    onnx.checker.check_model(model, full_check=True)
    assert model.SerializeToString() == assemble(parts_for(CONFIG), detector, SIZE).SerializeToString()
    assert {each.domain: each.version for each in model.opset_import}[""] == OPSET
    assert not any(item.metadata_props for item in (model, model.graph, *model.graph.node, *model.graph.initializer))
    assert b"site-packages" not in model.SerializeToString()
    shapes = {
        each.name: [dim.dim_param or dim.dim_value for dim in each.type.tensor_type.shape.dim]
        for each in (*model.graph.input, *model.graph.output)
    }
    assert shapes == {
        "images": ["batch", *SIZE, 3],
        "boxes": ["batch", 10, 4],
        "scores": ["batch", 10],
        "labels": ["batch", 10],
        "masks": ["batch", 10, 28, 28],
        "objectness": ["batch", 3060],
    }


def test_every_level_is_pooled_once_and_parts_run_once() -> None:
    model = assemble(parts_for(CONFIG), detector_of(CONFIG), SIZE)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("RoiAlign") == 2 * len(LEVELS)
    own = [node.op_type for part in parts_for(CONFIG).values() for node in part.graph.node]
    assert kinds.count("Conv") == own.count("Conv")


class FourBitBox(nn.Module):
    """A box part whose weights are 4-bit codes."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        for name, width in (("logits", CLASSES + 1), ("deltas", 4 * (CLASSES + 1))):
            codes = torch.randint(-7, 8, (width, CHANNELS * 49), generator=rng).to(torch.int8)
            self.add_module(name, OnnxLinear(codes, torch.full((width,), 0.01), four_bit=True))

    def forward(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = cells.flatten(1)
        return self.get_submodule("logits")(flat), self.get_submodule("deltas")(flat)


def test_four_bit_weights_stay_as_they_are() -> None:
    box = pack_four_bits(lowered(FourBitBox(), torch.zeros(2, CHANNELS, 7, 7), "box"))
    before = [each for each in box.graph.initializer if each.data_type == TensorProto.INT4]
    assert len(before) == 2
    model = assemble({**parts_for(CONFIG), "box": box}, detector_of(CONFIG), SIZE)
    onnx.checker.check_model(model, full_check=True)
    after = [each for each in model.graph.initializer if each.data_type == TensorProto.INT4]
    assert [each.raw_data for each in after] == [each.raw_data for each in before]
    assert runner(model)({"images": images_of(2)})["boxes"].shape == (2, 10, 4)


def test_a_detector_that_runs_replaced_parts_gives_the_same_graph() -> None:
    detector = detector_of(CONFIG)
    model = assemble(parts_for(CONFIG), detector, SIZE)
    detector.replace_parts(detector.parts())
    assert assemble(parts_for(CONFIG), detector, SIZE).SerializeToString() == model.SerializeToString()


def test_wrong_parts_are_named() -> None:
    parts, detector = parts_for(CONFIG), detector_of(CONFIG)
    with pytest.raises(ExportError, match="parts are box, pyramid, expected pyramid, box, mask"):
        assemble({name: part for name, part in parts.items() if name != "mask"}, detector, SIZE)
    with pytest.raises(ExportError, match=r"takes images of \(96, 128\), expected \(128, 96\)"):
        assemble(parts, detector, (128, 96))
    with pytest.raises(ExportError, match="part mask has inputs"):
        assemble({**parts, "mask": parts["box"]}, detector, SIZE)
    older = onnx.ModelProto()
    older.CopyFrom(parts["box"])
    older.opset_import[0].version = 18
    with pytest.raises(ExportError, match="part box has opset 18, expected 21 as pyramid"):
        assemble({**parts, "box": older}, detector, SIZE)
    vague = onnx.ModelProto()
    vague.CopyFrom(parts["box"])
    vague.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "any"
    with pytest.raises(ExportError, match="does not say how many classes"):
        assemble({**parts, "box": vague}, detector, SIZE)


# --- its pieces, on NumPy arrays --------------------------------------------------------------------------------


def random_boxes(rng: np.random.Generator, count: int, size: tuple[int, int] = SIZE) -> NDArray[np.float32]:
    corner = rng.uniform(0, 1, (count, 2)) * [size[1], size[0]]
    side = np.exp(rng.uniform(0, 5, (count, 2)))
    high = np.minimum(corner + side, [size[1], size[0]])
    return np.concatenate([corner, high], 1).astype(np.float32)


def corner_of(size: tuple[int, int]) -> NDArray[np.float32]:
    return np.array([size[1], size[0], size[1], size[0]], np.float32)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_decoding_is_box_coder_with_its_clamps(weights: tuple[float, float, float, float]) -> None:
    rng = np.random.default_rng(0)
    boxes, deltas = random_boxes(rng, 500), rng.normal(0, 8, (500, 4)).astype(np.float32)
    coder = BoxCoder(weights)
    wanted = clip_boxes_to_image(coder.decode_single(torch.from_numpy(deltas), torch.from_numpy(boxes)), SIZE)
    got = glue.decode(deltas, boxes, np.array(weights, np.float32), corner_of(SIZE), growth_limit=coder.bbox_xform_clip)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=1e-3)


def test_small_boxes_are_those_of_torchvision() -> None:
    sides = np.array([0.0, 0.5, 0.999, 1.0, 1.001, 3.0], np.float32)
    boxes = np.array([[2, 2, 2 + width, 2 + height] for width in sides for height in sides], np.float32)
    wanted = np.zeros(len(boxes), bool)
    wanted[remove_small_boxes(torch.from_numpy(boxes), 1.0).numpy()] = True
    np.testing.assert_array_equal(glue.large_enough(boxes, smallest=1.0), wanted)
    assert 0 < wanted.sum() < len(boxes)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    count=st.integers(1, 60),
    overlap=st.sampled_from([0.1, 0.5, 0.7]),
    empty=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_suppression_is_nms_of_each_group(seed: int, count: int, overlap: float, empty: float) -> None:
    rng = np.random.default_rng(seed)
    boxes = np.stack([random_boxes(rng, count, (40, 40)) for _ in range(3)])
    scores = rng.normal(0, 3, (3, count)).round(1).astype(np.float32)  # ties, and scores below 0
    scores[rng.random((3, count)) < empty] = EMPTY
    got = glue.suppress(boxes, scores, overlap=overlap, limit=count)
    for row in range(3):
        present = np.flatnonzero(scores[row] > EMPTY)
        kept = present[
            nms(torch.from_numpy(boxes[row, present]), torch.from_numpy(scores[row, present]), overlap).numpy()
        ]
        wanted = np.full(count, EMPTY, np.float32)
        wanted[kept] = scores[row, kept]
        np.testing.assert_array_equal(got[row], wanted)


def test_suppression_by_class_is_batched_nms() -> None:
    rng = np.random.default_rng(0)
    boxes, scores = np.tile(random_boxes(rng, 30, (40, 40)), (1, 3, 1, 1)), rng.random((1, 3, 30), np.float32)
    boxes += rng.uniform(0, 2, boxes.shape).astype(np.float32)
    got = glue.suppress(glue.by_class(boxes), glue.by_class(scores), overlap=0.3, limit=30).reshape(-1)
    given = torch.from_numpy(boxes.reshape(-1, 4)), torch.from_numpy(scores.reshape(-1))
    kept = batched_nms(*given, torch.arange(3).repeat_interleave(30), 0.3).numpy()
    np.testing.assert_array_equal(np.sort(np.flatnonzero(got > EMPTY)), np.sort(kept))
    assert 3 < len(kept) < 90


def test_small_probabilities_are_as_exact_as_large_ones() -> None:
    logits = np.linspace(-18, 18, 1001, dtype=np.float32)
    wanted = torch.from_numpy(logits).double().sigmoid().numpy()
    np.testing.assert_allclose(glue.probability(logits), wanted, rtol=2e-7)


@pytest.mark.parametrize("offset", [-12.0, 0.0, 9.0])
def test_levels_compete_as_in_torchvision_where_probabilities_are_tiny_or_equal(offset: float) -> None:
    detector = detector_of(replace(CONFIG, proposals=150))
    rpn = detector.network.rpn
    rng = np.random.default_rng(0)
    grids = [(SIZE[0] // stride, SIZE[1] // stride) for stride in STRIDES]
    objectness = [rng.normal(offset, 1, (1, 3, *grid)).astype(np.float32) for grid in grids]
    deltas = [rng.normal(0, 0.3, (1, 12, *grid)).astype(np.float32) for grid in grids]
    maps = [torch.zeros(1, CHANNELS, *grid) for grid in grids]
    pictures = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])
    anchors = rpn.anchor_generator(pictures, maps)[0].split([3 * height * width for height, width in grids])
    rpn.head.forward = lambda features: tuple(
        [torch.from_numpy(each) for each in part] for part in (objectness, deltas)
    )
    wanted = rpn(pictures, dict(zip(LEVELS, maps, strict=True)))[0][0].numpy()
    found = [
        glue.candidates(
            glue.flat_objectness(logits), change, each.numpy(), np.ones(4, np.float32), corner_of(SIZE),
            growth_limit=rpn.box_coder.bbox_xform_clip, smallest=rpn.min_size, overlap=rpn.nms_thresh,
            count=min(150, len(each)), limit=min(150, len(each)),
        )
        for logits, change, each in zip(objectness, deltas, anchors, strict=True)
    ]  # fmt: skip
    boxes, scores = (np.concatenate(values, 1) for values in zip(*found, strict=True))
    got, used = glue.proposals(boxes, scores, count=150)
    assert used.all()
    assert len(wanted) == 150
    np.testing.assert_allclose(got[0], wanted, rtol=0, atol=1e-3)


def border_boxes(scale: float) -> NDArray[np.float32]:
    """Squares whose side is the border between two levels, or nearly so."""
    sides = [scale * 2.0**power * (1 + change) for power in range(-4, 3) for change in (-1e-4, 0, 1e-4)]
    return np.array([[4.0, 8.0, 4.0 + side, 8.0 + side] for side in sides], np.float32)


@pytest.mark.parametrize("scale", [112, 224])
def test_levels_are_those_of_the_level_mapper(scale: int) -> None:
    boxes = np.concatenate([border_boxes(scale), random_boxes(np.random.default_rng(0), 500, (512, 512))])
    wanted = initLevelMapper(2, 5, scale, 4)([torch.from_numpy(boxes)]).numpy()
    np.testing.assert_array_equal(glue.level_of(boxes, side=float(scale), level=4.0, eps=1e-6), wanted)
    assert set(wanted) == {0, 1, 2, 3}


@pytest.mark.parametrize("scale", [112, 224])
def test_pooling_takes_each_box_from_its_level(scale: int) -> None:
    rng = np.random.default_rng(1)
    size = (512, 512)
    maps = [rng.normal(size=(2, 3, 512 // stride, 512 // stride)).astype(np.float32) for stride in STRIDES]
    boxes = np.stack([np.concatenate([border_boxes(scale), random_boxes(rng, 19, size)]) for _ in range(2)])
    used = rng.random((2, 40)) < 0.7
    theirs = MultiScaleRoIAlign(LEVELS, 7, 2, canonical_scale=scale, canonical_level=4)
    wanted = theirs(
        {name: torch.from_numpy(each) for name, each in zip(LEVELS, maps, strict=True)},
        [torch.from_numpy(each) for each in boxes],
        [size, size],
    ).numpy()
    wanted[~used.reshape(-1)] = 0
    got = pooled(maps, boxes, used, float(scale))
    if not used[0, 0]:
        got[0, 0] = 0
    np.testing.assert_allclose(got.reshape(wanted.shape), wanted, rtol=0, atol=1e-3)


def pooled(maps: list[NDArray[Any]], boxes: NDArray[Any], used: NDArray[Any], side: float) -> NDArray[Any]:
    """Every place's cells."""
    places = glue.places_in_use(boxes, used, side=side, level=4.0, eps=1e-6)
    found = [
        glue.from_level(each, *places, number=float(level), scale=1 / stride, cells=7, samples=2)
        for level, (each, stride) in enumerate(zip(maps, STRIDES, strict=True))
    ]
    cells, order = (np.concatenate(values) for values in zip(*found, strict=True))
    return glue.bring_back(cells, order, used)


def test_pooling_returns_one_row_where_no_place_is_in_use() -> None:
    boxes, used = np.zeros((1, 5, 4), np.float32), np.zeros((1, 5), bool)
    _, images, levels = glue.places_in_use(boxes, used, side=224.0, level=4.0, eps=1e-6)
    assert images.tolist() == [0] * 5
    assert levels.tolist() == [0, -1, -1, -1, -1]


def test_detections_are_those_of_torchvision() -> None:
    rng = np.random.default_rng(0)
    rows, count = 30, 12
    heads = detector_of(replace(CONFIG, detections=count)).network.roi_heads
    heads.score_thresh = 0.2
    logits = rng.normal(0, 2, (rows, CLASSES + 1)).astype(np.float32)
    deltas = rng.normal(0, 1, (rows, 4 * (CLASSES + 1))).astype(np.float32)
    places = random_boxes(rng, rows)
    given = [torch.from_numpy(each) for each in (logits, deltas, places)]
    boxes, scores, labels = (each[0] for each in heads.postprocess_detections(given[0], given[1], [given[2]], [SIZE]))
    all_boxes, kept = glue.boxes_of_classes(
        logits[None], deltas[None], places[None], np.ones((1, rows), bool),
        np.array(heads.box_coder.weights, np.float32), corner_of(SIZE), growth_limit=heads.box_coder.bbox_xform_clip,
        smallest=1e-2, overlap=heads.nms_thresh, threshold=heads.score_thresh, classes=CLASSES, limit=count,
    )  # fmt: skip
    found = glue.best_boxes(all_boxes, kept, classes=CLASSES, count=count)
    assert len(boxes) == count
    for mine, theirs in zip(found, (boxes, scores, labels - 1, np.ones(count, bool)), strict=True):
        np.testing.assert_allclose(mine[0], np.asarray(theirs), rtol=0, atol=1e-3)


def test_masks_are_those_of_their_labels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (4, CLASSES + 1, 6, 6)).astype(np.float32)
    labels, used = np.array([[2, 0], [0, 3], [1, 1]]), np.array([[True, True], [False, True], [False, True]])
    order = np.array([5, 0, 3, 1])  # in the order of levels
    wanted = np.zeros((6, 6, 6), np.float32)
    (theirs,) = maskrcnn_inference(torch.from_numpy(logits), [torch.from_numpy(labels.reshape(-1)[order] + 1)])
    wanted[order] = theirs[:, 0].numpy()
    np.testing.assert_allclose(glue.masks_of(logits, order, labels, used).reshape(wanted.shape), wanted, atol=1e-6)


# --- the graph of its pieces ----------------------------------------------------------------------------------


def test_equal_constants_and_values_are_stored_and_computed_once() -> None:
    model = assemble(parts_for(CONFIG), detector_of(CONFIG), SIZE)
    own = [
        each for each in model.graph.initializer if not each.name.startswith(tuple(f"{name}." for name in PART_OUTPUTS))
    ]
    stored = [(each.data_type, tuple(each.dims), numpy_helper.to_array(each).tobytes()) for each in own]
    assert len(set(stored)) == len(stored)
    computed = [
        (
            node.domain,
            node.op_type,
            tuple(node.input),
            tuple(sorted(each.SerializeToString() for each in node.attribute)),
        )
        for node in model.graph.node
        if node.output[0].startswith("glue.")
    ]
    assert len(set(computed)) == len(computed)


def test_no_call_and_no_cast_of_a_constant_is_left() -> None:
    model = assemble(parts_for(CONFIG), detector_of(CONFIG), SIZE)
    assert not model.functions
    assert not {"CastLike", "Constant", "Identity"} & {node.op_type for node in model.graph.node}
