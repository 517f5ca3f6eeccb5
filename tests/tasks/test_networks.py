"""Networks of the tasks: against torchvision built by hand, torch's cross entropy, and formulas in NumPy."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from batches import images
from leanvit.errors import ConfigError
from leanvit.runtime.decode import heatmap_keypoints
from leanvit.tasks.detect import Detector, DetectorConfig
from leanvit.tasks.features import BackboneConfig
from leanvit.tasks.pose import PoseConfig, PoseNetwork, gaussian_heatmaps
from leanvit.tasks.semantic import Segmenter, SegmenterConfig

SIZE = (96, 128)
CHANNELS = 16
CLASSES = 3
SMALL: dict[str, Any] = {
    "anchor_scale": 4.0, "head_width": 32, "mask_width": 16, "mask_layers": 2, "proposals": 40, "sampled": 24,
    "detections": 12, "score_threshold": 0.0,
}  # fmt: skip


def scramble(network: nn.Module) -> None:
    """Weights far enough from their first values that answers differ from place to place and class to class."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make_detector(masks: bool, name: str = "resnet18") -> Detector:
    torch.manual_seed(0)
    detector = Detector(BackboneConfig(name, SIZE, CHANNELS), CLASSES, DetectorConfig(masks=masks, **SMALL))
    scramble(detector)
    return detector.eval()


class Body(nn.Module):
    """timm's features under torchvision's FPN, as torchvision's own backbone builders put them together."""

    def __init__(self) -> None:
        super().__init__()
        self.body = timm.create_model("resnet18", features_only=True)
        self.fpn = FeaturePyramidNetwork([64, 128, 256, 512], CHANNELS)
        self.out_channels = CHANNELS

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return self.fpn({str(i): each for i, each in enumerate(self.body(x)[1:])})


def by_hand(detector: Detector) -> nn.Module:
    """torchvision's detector with the weights of ours; its transform neither resizes, normalises nor pads."""
    masks = detector.config.masks
    options: dict[str, Any] = {
        "mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2", "3"], 14, 2, canonical_scale=112, canonical_level=4),
        "mask_head": MaskRCNNHeads(CHANNELS, [16, 16], 1),
        "mask_predictor": MaskRCNNPredictor(16, 16, CLASSES + 1),
    }
    network = (MaskRCNN if masks else FasterRCNN)(
        Body(), None, min_size=SIZE[0], max_size=SIZE[1], image_mean=[0, 0, 0], image_std=[1, 1, 1], _skip_resize=True,
        rpn_anchor_generator=AnchorGenerator(((16,), (32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 4),
        rpn_pre_nms_top_n_train=80, rpn_post_nms_top_n_train=40, rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_test=40,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=112, canonical_level=4),
        box_head=TwoMLPHead(CHANNELS * 49, 32), box_predictor=FastRCNNPredictor(32, CLASSES + 1),
        box_score_thresh=0.0, box_nms_thresh=0.5, box_detections_per_img=12, box_batch_size_per_image=24,
        **(options if masks else {}),
    )  # fmt: skip
    renamed = {
        key.replace("backbone.features.backbone.", "backbone.body.").replace("backbone.neck.", "backbone.fpn."): value
        for key, value in detector.network.state_dict().items()
    }
    network.load_state_dict(renamed)
    return network.eval()


def targets() -> list[dict[str, Tensor]]:
    """Two objects in the first picture, one in the second, as boxes and filled masks."""
    found = []
    for boxes, labels in (([[8, 10, 60, 70], [70, 20, 120, 50]], [1, 3]), ([[30, 30, 90, 80]], [2])):
        masks = torch.zeros(len(boxes), *SIZE, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = 1
        found.append({"boxes": torch.tensor(boxes).float(), "labels": torch.tensor(labels), "masks": masks})
    return found


@pytest.mark.parametrize("masks", [True, False])
def test_a_detector_answers_as_torchvision_built_by_hand(masks: bool) -> None:
    detector = make_detector(masks)
    theirs = by_hand(detector)
    x = images(2, *SIZE)
    with torch.no_grad():
        for found, expected in zip(detector(x), theirs(list(x)), strict=True):
            assert len(expected["boxes"]) == 12
            torch.testing.assert_close(found["boxes"], expected["boxes"], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-5, atol=1e-6)
            assert torch.equal(found["labels"], expected["labels"])
            assert ("masks" in found) == masks
            if masks:
                assert found["masks"].shape == (12, 1, 28, 28)
                pasted = paste_masks_in_image(found["masks"], found["boxes"], SIZE)
                torch.testing.assert_close(pasted, expected["masks"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masks", [True, False])
def test_a_detector_learns_from_the_losses_of_torchvision(masks: bool) -> None:
    """Those of each image alone, sampled from its own seed."""
    detector = make_detector(masks).train()
    theirs = by_hand(detector).train()
    for module in (*detector.modules(), *theirs.modules()):
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # its own mean over the batch is no matter of the losses
    x = images(2, *SIZE)
    found = detector.losses(x, targets(), [5, 6])
    assert ("loss_mask" in found) == masks
    for row, seed in enumerate((5, 6)):
        torch.manual_seed(seed)
        expected = theirs([x[row]], [targets()[row]])
        assert found.keys() == expected.keys()
        for name, loss in expected.items():
            torch.testing.assert_close(found[name][row], loss, rtol=1e-5, atol=1e-6)


def test_a_picture_without_proposals_and_objects_has_finite_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    detector = make_detector(True).train()
    rpn = detector.network.rpn
    monkeypatch.setattr(rpn, "filter_proposals", lambda *_: ([torch.zeros(0, 4)], [torch.zeros(0)]))
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "masks": torch.zeros(0, *SIZE).byte()}
    losses = detector.losses(images(1, *SIZE), [empty], [0])
    assert all(value.shape == (1,) and value.isfinite().all() for value in losses.values())
    assert losses["loss_classifier"].item() > 0


@pytest.mark.parametrize(("name", "masks"), [("resnet18", True), ("revit_micro", True), ("vitaev2_micro", False)])
def test_a_detector_with_its_own_parts_put_back_answers_the_same_bits(name: str, masks: bool) -> None:
    detector = make_detector(masks, name)
    parts = detector.parts()
    assert list(parts) == (["pyramid", "box", "mask"] if masks else ["pyramid", "box"])
    replaced = copy.deepcopy(detector)
    replaced.replace_parts(parts)
    x = images(2, *SIZE)
    with torch.no_grad():
        expected, found = detector(x), replaced(x)
    for one, other in zip(found, expected, strict=True):
        assert len(other["boxes"]) == 12
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert torch.equal(one[key], value)


def test_replaced_parts_are_what_runs() -> None:
    """Another box part gives other answers: what was put in is used, and not the network's own."""
    detector, other = make_detector(True), make_detector(True)
    with torch.no_grad():
        other.network.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    detector.replace_parts({**detector.parts(), "box": other.parts()["box"]})
    with torch.no_grad():
        assert all(set(found["labels"].tolist()) == {2} for found in detector(images(2, *SIZE)))


@pytest.mark.parametrize("name", ["anchor_scale", "head_width", "mask_layers", "proposals", "detections"])
def test_options_of_a_detector_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0, expected more than 0"):
        DetectorConfig(**{name: 0})


# --- semantic segmentation -----------------------------------------------------------------------------------


def make_segmenter(head: Any = "fpn", name: str = "remvitv2_micro") -> Segmenter:
    torch.manual_seed(0)
    segmenter = Segmenter(BackboneConfig(name, (64, 96)), 5, SegmenterConfig(head, width=64, dropout=0.0))
    scramble(segmenter)
    return segmenter


@pytest.mark.parametrize("name", ["revit_micro", "resnet18", "vitaev2_micro"])
@pytest.mark.parametrize("head", ["upernet", "fpn"])
def test_a_segmenter_gives_logits_at_stride_4(head: str, name: str) -> None:
    assert make_segmenter(head, name).eval()(images(2, 64, 96)).shape == (2, 5, 16, 24)


@pytest.mark.parametrize("head", ["upernet", "fpn"])
def test_the_loss_of_a_segmenter_is_cross_entropy_over_known_pixels(head: str) -> None:
    segmenter = make_segmenter(head).eval()
    x = images(2, 64, 96)
    truth = torch.randint(0, 5, (2, 64, 96), generator=torch.Generator().manual_seed(3))
    truth[0, :40] = 255
    truth[1, :, 90:] = 255
    found = segmenter.losses(x, [{"class_map": each} for each in truth])
    assert list(found) == ["loss_semantic"]
    large = F.interpolate(segmenter(x), (64, 96), mode="bilinear", align_corners=False)
    known = truth != 255
    for row in range(2):
        pixels = large[row].permute(1, 2, 0)[known[row]].double().detach().numpy()
        shares = pixels - np.log(np.exp(pixels).sum(1, keepdims=True))
        by_formula = -shares[np.arange(len(pixels)), truth[row][known[row]].numpy()].sum() / (64 * 96)
        assert found["loss_semantic"][row].item() == pytest.approx(by_formula, rel=1e-5)


@pytest.mark.parametrize(("head", "width"), [("fpn", 32), ("fpn", 96), ("upernet", 6), ("upernet", 30)])
def test_widths_that_a_head_cannot_have_are_refused(head: Any, width: int) -> None:
    with pytest.raises(ConfigError, match=f"width is {width}, expected a multiple of"):
        SegmenterConfig(head, width)


def test_pictures_without_a_known_pixel_teach_nothing() -> None:
    segmenter = make_segmenter().train()
    loss = segmenter.losses(images(2, 64, 96), [{"class_map": torch.full((64, 96), 255)}] * 2)["loss_semantic"].sum()
    loss.backward()
    assert loss.item() == 0
    assert all(not parameter.grad.any() for parameter in segmenter.parameters() if parameter.grad is not None)


# --- pose ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stride"),
    [("revit_micro", 4), ("remvitv2_micro", 8), ("vitaev2_micro", 16), ("vit_tiny_patch16_224", 16), ("resnet18", 32)],
)
def test_heatmaps_have_stride_4_whatever_the_backbone(name: str, stride: int) -> None:
    network = PoseNetwork(BackboneConfig(name, (64, 96)), 6, PoseConfig(width=8)).eval()
    assert network.features.deepest[0] == stride
    assert network(images(2, 64, 96)).shape == (2, 6, 16, 24)


COORDINATES = st.integers(-240, 1040).map(lambda eighths: eighths / 8)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(COORDINATES, COORDINATES, st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=5),
    st.floats(0.5, 3.0),
    st.sampled_from([4, 8]),
)
def test_targets_follow_the_formula(points: list[tuple[float, float, float]], sigma: float, stride: int) -> None:
    rows, columns = 10, 14
    found, weights = gaussian_heatmaps(torch.tensor([points], dtype=torch.float32), (rows, columns), stride, sigma)
    assert found.shape == (1, len(points), rows, columns)
    assert weights.shape == (1, len(points))
    # Every cell stands for its middle.
    y, x = np.mgrid[0:rows, 0:columns] * stride + stride / 2
    for index, (px, py, visibility) in enumerate(points):
        expected = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (sigma * stride) ** 2))
        np.testing.assert_allclose(found[0, index].numpy(), expected, atol=2e-5)
        inside = 0 < px < columns * stride and 0 < py < rows * stride
        assert weights[0, index] == float(visibility > 0 and inside)


def test_a_keypoint_in_the_middle_of_a_cell_has_its_peak_of_one_there() -> None:
    points = torch.tensor([[[4 * 3 + 2.0, 4 * 7 + 2.0, 2.0], [2.0, 2.0, 1.0]]])
    found, weights = gaussian_heatmaps(points, (12, 10), 4, 1.5)
    for heatmap, (row, column) in zip(found[0], ((7, 3), (0, 0)), strict=True):
        assert heatmap.argmax() == row * 10 + column
        assert heatmap[row, column] == 1
    assert weights.tolist() == [[1, 1]]


@settings(max_examples=80, deadline=None)
@given(st.data(), st.floats(0.7, 3.0), st.sampled_from([2, 4, 8]))
def test_keypoints_come_back_from_their_targets_within_a_quarter_of_a_cell(
    data: st.DataObject, sigma: float, stride: int
) -> None:
    """Of keypoints whose cell is not at the border, where there is one neighbour only."""
    rows, columns = 12, 9
    x = data.draw(st.floats(1.0625, columns - 1.0625, width=32)) * stride
    y = data.draw(st.floats(1.0625, rows - 1.0625, width=32)) * stride
    found, _ = gaussian_heatmaps(torch.tensor([[[x, y, 1.0]]]), (rows, columns), stride, sigma)
    back = heatmap_keypoints(found[0].numpy(), (0.0, 0.0, columns * stride, rows * stride))
    assert abs(back[0, 0] - x) <= (0.25 + 1e-3) * stride
    assert abs(back[0, 1] - y) <= (0.25 + 1e-3) * stride


def test_the_loss_of_pose_counts_annotated_keypoints_in_units_of_a_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing where the target is met; 1 a keypoint for zeros, for a peak's energy is pi sigma^2 cells."""
    network = PoseNetwork(BackboneConfig("revit_micro", (128, 128)), 2, PoseConfig(width=8, sigma=2.0))
    keypoints = torch.tensor([[[60.0, 70.0, 2.0], [40.0, 50.0, 0.0]], [[50.0, 44.0, 1.0], [300.0, 64.0, 2.0]]])
    target = [{"keypoints": each} for each in keypoints]
    x = images(2, 128, 128)
    met, _ = gaussian_heatmaps(keypoints, (32, 32), 4, 2.0)
    met[0, 1] = 7.0  # not annotated
    met[1, 1] = -7.0  # outside
    monkeypatch.setattr(network, "forward", lambda _: met)
    assert network.losses(x, target)["loss_heatmap"].tolist() == [0, 0]
    monkeypatch.setattr(network, "forward", lambda _: torch.zeros(2, 2, 32, 32))
    # One keypoint of two is known in each.
    assert network.losses(x, target)["loss_heatmap"].tolist() == pytest.approx([0.5, 0.5], rel=1e-3)
