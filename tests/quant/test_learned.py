"""The pass `reconstruct`: cuts that lose nothing, steps that held-out images agree to, and what it leaves alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401  registers them in timm
from leanvit.config import MPTQConfig
from leanvit.quant import QuantizedModel, learned, quantize, variants
from leanvit.quant.blocks import Block, blocks_of, needed, run_nodes
from leanvit.quant.graph import trace
from leanvit.quant.learned import learn
from leanvit.quant.mptq import prepare, quantize_part
from leanvit.quant.quantizers import FORMS, LogQuantizer, WeightQuantizer, make_quantizer

TINY_VIT: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
QUICK = {"weight_bits": 3, "activation_bits": 3, "passes": ("reconstruct",)}


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", num_classes=5, **TINY_VIT).eval()


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned, "STEPS", 6)
    monkeypatch.setattr(learned, "LOOKS", 2)


def held_in(quantized: QuantizedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in quantized.module.state_dict().items()}


SWIN: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 2), "embed_dim": 24,
                        "num_heads": (2, 2), "num_classes": 5}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options"),
    [("vit_micro", {}), ("revit_micro", {}), ("vitaev2_micro", {}), ("exmobilevit_micro", {}),
     ("swin_tiny_patch4_window7_224", SWIN)],
)  # fmt: skip
def test_blocks_one_after_another_compute_what_the_network_does(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    x = torch.randn(3, *((3, 32, 32) if options else model.pretrained_cfg["input_size"]))
    graph = trace(model, x[:2])
    blocks = blocks_of(graph, graph.module, [])
    assert len(blocks) > 1
    held: dict[str, Tensor] = {}
    with torch.no_grad():
        for block in blocks:
            held = run_nodes(graph.module, block.quantized, {n: held[n] for n in block.reads}, x)
            assert all(len(held[n]) == len(x) for n in block.writes)
        expected = graph.module(x)
    (found,) = (held[name] for name in blocks[-1].writes)
    assert torch.equal(found, expected)


def test_the_rest_leads_from_a_block_to_the_features(tiny: nn.Module, images: Tensor) -> None:
    graph = trace(tiny, images[:2])
    features = [next(node.args[0].name for node in graph.module.graph.nodes if node.name == "linear_8")]
    first, *_, last = blocks_of(graph, graph.module, features)
    values = run_nodes(graph.module, first.quantized, {}, images)
    ahead = run_nodes(graph.module, first.rest, {name: values[name] for name in first.writes}, images)
    whole = run_nodes(graph.module, needed(graph.module, features, ()), {}, images)
    assert torch.equal(ahead[features[0]], whole[features[0]])
    assert not last.rest


def test_held_out_errors_never_grow_and_the_float_network_stays(
    tiny: nn.Module, images: Tensor, few_steps: None
) -> None:
    before = copy.deepcopy(tiny.state_dict())
    quantized = quantize(tiny, images, MPTQConfig(**QUICK))
    notes = quantized.report["reconstruct"]
    assert [note["steps"] for note in notes] == [6] * len(notes)
    assert all(note["after"] < note["before"] for note in notes if note["kept"])
    assert any(note["kept"] for note in notes)
    assert all(torch.equal(value, before[name]) for name, value in tiny.state_dict().items())
    for module in quantized.module.modules():
        if isinstance(module, WeightQuantizer):
            assert int(module.codes.min()) >= module.low
            assert int(module.codes.max()) <= module.high
            assert float(module.scale.min()) > 0
    assert all(note["after"] == note["before"] for note in notes if not note["kept"])


def test_what_held_out_images_refuse_leaves_no_trace(
    tiny: nn.Module, images: Tensor, few_steps: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rate in ("WEIGHT_RATE", "SCALE_RATE", "CHANNEL_RATE"):
        monkeypatch.setattr(learned, rate, 30.0)
    plain = quantize(tiny, images, MPTQConfig(weight_bits=4, activation_bits=4))
    spoiled = quantize(tiny, images, MPTQConfig(weight_bits=4, activation_bits=4, passes=("reconstruct",)))
    assert not any(note["kept"] for note in spoiled.report["reconstruct"])
    expected, found = held_in(plain), held_in(spoiled)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("after", [0.05, 0.2])
def test_what_moves_the_outputs_further_goes_again(
    tiny: nn.Module, images: Tensor, few_steps: None, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    losses = iter((0.1, after))
    monkeypatch.setattr(learned, "divergence", lambda *_: next(losses))
    bits = {"weight_bits": 3, "activation_bits": 3}
    plain = held_in(quantize(tiny, images, MPTQConfig(**bits)))
    found = quantize(tiny, images, MPTQConfig(**bits, passes=("reconstruct",)))
    assert any(note["kept"] for note in found.report["reconstruct"])
    assert found.report["learned"] == {"loss": {"before": 0.1, "after": after}, "taken": after < 0.1}
    same = all(torch.equal(held_in(found)[name], value) for name, value in plain.items())
    assert same == (after > 0.1)


def test_the_same_seed_learns_the_same(tiny: nn.Module, images: Tensor, few_steps: None) -> None:
    first, second = (held_in(quantize(tiny, images, MPTQConfig(**QUICK))) for _ in range(2))
    other = held_in(quantize(tiny, images, MPTQConfig(**QUICK, seed=1)))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert any(not torch.equal(other[name], value) for name, value in first.items())


def test_a_killed_run_goes_on_to_the_same_result(
    tiny: nn.Module, images: Tensor, few_steps: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = held_in(quantize(tiny, images, MPTQConfig(**QUICK)))
    done: list[str] = []
    learn_block = learned._learn_block

    def killed(state: Any, block: Any, *others: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(block.name)
        return learn_block(state, block, *others)

    journal = tmp_path / "search.jsonl"
    monkeypatch.setattr(learned, "_learn_block", killed)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny, images, MPTQConfig(**QUICK), journal=journal)
    monkeypatch.setattr(learned, "_learn_block", learn_block)
    again: list[str] = []
    monkeypatch.setattr(learned, "_learn_block", lambda s, b, *o: again.append(b.name) or learn_block(s, b, *o))
    found = held_in(quantize(tiny, images, MPTQConfig(**QUICK), journal=journal))
    assert not set(again) & set(done)
    assert all(torch.equal(found[name], value) for name, value in whole.items())
    # Another run takes nothing from it, and a damaged file is none.
    (tmp_path / "search.blocks.safetensors").write_bytes(b"damaged")
    assert held_in(quantize(tiny, images, MPTQConfig(**QUICK, seed=1), journal=journal)).keys() == whole.keys()


def test_without_time_it_takes_no_step(tiny: nn.Module, images: Tensor) -> None:
    quantized = quantize(tiny, images, MPTQConfig(**QUICK, minutes=1e-9))
    assert {note["steps"] for note in quantized.report["reconstruct"]} == {0}


def test_rates_fall_to_nothing_within_the_time_that_a_block_has() -> None:
    assert learned._steps_until(4.0, float("inf"), 200) == 200
    # Two steps take 4 seconds: 100 seconds are 50 of them, without what the looks take.
    assert learned._steps_until(4.0, 100.0, 200) == 50 - learned.LOOK_STEPS * learned.LOOKS
    assert learned._steps_until(4.0, 1e6, 200) == 200
    assert learned._steps_until(4.0, 5.0, 200) == learned.TIMED_STEPS


def test_large_networks_take_fewer_steps_by_what_these_compute(tiny: nn.Module, images: Tensor) -> None:
    def block(macs: int, rest: int) -> Block:
        return Block("one", (), (), (), (), (), macs, rest)

    assert learned.affordable_steps([block(10**6, 10**6)], 16, 16) == learned.STEPS
    # Forward and backward to values and weights is three times the block, and twice the rest.
    large = [block(4 * 10**9, 10**10), block(4 * 10**9, 0)]
    steps = learned.affordable_steps(large, 8, 4)
    assert steps == int(learned.MOST_MACS / (3 * 8 * 8e9 + 2 * 4 * 1e10))
    assert learned.LOOKS < learned.affordable_steps(large, 16, 16) < steps < learned.STEPS
    assert learned.affordable_steps([block(10**15, 0)], 8, 4) == learned.LOOKS

    graph = trace(tiny, images[:2])
    head = graph.sites["head"]
    found = blocks_of(graph, graph.module, [graph.node(head.node).args[0].name])
    assert sum(one.macs for one in found) == sum(site.macs for site in graph.sites.values())
    for index, one in enumerate(found[:-1]):
        assert one.rest_macs == sum(later.macs for later in found[index + 1 :]) - head.macs


def test_minutes_bound_the_whole_pass(tiny: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10**9))  # every look at the clock is a second later: a step takes one
    monkeypatch.setattr(learned.time, "monotonic", lambda: float(next(now)))
    found = quantize(tiny, images, MPTQConfig(**QUICK, minutes=3)).report["reconstruct"]
    assert sum(note["steps"] for note in found) <= 3 * 60
    assert all(0 < note["steps"] < learned.STEPS for note in found)
    assert any(note["kept"] for note in found)


def test_variants_are_cut_outs_of_what_is_not_held_out() -> None:
    ramp = torch.linspace(0, 1, 32).expand(8, 3, 32, 32)  # from left to right
    images = ramp + torch.arange(8.0).view(-1, 1, 1, 1)
    found = variants.with_variants(images, learned.HELD_OUT, torch.Generator().manual_seed(0))
    assert torch.equal(found[:8], images)
    made = found[8:].view(variants.VARIANTS, 6, 3, 32, 32)
    numbers = torch.tensor([1.0, 2, 3, 5, 6, 7])  # a quarter, 0 and 4, decides and is not learned from
    assert torch.equal(made.mean((2, 3, 4)).floor(), numbers.expand(variants.VARIANTS, -1))
    slopes = (made[..., -1] - made[..., 0]).mean((2, 3))
    assert (slopes.abs() <= 1 + 1e-5).all()
    assert (slopes.abs() >= variants.LEAST_SIDE - 0.05).all()
    assert (slopes > 0).any()
    assert (slopes < 0).any()  # mirrored
    assert variants.with_variants(torch.zeros(8, 256, 7, 7), 4, torch.Generator()).shape == (8, 256, 7, 7)


def test_a_network_without_a_classifier_is_learned_by_what_it_returns(images: Tensor, few_steps: None) -> None:
    torch.manual_seed(0)
    maps = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.GELU(), nn.Conv2d(16, 16, 3, padding=1), nn.GELU(),
                         nn.Conv2d(16, 16, 3), nn.GELU(), nn.Conv2d(16, 4, 1)).eval()  # fmt: skip
    quantized = quantize_part(maps, images, MPTQConfig(**QUICK))
    assert quantized.report["reconstruct"]


def test_gradients_pass_through_every_quantizer() -> None:
    x = torch.linspace(0.05, 0.45, 18, dtype=torch.float64).requires_grad_()
    for form in FORMS:
        quantizer = make_quantizer(form, 8).double()
        found = quantizer(x)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        # Without its rounding a quantizer returns what it was given; a logarithmic one's slope is value over input.
        expected = found / x if issubclass(FORMS[form], LogQuantizer) else torch.ones_like(x)
        assert torch.allclose(gradient, expected, rtol=1e-6), form


def test_learn_needs_quantizers(tiny: nn.Module, images: Tensor) -> None:
    work = prepare(trace(tiny, images[:2]), [images], MPTQConfig(**QUICK))
    learn(work)
    assert "reconstruct" not in work.notes


def test_judges_are_one_variant_of_each_image_and_cells_of_maps_themselves() -> None:
    ramp = torch.linspace(0, 1, 32).expand(4, 3, 32, 32) + torch.arange(4.0).view(-1, 1, 1, 1)
    found = variants.variants_of(ramp, torch.Generator().manual_seed(0))
    assert found.shape == ramp.shape
    assert torch.equal(found.mean((1, 2, 3)).floor(), torch.arange(4.0))
    assert not torch.isclose(found, ramp).flatten(1).all(1).any()
    cells = torch.randn(4, 64, 7, 7)
    assert variants.variants_of(cells, torch.Generator().manual_seed(0)) is cells
