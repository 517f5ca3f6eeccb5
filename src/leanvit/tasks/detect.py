"""Detection and instance segmentation: torchvision's Faster R-CNN and Mask R-CNN on any backbone.

Head, losses, proposals and decoding are torchvision's (Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870;
Lin et al., arXiv 1612.03144). Ours are the backbone, the fixed input size, losses image by image, and the cut into
three networks without data-dependent shapes, which are what MPTQ quantizes and the exporter lowers: `PyramidPart`,
`BoxPart`, `MaskPart`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from leanvit.annotations import Outputs
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import TrainConfig, from_dict, to_dict
from leanvit.config.tasks import OBJECTS_DEFAULTS
from leanvit.data.scene_kinds import BOXES, MASKS
from leanvit.errors import ConfigError
from leanvit.tasks.detect_measures import box_measure, mask_measure, pyramid_measure
from leanvit.tasks.features import STRIDES, BackboneConfig, Features, Pyramid
from leanvit.tasks.task import Measure, Targets, TrainingTask, register

LEVELS = [str(i) for i in range(len(STRIDES))]
CANONICAL_SIZE = 28
"""An object of this many anchor scales belongs to the third level: 28 x 8 = 224 px, as in FPN's equation 1."""

PYRAMID, BOX, MASK = "pyramid", "box", "mask"
"""Names of a detector's parts."""

BOX_CELLS = 7
MASK_CELLS = 14
MASK_SIDE = 28
"""Cells a side of a mask, twice MASK_CELLS (He et al., figure 4)."""

PART_OUTPUTS: dict[str, tuple[str, ...]] = {
    PYRAMID: tuple(f"{name}_{level}" for name in ("map", "objectness", "deltas") for level in LEVELS),
    BOX: ("class_logits", "box_deltas"),
    MASK: ("mask_logits",),
}
"""What the parts of a detector return; the pyramid takes images, the others cells of it."""

PIXELS_AT_A_TIME = 16 * 224 * 224
"""Of pictures that a detector runs on at once: a thousand proposals of each are pooled, 50 MB in float32."""

PICTURES_POOLED = 16
"""Of the calibration pictures, evenly drawn, from which cells are taken: 32 of each fill CELLS_KEPT, and a picture
of 640 pixels a side costs seconds."""

CELLS_KEPT = 512
"""Cut-outs of the pyramid on which box and mask heads are calibrated: as many as one image's boxes in training."""


@dataclass(frozen=True)
class DetectorConfig:
    """What stands on the pyramid; the defaults are those of torchvision and of the papers on COCO.

    masks: instance segmentation as well. anchor_scale: side of an anchor in strides of its level.
    head_width: of the box head's two layers. mask_width, mask_layers: of the mask head.
    proposals: boxes that the second stage looks at, of four times as many candidates a level.
    sampled: boxes an image that the second stage learns from. detections: most objects of a picture.
    score_threshold, nms_threshold: of the objects that are returned.
    """

    masks: bool = True
    anchor_scale: float = 8.0
    head_width: int = 1024
    mask_width: int = 256
    mask_layers: int = 4
    proposals: int = 1000
    sampled: int = 512
    detections: int = 100
    score_threshold: float = 0.05
    nms_threshold: float = 0.5

    def __post_init__(self) -> None:
        for name in ("anchor_scale", "head_width", "mask_width", "mask_layers", "proposals", "sampled", "detections"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected more than 0")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 to 1")


class _Batched(nn.Module):
    """Stands where torchvision resizes and normalises: images come prepared, and masks stay in their boxes."""

    def forward(self, images: Sequence[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        batch = torch.stack(list(images))
        return ImageList(batch, [(batch.shape[-2], batch.shape[-1])] * len(batch)), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result


class Detector(nn.Module):
    """torchvision's detector with one interface: normalised images in, losses or raw detections out."""

    def __init__(self, backbone: BackboneConfig, num_classes: int, config: DetectorConfig) -> None:
        """num_classes: without the background. Raises UnknownModelError, ConfigError."""
        super().__init__()
        self.config = config
        pyramid = Pyramid(backbone)
        options: dict[str, Any] = {
            "rpn_anchor_generator": AnchorGenerator(
                tuple((int(config.anchor_scale * stride),) for stride in STRIDES), ((0.5, 1.0, 2.0),) * len(STRIDES)
            ),
            "rpn_pre_nms_top_n_train": 2 * config.proposals,
            "rpn_post_nms_top_n_train": config.proposals,
            "rpn_pre_nms_top_n_test": config.proposals,
            "rpn_post_nms_top_n_test": config.proposals,
            "box_roi_pool": _pool(BOX_CELLS, config),
            "box_head": TwoMLPHead(backbone.channels * BOX_CELLS**2, config.head_width),
            "box_predictor": _BoxPredictor(config.head_width, num_classes + 1),
            "box_batch_size_per_image": config.sampled,
            "box_score_thresh": config.score_threshold,
            "box_nms_thresh": config.nms_threshold,
            "box_detections_per_img": config.detections,
        }
        if config.masks:
            widths = [config.mask_width] * config.mask_layers
            options |= {
                "mask_roi_pool": _pool(MASK_CELLS, config),
                "mask_head": MaskRCNNHeads(backbone.channels, widths, 1),
                "mask_predictor": MaskRCNNPredictor(config.mask_width, config.mask_width, num_classes + 1),
            }
        self.network = (MaskRCNN if config.masks else FasterRCNN)(pyramid, None, **options)
        self.network.transform = _Batched()

    @property
    def pyramid(self) -> Pyramid:
        """Backbone and FPN."""
        return self.network.backbone

    def losses(self, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
        """torchvision's losses of each image: (B,) float32 by name.

        Its own are means over what was sampled in the whole batch, so that an image's share depends on the others in
        it. Image by image, a step is the same however it is cut into parts or shared by processes. Anchors and
        proposals are sampled from the image's seed.
        x: (B, 3, H, W) float32 normalised. targets: boxes (N, 4), labels (N,) from 1, masks (N, H, W), of each image.
        """
        maps = self.pyramid_maps(x)
        each = [
            self._losses_of_image(x[i : i + 1], {level: m[i : i + 1] for level, m in maps.items()}, target, seed)
            for i, (target, seed) in enumerate(zip(targets, seeds, strict=True))
        ]
        return {name: torch.stack([losses[name].float() for losses in each]) for name in each[0]}

    def pyramid_maps(self, x: Tensor) -> dict[str, Tensor]:
        """Maps of all levels for x (B, 3, H, W)."""
        maps: dict[str, Tensor] = self.network.backbone(x)
        return maps

    def _losses_of_image(
        self, x: Tensor, maps: dict[str, Tensor], target: dict[str, Tensor], seed: int
    ) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        size = (x.shape[-2], x.shape[-1])
        proposals, first = self.network.rpn(ImageList(x, [size]), maps, [target])
        if not len(proposals[0]) + len(target["boxes"]):
            # Nothing to sample from: a mean over nothing would be NaN.
            proposals = [x.new_tensor([[0.0, 0.0, size[1], size[0]]])]
        _, second = self.network.roi_heads(maps, proposals, [size], [target])
        losses: dict[str, Tensor] = {**second, **first}
        return losses

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        """Detections of each image: boxes (D, 4), scores (D,), labels (D,) from 1, masks (D, 1, 28, 28) sigmoid."""
        found: list[dict[str, Tensor]] = self.network(list(x))
        return found

    def parts(self) -> dict[str, nn.Module]:
        """The three networks without data-dependent shapes; they share this detector's weights."""
        parts: dict[str, nn.Module] = {PYRAMID: PyramidPart(self), BOX: BoxPart(self)}
        return parts | ({MASK: MaskPart(self)} if self.config.masks else {})

    def part_outputs(self) -> dict[str, tuple[str, ...]]:
        """What every part returns, in order."""
        return {name: PART_OUTPUTS[name] for name in self.parts()}

    def part_example(self, part: str, size: tuple[int, int]) -> Tensor:
        """An input of a part: (2, 3, H, W), or (2, C, cells, cells) of the pyramid."""
        if part == PYRAMID:
            return torch.zeros(2, 3, *size)
        side = BOX_CELLS if part == BOX else MASK_CELLS
        return torch.zeros(2, self.pyramid.out_channels, side, side)

    def part_inputs(self, x: Tensor, seed: int) -> dict[str, Tensor]:
        """What every part reads for x (B, 3, H, W): of cells at most CELLS_KEPT, drawn by the seed."""
        heads = self.network.roi_heads
        pools: dict[str, Any] = {BOX: heads.box_roi_pool, MASK: heads.mask_roi_pool}
        generator = torch.Generator().manual_seed(seed)
        seen = {name: _SomeCells(generator) for name, pool in pools.items() if pool is not None}
        hooks = [
            pools[name].register_forward_hook(lambda _m, _a, output, cells=cells: cells.add(output))
            for name, cells in seen.items()
        ]
        try:
            some = x[:: max(1, len(x) // PICTURES_POOLED)]
            for batch in torch.split(some, max(1, PIXELS_AT_A_TIME // (x.shape[-2] * x.shape[-1]))):
                self(batch)
        finally:
            for hook in hooks:
                hook.remove()
        return {PYRAMID: x} | {name: seen[name].cells for name in self.parts() if name in seen}

    def part_measures(self, size: tuple[int, int]) -> dict[str, Measure]:
        """What the bits of each part are chosen by: scores and boxes."""
        return {PYRAMID: pyramid_measure(self, size), BOX: box_measure, MASK: mask_measure}

    def replace_parts(self, parts: dict[str, nn.Module]) -> None:
        """Run `parts` (of the same interface, e.g. quantized) instead of this detector's own networks."""
        levels = len(LEVELS)
        self.network.backbone = _Replaced(parts[PYRAMID], self.pyramid.out_channels)
        self.network.rpn.head = _Remembered(self.network.backbone, levels)
        self.network.roi_heads.box_head = nn.Identity()
        self.network.roi_heads.box_predictor = parts[BOX]
        if MASK in parts:
            self.network.roi_heads.mask_head = nn.Identity()
            self.network.roi_heads.mask_predictor = parts[MASK]


def _pool(cells: int, config: DetectorConfig) -> MultiScaleRoIAlign:
    # A float from the class's own default; only an int is annotated.
    scale = int(CANONICAL_SIZE * config.anchor_scale)
    return MultiScaleRoIAlign(LEVELS, cells, 2, canonical_scale=scale, canonical_level=4)


class _SomeCells:
    """At most CELLS_KEPT of the cells (n, C, side, side) that a pool returns, run after run, each as likely as any."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.cells = torch.zeros(0)
        self.ranks = torch.zeros(0)

    def add(self, cells: Tensor) -> None:
        """Keep those of the lowest ranks; every cell draws one."""
        ranks = torch.rand(len(cells), generator=self.generator)
        own = _lowest(ranks)
        kept = [] if not len(self.ranks) else [self.cells]
        self.cells = torch.cat([*kept, cells[own.to(cells.device)]])
        self.ranks = torch.cat([self.ranks, ranks[own]])
        best = _lowest(self.ranks)
        self.cells, self.ranks = self.cells[best.to(cells.device)], self.ranks[best]


def _lowest(ranks: Tensor) -> Tensor:
    return ranks.argsort()[:CELLS_KEPT].sort().values


class _BoxPredictor(nn.Module):
    """FastRCNNPredictor without its check of the rank, which a traced graph would keep."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(width, num_classes)
        self.bbox_pred = nn.Linear(width, num_classes * 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


class PyramidPart(nn.Module):
    """Image -> pyramid maps and what the region proposal network says of every anchor."""

    def __init__(self, detector: Detector) -> None:
        """Share the weights of `detector`."""
        super().__init__()
        self.backbone = detector.network.backbone
        self.head = detector.network.rpn.head

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """x: (B, 3, H, W). Returns 4 maps (B, C, h, w), 4 of objectness (B, A, h, w), 4 of deltas (B, 4 A, h, w)."""
        maps = list(self.backbone(x).values())
        objectness, deltas = self.head(maps)
        return (*maps, *objectness, *deltas)


class BoxPart(nn.Module):
    """Cells of the pyramid under proposals -> class and place of each."""

    def __init__(self, detector: Detector) -> None:
        """Share the weights of `detector`."""
        super().__init__()
        self.head = detector.network.roi_heads.box_head
        self.predictor = detector.network.roi_heads.box_predictor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: (R, C, 7, 7). Returns class logits (R, classes + 1) and deltas (R, 4 (classes + 1))."""
        logits, deltas = self.predictor(self.head(x))
        return logits, deltas


class MaskPart(nn.Module):
    """Cells of the pyramid under detections -> a mask for every class."""

    def __init__(self, detector: Detector) -> None:
        """Share the weights of `detector`."""
        super().__init__()
        self.head = detector.network.roi_heads.mask_head
        self.predictor = detector.network.roi_heads.mask_predictor

    def forward(self, x: Tensor) -> Tensor:
        """x: (R, C, 14, 14). Returns mask logits (R, classes + 1, 28, 28)."""
        logits: Tensor = self.predictor(self.head(x))
        return logits


class _Replaced(nn.Module):
    """A pyramid part in the place of a backbone; keeps what it said of the anchors for `_Remembered`."""

    def __init__(self, part: nn.Module, out_channels: int) -> None:
        super().__init__()
        self.part = part
        self.out_channels = out_channels
        self.anchor_maps: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = list(self.part(x))
        self.anchor_maps = found[len(LEVELS) :]
        return dict(zip(LEVELS, found, strict=False))


class _Remembered(nn.Module):
    """The region proposal head of a replaced pyramid part."""

    def __init__(self, replaced: _Replaced, levels: int) -> None:
        super().__init__()
        self.source = [replaced]  # in a list, or it would be registered a second time
        self.levels = levels

    def forward(self, pyramid: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        maps = self.source[0].anchor_maps
        return maps[: self.levels], maps[self.levels :]


def _build(info: CheckpointInfo) -> nn.Module:
    options = dict(info.head)
    channels = options.pop("channels", 256)
    backbone = BackboneConfig(info.architecture, info.preprocess.input_size, channels, info.kwargs)
    return Detector(backbone, len(info.labels), from_dict(DetectorConfig, options, "head"))


def _head(config: TrainConfig, *, masks: bool) -> dict[str, Any]:
    names = ("anchor_scale", "head_width", "mask_width", "mask_layers", "proposals", "sampled", "detections")
    head = DetectorConfig(masks=masks, **{name: getattr(config, name) for name in names})
    return {"channels": config.channels, **to_dict(head)}


@torch.inference_mode()
def padded_outputs(network: nn.Module, x: Tensor) -> Outputs:
    """torchvision's lists as arrays of `detections` rows; labels count from 0."""
    detector = cast(Detector, network)
    found = detector(x)
    count, places = len(found), detector.config.detections
    outputs: Outputs = {
        "boxes": np.zeros((count, places, 4), np.float32),
        "scores": np.zeros((count, places), np.float32),
        "labels": np.zeros((count, places), np.int64),
    }
    if detector.config.masks:
        outputs["masks"] = np.zeros((count, places, MASK_SIDE, MASK_SIDE), np.float32)
    for row, objects in enumerate(found):
        kept = len(objects["scores"])
        for name in outputs:
            value = objects[name].float().cpu().numpy()
            outputs[name][row, :kept] = value[:, 0] if name == "masks" else value - (name == "labels")
    return outputs


@torch.inference_mode()
def objectness(network: nn.Module, x: Tensor) -> Outputs:
    """Objectness logits (B, N) of every anchor, levels one after another, as torchvision orders them."""
    detector = cast(Detector, network)
    levels, _ = detector.network.rpn.head(list(detector.pyramid_maps(x).values()))
    return {"objectness": torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in levels], 1).cpu().numpy()}


def _losses(network: nn.Module, x: Tensor, targets: Targets, seeds: list[int]) -> dict[str, Tensor]:
    return cast(Detector, network).losses(x, targets, seeds)


def _features(network: nn.Module) -> Features:
    return cast(Detector, network).pyramid.features


DETECT = register(
    TrainingTask(
        name="detect",
        build=_build,
        output_names=("boxes", "scores", "labels"),
        outputs=padded_outputs,
        more_outputs=objectness,
        losses=_losses,
        samples=BOXES,
        features=_features,
        head=partial(_head, masks=False),
        defaults=OBJECTS_DEFAULTS,
    )
)
SEGMENT = register(
    replace(
        DETECT,
        name="segment",
        output_names=("boxes", "scores", "labels", "masks"),
        samples=MASKS,
        annotations="segment",
        head=partial(_head, masks=True),
    )
)
