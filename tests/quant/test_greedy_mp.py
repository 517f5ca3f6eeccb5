"""Greedy MP: budgets kept, losses exact, few evaluations, and searches that survive being killed."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import MPTQConfig, quantize
from leanvit.config import Budget
from leanvit.errors import ConfigError
from leanvit.quant import evaluate
from leanvit.quant import greedy_mp as search
from leanvit.quant.attach import attach
from leanvit.quant.calibrate import Choices, calibrate
from leanvit.quant.costs import TABLE_VERSION, Costs, site_key
from leanvit.quant.evaluate import Network, PlanLosses, make_network, outputs_of_plan
from leanvit.quant.graph import OPERANDS, Outputs, QuantGraph, end_sites, trace
from leanvit.quant.greedy_mp import allocate, greedy_mp
from leanvit.quant.losses import divergence, joined, network_divergence
from leanvit.quant.plan import Plan, make_plan

CHOICES = Choices()


def images(count: int = 16, seed: int = 0) -> Tensor:
    """Smooth random pictures, normalised."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


def tiny(depth: int, **kwargs: Any) -> nn.Module:
    """A ViT of 5 tokens whose outputs are far from even."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=depth, num_classes=10, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny(1)


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> QuantGraph:
    return trace(model, images(2))


def scheme(**budget: Any) -> MPTQConfig:
    return MPTQConfig(budget=Budget(**budget))


def cost_of(graph: QuantGraph, plan: Plan, kind: str) -> float:
    """A plan's cost from the definitions in the configuration."""
    ends = {"patch_embed.proj", "head"}
    if kind == "bitops":
        return float(sum(s.macs * math.prod(plan[n]) for n, s in graph.sites.items()))
    if kind == "model_bytes":
        total = 4.0 * sum(p.numel() for p in graph.module.parameters())
        for name, site in graph.sites.items():
            if site.weight:
                count = math.prod(site.weight_shape)
                total += math.ceil(count * plan[name][0] / 8) + 4 * site.weight_shape[0] - 4 * count
        return total
    bits = elements = 0
    for name, site in graph.sites.items():
        if name not in ends:
            first = math.prod(site.weight_shape) if site.weight else site.elements[1]
            elements += first + site.elements[0]
            bits += first * plan[name][0] + site.elements[0] * plan[name][1]
    return bits / elements


@pytest.mark.parametrize(
    ("kind", "share"),
    [("average_bits", 0.95), ("average_bits", 0.5), ("bitops", 0.9), ("bitops", 0.4), ("model_bytes", 0.6)],
)
def test_the_budget_is_always_kept(graph: QuantGraph, kind: str, share: float) -> None:
    full = cost_of(graph, make_plan(graph, MPTQConfig()), kind)
    limit = type(full)(share * full) if kind == "average_bits" else int(share * full)
    plan, report = allocate(graph, images(8), scheme(**{kind: limit}), CHOICES)
    found = cost_of(graph, plan, kind)
    assert found <= limit
    assert found == pytest.approx(report["cost"])
    assert plan["patch_embed.proj"] == plan["head"] == (8, 8)
    assert all(2 <= b <= 8 for bits in plan.values() for b in bits)
    # The last step was needed: the plan before it was above the limit.
    costs = [step["cost"] for step in report["steps"]]
    assert all(cost > limit for cost in costs[:-1])


def test_only_the_levels_of_the_budget_are_used(graph: QuantGraph) -> None:
    plan, _ = allocate(graph, images(), scheme(average_bits=5.5, levels=(8, 6, 4)), CHOICES)
    assert {b for bits in plan.values() for b in bits} <= {8, 6, 4}


@pytest.mark.parametrize("budget", [{"average_bits": 3.0, "levels": (8, 6, 4)}, {"model_bytes": 10}, {"bitops": 10}])
def test_an_impossible_budget_is_refused(graph: QuantGraph, budget: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="can't be met"):
        allocate(graph, images(4), scheme(**budget), CHOICES)


def random_plan(graph: QuantGraph, seed: int) -> Plan:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(2, 9, (len(graph.sites), 2), generator=generator).tolist()
    return {name: (bits[0], bits[1]) for name, bits in zip(graph.sites, drawn, strict=True)}


@pytest.mark.parametrize("seed", range(3))
def test_the_evaluators_loss_is_that_of_a_graph_made_from_scratch(graph: QuantGraph, seed: int) -> None:
    plan, x = random_plan(graph, seed), images()
    network = make_network(copy.deepcopy(graph), x, make_plan(graph, MPTQConfig()), CHOICES)
    quantized = copy.deepcopy(graph)
    attach(quantized, plan)
    calibrate(quantized, graph.module, x, CHOICES)
    expected = network_divergence(graph.module, quantized, x)
    assert expected > 1e-4
    assert PlanLosses(network).loss(plan) == pytest.approx(expected, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", ["vit", "vitaev2_micro"])
def test_runs_from_the_changed_site_on_are_exact(name: str) -> None:
    torch.manual_seed(0)
    network = tiny(2) if name == "vit" else timm.create_model(name, num_classes=10).eval()
    graph, x = trace(network, images(2)), images(4)
    plan = make_plan(graph, MPTQConfig())
    cached, whole = (make_network(copy.deepcopy(graph), x, plan, Choices(search=False)) for _ in range(2))
    start, kept = outputs_of_plan(cached, plan, [0])
    assert_same(start, outputs_of_plan(whole, plan, [0])[0])
    names = [n for n in graph.sites if graph.sites[n].kind != "conv2d" or len(graph.sites) < 30]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(1)).tolist()[:12]
    for step, index in enumerate(order):
        site = names[index]
        changed = {**plan, site: (3, 4)}
        found, latest = outputs_of_plan(cached, changed, [0], kept)
        assert_same(found, outputs_of_plan(whole, changed, [0])[0])
        if step % 3 == 0:
            plan, kept = changed, latest
        elif step % 3 == 1:
            # Goes on without a run of its own.
            plan = {**plan, site: (5, 5)}


def assert_same(found: list[Outputs], expected: list[Outputs]) -> None:
    """Equal to the bit."""
    for own, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own, other, strict=True))


def test_losses_do_not_depend_on_the_order_of_calls(graph: QuantGraph) -> None:
    x, plans = images(4), [random_plan(graph, seed) for seed in range(5)]
    network = make_network(copy.deepcopy(graph), x, plans[0], Choices(search=False))
    alone = [PlanLosses(network).loss(plan) for plan in plans]
    assert len(set(alone)) == len(plans)
    losses = PlanLosses(network)
    for index in (2, 0, 1, 1, 3, 2, 4, 0):
        assert losses.loss(plans[index]) == alone[index]


def test_whoever_runs_a_part_of_the_images_the_outputs_are_the_same(
    graph: QuantGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "PART_MACS", 0)
    x, plans = images(11), [random_plan(graph, seed) for seed in range(3)]
    network = make_network(copy.deepcopy(graph), x, plans[0], Choices(search=False))
    assert [len(part) for part in network.parts] == [3, 3, 3, 2]
    shares = (PlanLosses(network), [0, 2]), (PlanLosses(network), [1, 3])
    for plan in plans:
        whole = outputs_of_plan(network, plan, range(4))[0]
        found = {
            part: own for losses, parts in shares for part, own in zip(parts, losses.outputs(plan, parts), strict=True)
        }
        assert_same([found[part] for part in range(4)], whole)
        assert PlanLosses(network).loss(plan) == divergence(network.truth, joined(whole))


def test_what_a_search_goes_on_from_is_still_held(graph: QuantGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that are tried and not taken don't push out the values of the plan that they were tried on."""
    plan = make_plan(graph, MPTQConfig())
    network = make_network(copy.deepcopy(graph), images(4), plan, Choices(search=False))
    losses = PlanLosses(network)
    losses.loss(plan)
    begun: list[int] = []
    run = evaluate._run

    def counted(network: Network, x: Tensor, start: int, held: Any) -> Any:
        begun.append(start)
        return run(network, x, start, held)

    monkeypatch.setattr(evaluate, "_run", counted)
    sites = list(graph.sites)
    for site in reversed(sites[1:]):
        losses.loss({**plan, site: (3, 3)})
        assert begun[-1] == max([i for i in network.alive if i <= network.first[site]], default=0)


def test_greedy_ends_near_the_plain_search_with_few_evaluations() -> None:
    graph, x = trace(tiny(2), images(2)), images(16)
    config = scheme(average_bits=5.0, levels=(8, 6, 4))
    plan, report = allocate(graph, x, config, CHOICES)
    ends = end_sites(graph)
    free = [name for name in graph.sites if name not in ends]
    start = make_plan(graph, MPTQConfig())
    losses = PlanLosses(make_network(copy.deepcopy(graph), x, start, CHOICES))
    spent = 0

    def loss(candidate: Plan) -> float:
        nonlocal spent
        spent += 1
        return losses.loss(candidate)

    candidates = [(name, part) for name in free for part in (0, 1)]
    reference = greedy_mp(start, candidates, (8, 6, 4), Costs(graph, config.budget, free), loss)
    assert cost_of(graph, reference, "average_bits") <= 5.0
    assert report["candidates"] == len(candidates)
    assert report["evaluations"] <= 0.15 * spent + len(candidates)
    found, expected = (losses.loss(p) for p in (plan, reference))
    assert report["loss"] == pytest.approx(found, rel=1e-6)
    assert found <= max(1.01 * expected, expected + 2e-4)


def test_the_integer_programs_plan_is_taken_where_it_measures_better(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = trace(tiny(2), images(2)), images(16)
    config = scheme(average_bits=5.0, levels=(8, 6, 4))
    # Without steps that lead anywhere near: the lowest bits everywhere, which are within the budget.
    monkeypatch.setattr(search, "descend", _all_the_way_down)
    monkeypatch.setattr(search, "exchange", lambda problem, state: state)
    monkeypatch.setattr(search, "at_least_uniform", lambda problem, state: state)
    plan, report = allocate(graph, x, config, CHOICES)
    assert report["additive"]["taken"]
    assert report["additive"]["plan"] == pytest.approx(report["additive"]["optimum"])
    assert cost_of(graph, plan, "average_bits") <= 5.0
    losses = PlanLosses(make_network(copy.deepcopy(graph), x, plan, CHOICES))
    lowest = {name: bits if name in end_sites(graph) else (4, 4) for name, bits in plan.items()}
    assert report["loss"] == pytest.approx(losses.loss(plan), rel=1e-6)
    assert report["loss"] < 0.5 * losses.loss(lowest)


def _all_the_way_down(problem: search.Problem, state: search.State) -> search.State:
    lowest = {name: (4, 4) if name in problem.free else bits for name, bits in state.plan.items()}
    return replace(state, plan=lowest, unmeasured=1.0)


def test_no_plan_adds_less_than_the_reported_optimum(graph: QuantGraph) -> None:
    _, report = allocate(graph, images(8), scheme(average_bits=5.0), CHOICES)
    assert 0 < report["additive"]["optimum"] <= report["additive"]["plan"] * (1 + 1e-3)


class Killed(BaseException):
    """What ends a search from outside."""


@pytest.mark.parametrize("after", [1, 9, 20])
def test_a_killed_search_goes_on_to_the_same_plan(
    graph: QuantGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    config, x = scheme(average_bits=4.0), images()
    expected, whole = allocate(graph, x, config, CHOICES)
    assert whole["evaluations"] > after
    journal = tmp_path / "runs" / "journal.jsonl"
    calls = 0

    loss = PlanLosses.loss

    def dies(losses: PlanLosses, plan: Plan) -> float:
        nonlocal calls
        calls += 1
        if calls > after:
            raise Killed
        return loss(losses, plan)

    with monkeypatch.context() as patch:
        patch.setattr(PlanLosses, "loss", dies)
        with pytest.raises(Killed):
            allocate(graph, x, config, CHOICES, journal)
    with journal.open("a") as file:
        file.write('{"run": "cut of')
    plan, report = allocate(graph, x, config, CHOICES, journal)
    assert plan == expected
    assert report["from_journal"] >= after
    assert report["evaluations"] == whole["evaluations"] - after
    assert report["loss"] == pytest.approx(whole["loss"], rel=1e-6)


def test_the_journal_of_another_scheme_is_not_believed(graph: QuantGraph, tmp_path: Path) -> None:
    journal, budget, x = tmp_path / "journal.jsonl", Budget(average_bits=5), images(4)
    allocate(graph, x, MPTQConfig(budget=budget), CHOICES, journal)
    repeated = allocate(graph, x, MPTQConfig(budget=budget), CHOICES, journal)[1]
    assert repeated["evaluations"] == 0
    unsearched = MPTQConfig(budget=budget, range_search=False)
    report = allocate(graph, x, unsearched, Choices(search=False), journal)[1]
    fresh = allocate(graph, x, unsearched, Choices(search=False))[1]
    # A search meets some plans twice; those it may take from itself.
    assert report["from_journal"] == fresh["from_journal"]
    assert report["evaluations"] == fresh["evaluations"]
    other = allocate(graph, images(4, seed=1), MPTQConfig(budget=budget), CHOICES, journal)[1]
    assert other["evaluations"] > 0


def latency_table(path: Path, graph: QuantGraph, **changes: Any) -> str:
    """A table by which every product costs 2 ms in float and 1 ms in 8 bits, but for the attention products."""
    rows = {}
    for site in graph.sites.values():
        if OPERANDS[site.kind] == 2:
            rows[site_key(site)] = {"float_ms": 1.0, "int8_ms": 1.5}
        else:
            rows[site_key(site)] = {"float_ms": 2.0, "int8_ms": 1.0}
    path.write_text(json.dumps({"version": TABLE_VERSION, "sites": rows} | changes))
    return str(path)


def test_a_latency_budget_quantizes_what_saves_time(model: nn.Module, graph: QuantGraph, tmp_path: Path) -> None:
    table = latency_table(tmp_path / "table.json", graph)
    # Patch embedding and head are at 8 bits: 2 ms; attention products 2 ms in float; four linears.
    config = scheme(latency_ms=10.0, latency_table=table)
    quantized = quantize(model, images(32), config)
    linears = {n for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") if f"blocks.0.{n}" in quantized.plan}
    assert len(linears) == 2
    assert not {"blocks.0.attn.qk", "blocks.0.attn.av"} & set(quantized.plan)
    assert {b for bits in quantized.plan.values() for b in bits} == {8}
    assert quantized.report["search"]["cost"] == pytest.approx(10.0)
    with torch.no_grad():
        assert bool(quantized.module(images(2)).isfinite().all())


def test_latency_tables_that_do_not_fit_are_refused(graph: QuantGraph, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        allocate(graph, images(4), scheme(latency_ms=1.0, latency_table=str(tmp_path / "none.json")), CHOICES)
    old = latency_table(tmp_path / "old.json", graph, version=0)
    with pytest.raises(ConfigError, match=f"version {TABLE_VERSION}"):
        allocate(graph, images(4), scheme(latency_ms=1.0, latency_table=old), CHOICES)
    good = latency_table(tmp_path / "good.json", graph)
    with pytest.raises(ConfigError, match="can't be met"):
        allocate(graph, images(4), scheme(latency_ms=1.0, latency_table=good), CHOICES)


def test_an_edited_plan_is_applied_again_and_its_mistakes_are_named(model: nn.Module) -> None:
    x = images(8)
    config = MPTQConfig(budget=Budget(average_bits=5), smoothing="none", range_search=False)
    found = quantize(model, x, config)
    assert found.report["average_bits"] <= 5
    edited = {name: list(bits) for name, bits in json.loads(json.dumps(found.plan)).items()}
    edited["blocks.0.attn.qkv"] = [8, 8]
    again = quantize(model, x, MPTQConfig(smoothing="none", range_search=False), plan=edited)
    assert again.plan == {**found.plan, "blocks.0.attn.qkv": (8, 8)}
    with pytest.raises(ConfigError, match=r"unknown site 'blocks\.0\.atn\.qkv'.*'?blocks\.0\.attn\.qkv"):
        quantize(model, x, plan={"blocks.0.atn.qkv": [4, 4]})
    for bits in ([4], [1, 4], [4, 9], [4, 4, 4]):
        with pytest.raises(ConfigError, match=r"expected \[weight bits, activation bits\]"):
            quantize(model, x, plan={"blocks.0.attn.qkv": bits})
    with pytest.raises(ConfigError, match="a plan and a budget"):
        quantize(model, x, scheme(average_bits=5), plan=edited)


def test_a_plan_that_was_found_gives_the_network_that_was_searched(model: nn.Module) -> None:
    x, other = images(8), images(4, seed=1)
    found = quantize(model, x, MPTQConfig(budget=Budget(average_bits=5), range_search=False))
    again = quantize(model, x, MPTQConfig(range_search=False), plan=found.plan)
    assert again.plan == found.plan
    assert torch.equal(again.graph.module(other), found.graph.module(other))
    uniform = quantize(model, x, MPTQConfig(weight_bits=4, activation_bits=8, range_search=False))
    again = quantize(model, x, MPTQConfig(range_search=False), plan=uniform.plan)
    assert torch.equal(again.graph.module(other), uniform.graph.module(other))


def test_the_report_of_a_search_can_be_drawn(model: nn.Module) -> None:
    config = MPTQConfig(budget=Budget(average_bits=5.5), smoothing="none", range_search=False)
    search = quantize(model, images(32), config).report["search"]
    assert json.loads(json.dumps(search)) == search
    assert {step["site"] for step in search["steps"]} <= {row["site"] for row in search["sensitivities"]}
    costs = [step["cost"] for step in search["steps"]]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] <= 5.5


def test_fully_quantized_plans_are_searched_too(model: nn.Module) -> None:
    quantized = quantize(
        model, images(32), MPTQConfig(scope="full", budget=Budget(average_bits=6), smoothing="none", range_search=False)
    )
    assert quantized.report["average_bits"] <= 6
    norm = quantized.plan["blocks.0.norm1.norm"]
    assert norm[0] == 0
    assert 2 <= norm[1] <= 8
