"""check_backbone and check_bundle: what keeps its promises passes, and each broken promise is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from leanvit import testing
from leanvit.errors import BundleError, ModelError, VerificationError
from leanvit.testing import check_backbone, check_bundle


def vit() -> VisionTransformer:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 32, 32)}
    return model


def test_a_network_of_timm_keeps_every_promise_and_is_left_as_it_was() -> None:
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [proof.name for proof in check_backbone(model)]
    assert len(names) == len(set(names)) == 11
    assert model.num_classes == 1000
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def config_without_classifier(model: Any) -> None:
    model.pretrained_cfg = {**model.pretrained_cfg, "classifier": "haed"}


def std_of_zero(model: Any) -> None:
    model.pretrained_cfg = {**model.pretrained_cfg, "std": (0.5, 0.0, 0.5)}


def logits_of_another_shape(model: Any) -> None:
    model.num_classes = 7


def logits_that_are_not_finite(model: Any) -> None:
    model.head = nn.Sequential(model.head, Apply(lambda x: x / 0))


def noise_in_eval_mode(model: Any) -> None:
    model.norm = nn.Sequential(model.norm, Apply(lambda x: x + torch.rand_like(x)))


def forward_beside_the_features(model: Any) -> None:
    model.pos_drop = nn.Identity()
    whole = type(model).forward
    model.__class__ = type("Beside", (type(model),), {"forward": lambda self, x: 2 * whole(self, x)})


def width_of_the_head(model: Any) -> None:
    model.head_hidden_size = 25


def classifier_that_stays(model: Any) -> None:
    model.__class__ = type("Stays", (type(model),), {"reset_classifier": lambda self, n, pool=None: None})


def maps_fewer_than_stated(model: Any) -> None:
    model.feature_info = [*model.feature_info, model.feature_info[-1]]


def images_that_see_each_other(model: Any) -> None:
    model.norm = nn.Sequential(model.norm, Apply(lambda x: x - x.mean(0, keepdim=True) * 0.5))


def parameter_without_use(model: Any) -> None:
    model.unused = nn.Parameter(torch.ones(3, 3))


def classifier_among_the_first_layers(model: Any) -> None:
    groups = {"stem": r"^head", "blocks": [(r".*", (1,))]}
    model.__class__ = type("Sorted", (type(model),), {"group_matcher": lambda self, coarse=False: groups})


def branch_on_values(model: Any) -> None:
    model.norm = nn.Sequential(model.norm, Apply(lambda x: x if x.sum() > 1e9 else x * 1.0))


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("damage", "promise"),
    [
        (config_without_classifier, "pretrained_cfg: classifier is 'haed'"),
        (std_of_zero, "pretrained_cfg: std is"),
        (logits_of_another_shape, "forward: the output has shape"),
        (logits_that_are_not_finite, "forward: the output is not finite"),
        (noise_in_eval_mode, "forward: a second pass"),
        (forward_beside_the_features, "features: forward_head"),
        (width_of_the_head, "pre_logits: "),
        (classifier_that_stays, "reset_classifier: logits"),
        (maps_fewer_than_stated, "intermediates: 2 maps, feature_info has 3"),
        (images_that_see_each_other, "independent_images: "),
        (parameter_without_use, "gradients: unused"),
        (classifier_among_the_first_layers, "parameter_groups: the classifier 'head' is not in the last group"),
        (branch_on_values, "export: torch.export refuses"),
    ],
)
def test_a_broken_promise_is_named(damage: Callable[[Any], None], promise: str) -> None:
    model = vit()
    damage(model)
    with pytest.raises(ModelError, match=f"^check_backbone, {promise}") as caught:
        check_backbone(model)
    assert "\n" not in str(caught.value)


def test_gradients_that_recomputing_changes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = vit()

    def doubled(self: Any, enable: bool = True) -> None:
        self.head.register_forward_hook(lambda module, inputs, output: 2 * output)

    model.__class__ = type("Doubled", (type(model),), {"set_grad_checkpointing": doubled})
    with pytest.raises(ModelError, match=r"^check_backbone, checkpointing: the gradient of .* changes"):
        check_backbone(model)


def test_a_network_without_a_method_is_told_which() -> None:
    with pytest.raises(ModelError, match="Linear has no pretrained_cfg"):
        check_backbone(nn.Linear(2, 2))


def test_random_weights_are_the_same_at_every_call_and_leave_no_gradient_zero() -> None:
    first, second = testing.randomize_(vit()), testing.randomize_(vit())
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not first.training


def test_a_good_bundle_is_proved(shared_bundle: Path) -> None:
    names = [proof.name for proof in check_bundle(shared_bundle)]
    assert {"integrity", "golden"} <= {name.split()[0] for name in names}


def test_a_changed_byte_of_a_bundle_is_named(bundle: Path) -> None:
    data = bytearray((bundle / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.onnx").write_bytes(data)
    with pytest.raises(VerificationError, match=r"integrity|SHA-256"):
        check_bundle(bundle)


def test_a_folder_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=str(tmp_path)):
        check_bundle(tmp_path)
