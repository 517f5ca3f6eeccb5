"""Greedy MP: bits for every site within a budget, found by giving up what costs the outputs least.

From all sites at the highest level, the next step down is the one with the least

    score = increase of the loss / cost saved

(MPTQ-ViT, arXiv 2401.14895; NetAdapt, arXiv 1804.03230). The loss is the KL divergence of the quantized from the float
outputs on calibration images. `greedy_mp` is the search as published: every candidate is measured at every step, which
takes thousands of runs of the network. `allocate` is ours: the same score in about a hundredth of the runs, by

    probe      every candidate is measured once, at PROBE_BITS; its local output error tells the levels above from that
    descend    the published loop on these predictions, in a heap; the state is measured when predictions add up, and
               below PROBE_BITS, where local errors promise too much, no step is taken that was not measured
    solve      the same predictions as an integer program (see `integer_program`), whose optimum is measured
    uniform    where uniform bits within the budget are better, the search goes on from them
    exchange   bits are moved between pairs of tensors as long as that lowers the measured loss

The network runs from the first changed site on (see `evaluate`). Every loss is written to a journal, from which a
killed search goes on. A search is a `Problem`, which does not change, and a `State`, a value that each step replaces.
"""

from __future__ import annotations

import copy
import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from leanvit.config import Budget, MPTQConfig
from leanvit.errors import ConfigError
from leanvit.progress import Bar, note
from leanvit.quant.calibrate import Choices
from leanvit.quant.costs import Candidate, Costs, stepped
from leanvit.quant.elsewhere import Elsewhere, Losses
from leanvit.quant.evaluate import PlanLosses, make_network
from leanvit.quant.graph import QuantGraph, end_sites
from leanvit.quant.integer_program import Choice, least_loss, sum_of_losses
from leanvit.quant.journal import Journal
from leanvit.quant.plan import FLOAT_BITS, Plan, make_plan, parts_of
from leanvit.quant.search_state import (
    PROBE_BITS,
    Curve,
    Problem,
    State,
    bits_of,
    higher_level,
    increase_of,
    loss_of_plan,
    losses_of_plans,
    lower_level,
    measure_state,
    measure_step,
    must_measure,
    rise_of,
    score_of,
    take_step,
    with_level,
)
from leanvit.quant.work import Work

LEAST_SHARE = 0.01
"""Of the median increase: what a candidate is believed to cost at least, as no bits are free."""

SOLUTIONS = 4
"""Times that the integer program is solved at most: it is drawn to what was only predicted, which is then measured.
After the descent one was enough on vit_micro and swin_micro; the bound keeps a search from going on for ever."""

Heap = list[tuple[float, int, Candidate]]
"""Candidates by their score, and their place among all."""

FAILED_EXCHANGES = 12
"""Exchanges in a row that may fail to lower the loss before the search ends."""


# The search as published.


def greedy_mp(
    plan: Plan, candidates: list[Candidate], levels: tuple[int, ...], costs: Costs, loss: Callable[[Plan], float]
) -> Plan:
    """Greedy MP (MPTQ-ViT): take the step of the least score, measured, until the budget holds.

    plan: the start. candidates: what may give up bits. loss: evaluates a plan. Returns the plan within the budget.
    Raises ConfigError where even the lowest levels exceed it.
    """
    current, current_loss = dict(plan), loss(plan)
    while costs.of(current) > costs.limit:
        best: tuple[float, Plan, float] | None = None
        for name, part in candidates:
            lower = [level for level in levels if level < current[name][part]]
            if not lower or costs.saved(current, (name, part), lower[0]) <= 0:
                continue
            changed = {**current, name: stepped(current[name], part, lower[0])}
            value = loss(changed)
            score = (value - current_loss) / costs.saved(current, (name, part), lower[0])
            if best is None or score < best[0]:
                best = (score, changed, value)
        if best is None:
            raise ConfigError(f"budget {costs.limit:g} can't be met by the levels {levels}. Raise it.")
        _, current, current_loss = best
    return current


# Ours.


def choose_bits(work: Work) -> None:
    """The pass: a plan within the budget by Greedy MP, on the float graph as quantizers will find it."""
    work.plan, work.notes["search"] = allocate(
        work.graph, work.images, work.config, work.choices, work.journal, work.elsewhere
    )


def allocate(
    graph: QuantGraph,
    images: Tensor,
    config: MPTQConfig,
    choices: Choices,
    journal: str | Path | None = None,
    elsewhere: Elsewhere | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """A plan within the budget of `config` by Greedy MP (see the module).

    graph: float, smoothed, without quantizers. images: (N, 3, H, W) calibration images. elsewhere: other processes
    that compute losses; plan and journal are the same with them and without.
    Returns the plan and, for the report: evaluations, sensitivities by site, the Pareto curve, estimate errors.
    Raises ConfigError where even the lowest levels exceed the budget.
    """
    problem, state = begin(graph, images, config, choices, Journal(journal, graph, images, config), elsewhere)
    state = probe(problem, state)
    state = descend(problem, state)
    state = measure_state(problem, state)
    state = solve(problem, state)
    state = at_least_uniform(problem, state)
    state = exchange(problem, state)
    plan = {name: bits for name, bits in state.plan.items() if bits[1] != FLOAT_BITS}
    return plan, _report(problem, state)


def begin(
    graph: QuantGraph,
    images: Tensor,
    config: MPTQConfig,
    choices: Choices,
    journal: Journal,
    elsewhere: Elsewhere | None = None,
) -> tuple[Problem, State]:
    """The search of `config`'s budget with all free sites at the highest level, and the loss of that measured."""
    levels, ends = levels_of(config), end_sites(graph)
    plan = highest_plan(graph, config)
    free = tuple(name for name in plan if name not in ends)
    # Latency is measured with both sides in float or in 8 bits.
    parts = {name: (2,) if levels[0] == FLOAT_BITS else parts_of(graph.sites[name]) for name in free}
    candidates = tuple((name, part) for name in free for part in parts[name])
    costs = Costs(graph, budget_of(config), list(free))
    if elsewhere is None:
        losses: Losses = PlanLosses(make_network(copy.deepcopy(graph), images, plan, choices))
    else:
        losses = elsewhere
        _prepare(elsewhere, candidates, levels)
    problem = Problem(losses, costs, journal, free, levels, candidates)
    state, loss = loss_of_plan(problem, State(plan), plan)
    return problem, replace(state, loss=loss)


def _prepare(elsewhere: Elsewhere, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
    """Have other processes make all quantizers before any loss: none is then made twice."""
    levels = [level for level in levels if level != FLOAT_BITS]
    elsewhere.prepare(candidates, levels)
    with Bar("errors of single tensors", len(candidates)) as bar:
        for candidate in candidates:
            elsewhere.local_error(candidate, levels[0])
            bar.advance()


def budget_of(config: MPTQConfig) -> Budget:
    """The budget of a search. Raises ConfigError where there is none."""
    if config.budget is None:
        raise ConfigError("no budget given, expected one. Give MPTQConfig(budget=Budget(average_bits=5)).")
    return config.budget


def levels_of(config: MPTQConfig) -> tuple[int, ...]:
    """Bits that a site may have, highest first; of a budget of milliseconds float and 8."""
    budget = budget_of(config)
    return budget.levels if budget.latency_ms is None else (FLOAT_BITS, 8)


def highest_plan(graph: QuantGraph, config: MPTQConfig) -> Plan:
    """The plan that a search begins with: all sites but the first and the last at the highest level."""
    ends, highest = end_sites(graph), levels_of(config)[0]
    start = make_plan(graph, config)
    return {name: b if name in ends else stepped((b[0] and 1, 1), 2, highest) for name, b in start.items()}


def probe(problem: Problem, state: State) -> State:
    """Measure every candidate once, well below the start."""
    level = min(problem.levels[1:] or problem.levels, key=lambda value: abs(value - PROBE_BITS))
    increases: dict[Candidate, float] = {}
    plans = [with_level(state.plan, candidate, level) for candidate in problem.candidates]
    found = losses_of_plans(problem, state, plans)
    with Bar("measuring sensitivities", len(problem.candidates)) as bar:
        for candidate, (after, loss) in zip(problem.candidates, found, strict=True):
            state = after
            increases[candidate] = loss - state.loss
            bar.advance()
    rises = sorted(max(increase, 0.0) for increase in increases.values())
    least = max(LEAST_SHARE * rises[len(rises) // 2], 1e-12) if rises else 1e-12
    curves = {c: Curve({level: max(increase, least)}, {level: state.loss}) for c, increase in increases.items()}
    return replace(state, curves=curves)


def descend(problem: Problem, state: State) -> State:
    """Take the step of the least score again and again until the budget holds.

    Scores grow as a candidate's bits fall, so that one which is still the least when it is looked at again is the
    least of all: a heap stands for the loop over all candidates.
    Raises ConfigError where no candidate is left and the budget does not hold.
    """
    costs = problem.costs
    start = cost = costs.of(state.plan)
    heap = [(score_of(problem, state, c), i, c) for i, c in enumerate(problem.candidates)]
    heapq.heapify(heap)
    with Bar("Greedy MP", 100) as bar:
        while cost > costs.limit:
            state = _next_step(problem, state, heap)
            cost = costs.of(state.plan)
            done = int(100 * (start - cost) / max(start - costs.limit, 1e-12))
            bar.advance(max(0, min(100, done) - bar.done), detail=f"cost {cost:.4g}, loss {state.loss:.3g}")
    return state


def _next_step(problem: Problem, state: State, heap: Heap) -> State:
    """The state after the candidate of the least score was looked at: measured, taken, or neither; changes the heap."""
    if not heap:
        costs = problem.costs
        raise ConfigError(
            f"budget {costs.limit:g} can't be met: the lowest levels still cost {costs.of(state.plan):g}. "
            f"Raise it, or allow lower levels than {problem.levels[-1]}."
        )
    _, index, candidate = heapq.heappop(heap)
    level, score = lower_level(problem, state, candidate), score_of(problem, state, candidate)
    if math.isinf(score) or level is None:
        return state
    if not (heap and score > heap[0][0]):
        if must_measure(problem, state, candidate, level):
            state = measure_step(problem, state, candidate, level)
        else:
            state = take_step(problem, state, candidate, level)
    heapq.heappush(heap, (score_of(problem, state, candidate), index, candidate))
    return state


def solve(problem: Problem, state: State) -> State:
    """The state with the plan of the integer program on its predictions, where that has the lower measured loss."""
    for _ in range(SOLUTIONS):
        found = least_loss(_choices(problem, state), _limit(problem, state))
        if found is None:
            return state
        plan = {**state.plan, **found}
        guessed = [c for c in problem.candidates if _is_guessed(state, c, bits_of(plan, c))]
        if not guessed:
            break
        with Bar("measuring low bits", len(guessed)) as bar:
            for candidate in guessed:
                state = measure_step(problem, state, candidate, bits_of(plan, candidate))
                bar.advance()
    if problem.costs.of(plan) > problem.costs.limit:  # by what HiGHS takes for equal
        return state
    state, loss = loss_of_plan(problem, state, plan)
    if loss >= state.loss:
        return state
    note(f"the integer program's plan has a lower loss ({loss:.3g}) than the steps taken: the search goes on from it")
    return replace(state, plan=plan, loss=loss, is_solution=True)


def _choices(problem: Problem, state: State) -> dict[str, list[Choice]]:
    """Every bits that each free site may have, with what they are predicted to add to the loss, and their cost."""
    parts: dict[str, list[int]] = {}
    for name, part in problem.candidates:
        parts.setdefault(name, []).append(part)
    found: dict[str, list[Choice]] = {}
    for name, own in parts.items():
        for levels in itertools.product(problem.levels, repeat=len(own)):
            bits = state.plan[name]
            for part, level in zip(own, levels, strict=True):
                bits = stepped(bits, part, level)
            loss = sum(
                increase_of(problem, state, (name, part), level) for part, level in zip(own, levels, strict=True)
            )
            found.setdefault(name, []).append(Choice(bits, loss, problem.costs.of_site(name, bits)))
    return found


def _limit(problem: Problem, state: State) -> float:
    """What all free sites together may cost: the budget without what costs the same in every plan."""
    free = sum(problem.costs.of_site(name, state.plan[name]) for name in problem.free)
    return problem.costs.limit - (problem.costs.of(state.plan) - free)


def _is_guessed(state: State, candidate: Candidate, level: int) -> bool:
    """Whether a level is one where predictions promise too much, and there is nothing else to go by."""
    is_known = any(measured <= level for measured in state.curves[candidate].increase)
    return level < PROBE_BITS and not is_known and level < bits_of(state.plan, candidate)


def at_least_uniform(problem: Problem, state: State) -> State:
    """The state, or the most uniform bits that the budget allows where they have a lower loss.

    The first steps may have led astray: exchanges then go on from what the search is meant to beat.
    """
    for level in problem.levels:
        plan = {n: stepped(b, 2, level) if n in problem.free else b for n, b in state.plan.items()}
        if level != FLOAT_BITS and problem.costs.of(plan) <= problem.costs.limit:
            state, loss = loss_of_plan(problem, state, plan)
            if loss < state.loss:
                note(f"uniform bits have a lower loss ({loss:.3g}) than the steps taken: the search goes on from them")
                return replace(state, plan=plan, loss=loss)
            return state
    return state


def exchange(problem: Problem, state: State) -> State:
    """Give a bit to one tensor and take one from another while that lowers the measured loss."""
    failed, tried = 0, set[str]()
    limit = len(problem.candidates)
    with Bar("exchanging bits", limit) as bar:
        while failed < FAILED_EXCHANGES and bar.done < limit:
            following = next(_exchanges(problem, state, tried), None)
            if following is None:
                break
            gain, plan = following
            tried.add(problem.journal.key(plan))
            state, loss = loss_of_plan(problem, state, plan)
            bar.advance(detail=f"loss {min(loss, state.loss):.3g}")
            state = replace(state, errors=(*state.errors, (-gain, loss - state.loss)))
            failed = failed + 1 if loss >= state.loss else 0
            if loss < state.loss:
                state = replace(state, plan=plan, loss=loss, exchanges=state.exchanges + 1)
    return state


def _exchanges(problem: Problem, state: State, tried: set[str]) -> Iterator[tuple[float, Plan]]:
    """Untried pairs of one step up and at most one down within the budget, what promises the most first."""
    levels = {
        c: (higher_level(problem, state, c), bits_of(state.plan, c), lower_level(problem, state, c))
        for c in state.curves
    }
    ups = [(rise_of(problem, state, c, up, bits), c, up) for c, (up, bits, _) in levels.items() if up is not None]
    downs = [
        (rise_of(problem, state, c, bits, down), c, down) for c, (_, bits, down) in levels.items() if down is not None
    ]
    options: list[tuple[float, Plan, tuple[Candidate, int] | None]] = []
    for gain, candidate, level in ups:
        plan = with_level(state.plan, candidate, level)
        options.append((gain, plan, None))
    for gain, candidate, level in ups:
        plan = with_level(state.plan, candidate, level)
        options += [(gain - rise, plan, (other, down)) for rise, other, down in downs if other != candidate]
    for gain, plan, step in sorted((o for o in options if o[0] > 0), key=lambda o: -o[0]):
        plan = plan if step is None else with_level(plan, *step)
        if problem.costs.of(plan) <= problem.costs.limit and problem.journal.key(plan) not in tried:
            yield gain, plan


def _report(problem: Problem, state: State) -> dict[str, Any]:
    levels = [level for level in problem.levels if level not in (FLOAT_BITS, problem.levels[0])]
    # Levels that the search never looked at have no quantizer, and no number.
    sensitivities = [
        {"site": name, "part": part,
         "loss": {str(b): increase_of(problem, state, (name, part), b) for b in levels
                  if b in curve.increase or ((name, part), b) in problem.local}}
        for (name, part), curve in state.curves.items()
    ]  # fmt: skip
    ratios = sorted(measured / predicted for predicted, measured in state.errors if predicted > 0)
    return {
        "evaluations": state.evaluations,
        "from_journal": state.from_journal,
        "candidates": len(problem.candidates),
        "exchanges": state.exchanges,
        "steps": list(state.steps),
        "loss": state.loss,
        "cost": problem.costs.of(state.plan),
        "limit": problem.costs.limit,
        "estimate_ratio_median": ratios[len(ratios) // 2] if ratios else None,
        "measured_steps": len(ratios),
        "additive": _bound(problem, state),
        "sensitivities": sensitivities,
    }


def _bound(problem: Problem, state: State) -> dict[str, Any]:
    """How far the plan is from the optimum of the additive model: predicted increases over the highest level."""
    sites = _choices(problem, state)
    best = least_loss(sites, _limit(problem, state))
    least = None if best is None else sum_of_losses(sites, best)
    return {"plan": sum_of_losses(sites, state.plan), "optimum": least, "taken": state.is_solution}
