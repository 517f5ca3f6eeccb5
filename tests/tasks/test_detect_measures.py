"""What a detector's bits are chosen by: against torch.distributions and torchvision's own losses, and by properties."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence
from torchvision.models.detection.roi_heads import fastrcnn_loss

from leanvit.checkpoint import CheckpointInfo, Preprocess
from leanvit.config import MPTQConfig
from leanvit.quant.parts import quantize_network
from leanvit.tasks.detect import BOX, MASK, PYRAMID, Detector, DetectorConfig
from leanvit.tasks.detect_measures import binary_divergence, box_measure, mask_measure
from leanvit.tasks.features import BackboneConfig
from leanvit.tasks.task import PartOutputs

SIZE = (64, 64)
CLASSES = 3
LEVELS = 4
MAPS, OBJECTNESS, DELTAS = (slice(start, start + LEVELS) for start in (0, LEVELS, 2 * LEVELS))


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(0)
    options = DetectorConfig(anchor_scale=2.0, head_width=16, mask_width=8, mask_layers=1, score_threshold=0.0)
    return Detector(BackboneConfig("mobilenetv3_small_050", SIZE, 16, {}), CLASSES, options).eval()


@pytest.fixture(scope="module")
def said(detector: Detector) -> PartOutputs:
    """What the pyramid part says of three pictures."""
    images = torch.randn(3, 3, *SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found: PartOutputs = detector.parts()[PYRAMID](images)
    return found


def noisy(values: PartOutputs, which: slice, size: float, seed: int = 0) -> PartOutputs:
    """The same, with noise of a share of their spread in some of them."""
    generator = torch.Generator().manual_seed(seed)
    changed = list(values)
    changed[which] = [v + size * v.std() * torch.randn(v.shape, generator=generator) for v in values[which]]
    return tuple(changed)


def heads(seed: int, background: float = 0.0) -> tuple[Tensor, Tensor]:
    """Class logits and deltas of 20 regions."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(20, CLASSES + 1, generator=generator)
    logits[:, 0] += background
    return logits, torch.randn(20, 4 * (CLASSES + 1), generator=generator)


def test_divergence_of_scores_is_that_of_torch() -> None:
    truth, found = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).double() * 6
    expected = kl_divergence(Bernoulli(logits=truth), Bernoulli(logits=found))
    torch.testing.assert_close(binary_divergence(truth, found), expected, rtol=1e-9, atol=1e-12)


def test_scores_of_boxes_count_for_each_object() -> None:
    (logits, deltas), (other, _) = heads(0), heads(1)
    divergence = kl_divergence(Categorical(logits=logits.double()), Categorical(logits=other.double())).sum()
    objects = logits.double().softmax(1)[:, 1:].sum()
    assert box_measure((logits, deltas), (other, deltas)) == pytest.approx(float(divergence / objects))


def test_places_of_boxes_are_those_of_torchvisions_loss() -> None:
    """Where the float network is sure, the measure of the boxes is the loss with its answers as targets."""
    labels = torch.arange(20) % CLASSES + 1
    logits = torch.full((20, CLASSES + 1), -60.0).scatter(1, labels[:, None], 60.0)
    (_, deltas), (_, other) = heads(0), heads(1)
    targets = deltas.view(20, -1, 4)[torch.arange(20), labels]
    _, expected = fastrcnn_loss(logits, other, [labels], [targets])
    assert box_measure((logits, deltas), (logits, other)) == pytest.approx(float(expected), rel=1e-5)


def test_boxes_of_the_background_do_not_count() -> None:
    (logits, deltas), (_, other) = heads(0, background=80.0), heads(1)
    assert box_measure((logits, deltas), (logits, other)) < 1e-6 * box_measure(heads(0), (heads(0)[0], other))


def test_masks_are_compared_pixel_by_pixel() -> None:
    truth, found = torch.randn(2, 5, CLASSES + 1, 28, 28, generator=torch.Generator().manual_seed(0))
    expected = kl_divergence(Bernoulli(logits=truth.double()), Bernoulli(logits=found.double())).mean()
    assert mask_measure((truth,), (found,)) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("which", [MAPS, OBJECTNESS, DELTAS])
def test_the_pyramid_is_further_the_more_noise_there_is(which: slice, detector: Detector, said: PartOutputs) -> None:
    """Maps alone too, which only the box head can tell."""
    measure = detector.part_measures(SIZE)[PYRAMID]
    errors = [measure(said, noisy(said, which, size)) for size in (0.0, 0.05, 0.5)]
    assert errors[0] == 0.0
    assert 0 < errors[1] < errors[2]
    assert errors[2] == pytest.approx(100 * errors[1], rel=0.5)  # of second order, as a divergence is


def test_the_pyramid_remembers_no_other_truth(detector: Detector, said: PartOutputs) -> None:
    measure = detector.part_measures(SIZE)[PYRAMID]
    other = noisy(said, slice(0, 3 * LEVELS), 0.3)
    first = measure(said, other)
    assert measure(other, said) != first
    assert measure(said, other) == first


def test_the_pyramid_leaves_the_detector_alone(detector: Detector, said: PartOutputs) -> None:
    head, most = detector.network.rpn.head, detector.network.rpn.post_nms_top_n()
    detector.part_measures(SIZE)[PYRAMID](said, said)
    assert detector.network.rpn.head is head
    assert detector.network.rpn.post_nms_top_n() == most


def test_quantization_reports_the_measures_of_its_parts(detector: Detector) -> None:
    info = CheckpointInfo("mobilenetv3_small_050", ("a", "b", "c"), Preprocess(input_size=SIZE), task="segment")
    images = torch.randn(32, 3, *SIZE, generator=torch.Generator().manual_seed(2))
    quantized = quantize_network(detector, info, images, MPTQConfig(weight_bits=4, activation_bits=4))
    inputs, measures = detector.part_inputs(images, 0), detector.part_measures(SIZE)
    for name, part in quantized.parts.items():
        x = inputs[name][: part.report["calibration"]["walked"]]
        with torch.no_grad():
            truth, found = (_tuple(module(x)) for module in (detector.parts()[name], part.module))
        assert part.report["calibration"]["kl_divergence"] == pytest.approx(measures[name](truth, found), rel=1e-3)
    assert set(quantized.parts) == {PYRAMID, BOX, MASK}


def _tuple(outputs: Tensor | PartOutputs) -> PartOutputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)
