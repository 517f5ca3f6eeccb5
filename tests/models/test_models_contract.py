"""timm's contract, kept by every architecture of leanvit.

What shows in shapes, names and arguments is checked on all of them, on the meta device; what has to be computed,
on the `*_micro` member of each family. A new model file is found through timm's registry, and one that is not
registered, has no tests or no micro member fails the first tests here.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models._manipulate import group_parameters
from torch import Tensor, nn

import leanvit.models
from batches import OLDER_TIMM
from leanvit.errors import ConfigError, ShapeError
from leanvit.testing import check_backbone, randomize_

TESTS = Path(__file__).parent
MODELS = Path(leanvit.models.__file__).parent
ENTRY_POINTS = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
NAMES = [name for name, module in ENTRY_POINTS.items() if module.startswith("leanvit.models")]
MICRO = [name for name in NAMES if name.endswith("_micro")]
# The classes in micro.py are timm's: they keep timm's contract, but not what ours promise beyond it (any size of
# image, maps as NCHW, one classifier, typed errors).
OWN = [name for name in NAMES if ENTRY_POINTS[name] != "leanvit.models.micro"]
OWN_MICRO = [name for name in MICRO if name in OWN]
FAMILIES = sorted({ENTRY_POINTS[name].rpartition(".")[2] for name in NAMES})

REGISTRY = """
import json, timm, leanvit.models
points = {name: timm.model_entrypoint(name).__module__ for name in timm.list_models()}
print(json.dumps({name: module for name, module in points.items() if module.startswith("leanvit.")}))
"""


def uncovered(models: Path, tests: Path, registered: dict[str, str]) -> list[str]:
    """What is amiss with the model files in `models`; registered: architecture -> module after import."""
    problems = []
    for file in sorted(models.glob("[!_]*.py")):
        names = [name for name, module in registered.items() if module == f"leanvit.models.{file.stem}"]
        if not names:
            problems.append(f"{file.name}: `import leanvit.models` registers no architecture of it")
        elif not any(name.endswith("_micro") for name in names):
            problems.append(f"{file.name}: has no *_micro member")
        if not (tests / f"test_models_{file.stem}.py").exists():
            problems.append(f"{file.name}: tests/models/test_models_{file.stem}.py is missing")
    return problems


@pytest.fixture(scope="module")
def registered() -> dict[str, str]:
    """The registry of a new process that imports nothing but the package."""
    done = subprocess.run([sys.executable, "-c", REGISTRY], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_every_model_file_is_imported_registered_and_tested(registered: dict[str, str]) -> None:
    assert uncovered(MODELS, TESTS, registered) == []


def test_model_file_without_import_tests_or_micro_member_is_caught(tmp_path: Path, registered: dict[str, str]) -> None:
    for file in MODELS.glob("*.py"):
        shutil.copy(file, tmp_path)
    before = set(uncovered(tmp_path, TESTS, registered))
    (tmp_path / "newvit.py").write_text("def newvit_tiny(): ...\n")
    assert set(uncovered(tmp_path, TESTS, registered)) - before == {
        "newvit.py: `import leanvit.models` registers no architecture of it",
        "newvit.py: tests/models/test_models_newvit.py is missing",
    }
    with_tiny = {**registered, "newvit_tiny": "leanvit.models.newvit"}
    assert "newvit.py: has no *_micro member" in uncovered(tmp_path, TESTS, with_tiny)


def test_architecture_outside_a_model_file_is_not_overlooked(registered: dict[str, str]) -> None:
    files = {f"leanvit.models.{file.stem}" for file in MODELS.glob("[!_]*.py")}
    assert set(registered.values()) <= files


def on_meta(name: str, **kwargs: Any) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **kwargs).eval()


@functools.cache
def shared(name: str) -> Any:
    """The architecture with its defaults on the meta device; not to be changed."""
    return on_meta(name)


@functools.cache
def features(name: str) -> Tensor:
    return shared(name).forward_features(empty_images(name))


def empty_images(name: str, height: int = 0, width: int = 0, channels: int = 3) -> Tensor:
    _, default_height, default_width = shared(name).pretrained_cfg["input_size"]
    return torch.empty(2, channels, height or default_height, width or default_width, device="meta")


@functools.cache
def randomized(name: str) -> Any:
    """A micro network with weights far from its initialisation, whose logits are near 0; not to be changed."""
    return randomize_(timm.create_model(name, num_classes=10))


def images(name: str, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    height, width = size or shared(name).pretrained_cfg["input_size"][1:]
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def assert_equal(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


# Every architecture, on the meta device


@pytest.mark.parametrize("name", OWN)
def test_pretrained_cfg_says_how_images_are_prepared_and_names_the_layers(name: str) -> None:
    model, cfg = shared(name), shared(name).pretrained_cfg
    assert cfg["architecture"] == name
    assert cfg["tag"]
    assert f"{name}.{cfg['tag']}" in timm.list_models(f"{name}.*", include_tags=True)
    assert len(cfg["input_size"]) == 3
    assert len(cfg["mean"]) == len(cfg["std"]) == 3
    assert min(cfg["std"]) > 0
    assert 0.5 < cfg["crop_pct"] <= 1
    assert cfg["interpolation"] in ("bicubic", "bilinear")
    assert not cfg.get("url")
    assert not cfg.get("hf_hub_id")
    first = cfg["first_conv"]
    for path in (first,) if isinstance(first, str) else first:
        assert model.get_submodule(path).in_channels == 3
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()
    assert model.get_classifier().out_features == model.num_classes == cfg["num_classes"]


@pytest.mark.parametrize("name", OWN)
def test_arguments_of_timm_build_the_model_at_another_size(name: str) -> None:
    model = on_meta(name, num_classes=7, in_chans=1, global_pool="avg", drop_rate=0.1, drop_path_rate=0.2)
    assert (model.num_classes, model.in_chans) == (7, 1)
    _, height, width = shared(name).pretrained_cfg["input_size"]
    assert model(empty_images(name, height + 64, width + 128, channels=1)).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_head_takes_the_features(name: str) -> None:
    model, x = shared(name), features(name)
    assert isinstance(x, Tensor)
    assert x.shape[0] == 2
    assert model.num_features in x.shape[1:]
    assert model.forward_head(x).shape == (2, model.num_classes)
    assert model.forward_head(x, pre_logits=True).shape == (2, model.head_hidden_size)


@pytest.mark.parametrize("name", OWN)
def test_reset_classifier_changes_classes_and_pooling(name: str) -> None:
    model, x = copy.deepcopy(shared(name)), features(name)
    model.reset_classifier(5)
    assert model.num_classes == model.get_classifier().out_features == 5
    assert model.forward_head(x).shape == (2, 5)
    for pool in ("max", "avgmax", "avg"):
        model.reset_classifier(3, pool)
        assert model.global_pool == pool
        assert model.forward_head(x).shape == (2, 3)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model.forward_head(x).shape == (2, model.head_hidden_size)
    model.reset_classifier(0, "")
    assert model.forward_head(x).ndim == x.ndim
    with pytest.raises(ConfigError, match="global_pool"):
        model.reset_classifier(5, "nonsense")


@pytest.mark.parametrize("name", OWN)
def test_features_only_has_the_strides_and_channels_it_states(name: str) -> None:
    model = on_meta(name, features_only=True)
    x = empty_images(name)
    maps = model(x)
    info = model.feature_info
    assert len(maps) == len(info.channels()) == len(info.reduction()) > 0
    for found, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
        assert tuple(found.shape) == (2, channels, x.shape[2] // stride, x.shape[3] // stride)


@pytest.mark.parametrize("name", NAMES)
def test_forward_intermediates_gives_final_features_and_maps(name: str) -> None:
    model = shared(name)
    parameters = inspect.signature(model.forward_intermediates).parameters
    expected = {
        "indices": None,
        "norm": False,
        "stop_early": False,
        "output_fmt": "NCHW",
        "intermediates_only": False,
    }
    assert {key: parameters[key].default for key in expected} == expected
    final, maps = model.forward_intermediates(empty_images(name))
    assert final.shape == features(name).shape
    assert len(maps) == len(model.feature_info)


@pytest.mark.parametrize("name", OWN)
def test_parameter_groups_run_from_the_stem_to_the_classifier(name: str) -> None:
    model, cfg = shared(name), shared(name).pretrained_cfg
    for coarse in (False, True):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert groups.keys() == {key for key, _ in model.named_parameters()}
        assert sorted(set(groups.values())) == list(range(max(groups.values()) + 1))
        assert groups[f"{cfg['classifier']}.weight"] == max(groups.values()) >= 2
        first = cfg["first_conv"]
        for path in (first,) if isinstance(first, str) else first:
            assert groups[f"{path}.weight"] == 0
    fine = group_parameters(model, model.group_matcher(coarse=False))
    assert len(fine) >= len(group_parameters(model, model.group_matcher(coarse=True)))


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_spares_positions_tokens_and_mixing_weights(name: str) -> None:
    model = shared(name)
    spared = {"pos_embed", "cls_token", "alpha", "rel_pos_h", "rel_pos_w", "relative_position_bias_table"}
    parameters = {key for key, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}
    assert {key for key in parameters if key.rpartition(".")[2] in spared} <= set(model.no_weight_decay())


@pytest.mark.parametrize("name", NAMES)
def test_paper_table_holds_known_architectures_and_exact_counts(name: str) -> None:
    paper = getattr(sys.modules[ENTRY_POINTS[name]], "PAPER", {})
    assert paper.keys() <= set(NAMES)
    if name in paper:
        assert paper[name].params == sum(p.numel() for p in shared(name).parameters())


# The micro member of each family, computed


def test_every_family_has_a_micro_member() -> None:
    assert sorted({ENTRY_POINTS[name].rpartition(".")[2] for name in MICRO}) == FAMILIES


@pytest.mark.parametrize("name", MICRO)
def test_micro_member_is_micro(name: str) -> None:
    _, height, width = shared(name).pretrained_cfg["input_size"]
    assert 28 <= height <= 64
    assert 28 <= width <= 64
    assert 0.25e6 < sum(p.numel() for p in shared(name).parameters()) < 0.95e6


@pytest.mark.parametrize("name", ["revit_micro", "exmobilevit_micro", "vitaev2_micro"])
def test_every_promise_of_check_backbone_is_kept(name: str) -> None:
    """One a structure, as the tests below look at each promise of every family.

    Forward and its parts, heads, maps, images apart, gradients with and without checkpointing, export.
    """
    assert len(check_backbone(timm.create_model(name, num_classes=10))) == 11


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_forward_is_the_head_of_the_features_and_of_the_intermediates(name: str) -> None:
    model, x = randomized(name), images(name)
    logits = model(x)
    assert logits.shape == (2, 10)
    assert logits.std() > 1e-2
    assert_equal(model.forward_head(model.forward_features(x)), logits)
    final, maps = model.forward_intermediates(x, indices=[0, -1])
    assert_equal(model.forward_head(final), logits)
    only = model.forward_intermediates(x, indices=[0, -1], intermediates_only=True)
    last = model.forward_intermediates(x, indices=1, intermediates_only=True)
    early = model.forward_intermediates(x, indices=[0], intermediates_only=True, stop_early=True)
    for found, expected in ((only[0], maps[0]), (only[1], maps[1]), (last[0], maps[1]), (early[0], maps[0])):
        assert_equal(found, expected)


@pytest.mark.parametrize("name", OWN_MICRO)
@torch.no_grad()
def test_features_only_computes_the_intermediates(name: str) -> None:
    model, x = randomized(name), images(name)
    chosen = (0, len(model.feature_info) - 1)
    extractor = timm.create_model(name, features_only=True, out_indices=chosen).eval()
    weights = {f"model.{key}": value for key, value in model.state_dict().items()}
    wanted = extractor.state_dict()
    assert wanted.keys() <= weights.keys()
    extractor.load_state_dict({key: weights[key] for key in wanted})
    expected = model.forward_intermediates(x, indices=list(chosen), intermediates_only=True)
    for found, reference in zip(extractor(x), expected, strict=True):
        assert_equal(found, reference)
    last = timm.create_model(name, features_only=True, out_indices=(-1,))(x)
    assert [tuple(found.shape) for found in last] == [tuple(expected[-1].shape)]


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_pruning_drops_what_early_maps_do_not_need(name: str) -> None:
    model, x = copy.deepcopy(randomized(name)), images(name)
    before = sum(p.numel() for p in model.parameters())
    expected = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert list(model.prune_intermediate_layers([0], prune_norm=True)) == [0]
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before
    found = model.forward_intermediates(x, indices=[0], intermediates_only=True)
    assert_equal(found[0], expected[0])


@pytest.mark.parametrize("size", [(48, 32), (64, 96)])
@pytest.mark.parametrize("name", OWN_MICRO)
@torch.no_grad()
def test_images_of_other_sizes_are_taken_as_they_come(name: str, size: tuple[int, int]) -> None:
    model, x = randomized(name), images(name, size=size)
    logits = model(x)
    assert logits.shape == (2, 10)
    assert logits.isfinite().all()
    maps = model.forward_intermediates(x, intermediates_only=True)
    for info, found in zip(model.feature_info, maps, strict=True):
        expected = tuple(math.ceil(side / info["reduction"]) for side in size)
        assert tuple(found.shape[2:]) == expected


@pytest.mark.parametrize("size", [(28, 28), (33, 47), (31, 64), (45, 37), (1, 1)])
@pytest.mark.parametrize("name", OWN_MICRO)
@torch.no_grad()
def test_odd_size_is_taken_or_refused_with_a_clear_error(name: str, size: tuple[int, int]) -> None:
    model, x = randomized(name), images(name, size=size)
    message = ""
    try:
        logits = model(x)
    except ShapeError as error:
        message = str(error)
    if message:
        assert f"{size[0]} x {size[1]}" in message
        assert "expected" in message
        assert "\n" not in message
    else:
        assert logits.shape == (2, 10)
        assert logits.isfinite().all()


@pytest.mark.parametrize("name", OWN_MICRO)
@torch.no_grad()
def test_set_input_size_gives_the_logits_of_the_free_size(name: str) -> None:
    model, x = copy.deepcopy(randomized(name)), images(name, size=(64, 48))
    if not hasattr(model, "set_input_size"):
        pytest.skip("no tensor of this family depends on the size of the image")
    expected = model(x)
    model.set_input_size((64, 48))
    assert_equal(model(x), expected)


def gradients(model: Any, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    torch.manual_seed(0)
    model(x).square().mean().backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    return {key: None if p.grad is None else p.grad.clone() for key, p in trained.items()}


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_drop_rate_acts_on_the_head_in_training_only(name: str) -> None:
    model = timm.create_model(name, num_classes=10, drop_rate=0.5)
    model.load_state_dict(randomized(name).state_dict())
    x = randomized(name).forward_features(images(name))
    torch.manual_seed(0)
    model.train()
    drops = not torch.allclose(model.forward_head(x), model.forward_head(x))
    # timm's distilled DeiT drops nothing here before 1.0.31.
    assert drops or (name == "deit_micro" and OLDER_TIMM)
    model.eval()
    assert_equal(model.forward_head(x), randomized(name).forward_head(x))


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_drop_path_rate_grows_with_depth_and_acts_in_training_only(name: str) -> None:
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.5)
    model.load_state_dict(randomized(name).state_dict())
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == sorted(rates)
    assert 0 < rates[-1] <= 0.5 + 1e-6
    x = images(name)
    torch.manual_seed(0)
    model.train()
    assert not torch.allclose(model(x), model(x))
    # BatchNorm has moved its statistics
    model.load_state_dict(randomized(name).state_dict())
    assert_equal(model.eval()(x), randomized(name)(x))


@pytest.mark.parametrize("name", MICRO)
def test_bfloat16_autocast_keeps_the_logits_and_trains(name: str) -> None:
    model, x = copy.deepcopy(randomized(name)), images(name)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).norm() < 0.1 * expected.norm()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        grads = gradients(model, x)
    assert [key for key, grad in grads.items() if grad is None or not grad.isfinite().all()] == []


@pytest.mark.parametrize("name", MICRO)
@torch.no_grad()
def test_channels_last_gives_the_same_logits(name: str) -> None:
    x = images(name)
    model = copy.deepcopy(randomized(name)).to(memory_format=torch.channels_last)
    assert_equal(model(x.to(memory_format=torch.channels_last)), randomized(name)(x))


@pytest.mark.parametrize("name", OWN_MICRO)
@torch.no_grad()
def test_compiled_model_gives_the_same_logits(name: str) -> None:
    torch._dynamo.reset()
    model, x = randomized(name), images(name)
    assert_equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))
