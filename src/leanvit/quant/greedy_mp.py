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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from leanvit.config import MPTQConfig
from leanvit.errors import ConfigError
from leanvit.progress import Bar, note
from leanvit.quant.ahead import Ahead
from leanvit.quant.calibrate import Choices
from leanvit.quant.costs import Candidate, Costs, stepped
from leanvit.quant.evaluate import Kept, Network, local_error, loss_of, make_network
from leanvit.quant.graph import QuantGraph, end_sites
from leanvit.quant.integer_program import Choice, least_loss, sum_of_losses
from leanvit.quant.journal import Journal
from leanvit.quant.plan import FLOAT_BITS, Plan, make_plan, parts_of
from leanvit.quant.work import Work

PROBE_BITS = 4
"""Level at which candidates are first measured: far enough down to stand out of the noise."""

TRUST = 0.1
"""Share of the loss that predicted steps may add before the state is measured: predictions are off by up to twice,
so that the loss is known to a fifth."""

STALE = 1.5
"""Growth of the loss after which a measured increase is no longer believed."""

LEAST_SHARE = 0.01
"""Of the median increase: what a candidate is believed to cost at least, as no bits are free."""

SOLUTIONS = 4
"""Times that the integer program is solved at most: it is drawn to what was only predicted, which is then measured.
After the descent one was enough on vit_micro and swin_micro; the bound keeps a search from going on for ever."""

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


@dataclass(frozen=True)
class Problem:
    """What stays the same during a search.

    free: sites whose bits may change. levels: bits, highest first. candidates: every part of every free site.
    ahead: computes losses beside this process, None: this process does. local: squared output errors by candidate and
    level, filled when first asked for.
    """

    network: Network
    costs: Costs
    journal: Journal
    free: tuple[str, ...]
    levels: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    ahead: Ahead | None = None
    local: dict[tuple[Candidate, int], float] = field(default_factory=dict)


Heap = list[tuple[float, int, Candidate]]
"""Candidates by their score, and their place among all."""

Measuring = Callable[["Problem", "State", Candidate, int, Heap], "State"]
"""Measures a step of a candidate to a level; what else is on the heap."""


@dataclass(frozen=True)
class Curve:
    """What was measured of the loss that one candidate adds at each level.

    increase: over the highest level. state: loss of the network when each was measured.
    """

    increase: dict[int, float]
    state: dict[int, float]


@dataclass(frozen=True)
class State:
    """Where a search is.

    loss: of the plan, measured, and what predicted steps have added since; unmeasured: of it, that part.
    kept, latest: values of the last measured state, and of the last run. steps: taken, for the report.
    errors: (predicted, measured) increases. evaluations: runs of the network; from_journal: losses that were known.
    is_solution: whether the search went on from the plan of the integer program.
    """

    plan: Plan
    loss: float = 0.0
    unmeasured: float = 0.0
    curves: dict[Candidate, Curve] = field(default_factory=dict)
    kept: Kept | None = None
    latest: Kept | None = None
    steps: tuple[dict[str, Any], ...] = ()
    errors: tuple[tuple[float, float], ...] = ()
    evaluations: int = 0
    from_journal: int = 0
    exchanges: int = 0
    is_solution: bool = False


def choose_bits(work: Work) -> None:
    """The pass: a plan within the budget by Greedy MP, on the float graph as quantizers will find it."""
    work.plan, work.notes["search"] = allocate(
        work.graph, work.images, work.config, work.choices, work.journal, work.ahead
    )


def allocate(
    graph: QuantGraph,
    images: Tensor,
    config: MPTQConfig,
    choices: Choices,
    journal: str | Path | None = None,
    ahead: Ahead | None = None,
) -> tuple[Plan, dict[str, Any]]:
    """A plan within the budget of `config` by Greedy MP (see the module).

    graph: float, smoothed, without quantizers. images: (N, 3, H, W) calibration images. ahead: other processes that
    compute losses; plan and journal are the same with them and without.
    Returns the plan and, for the report: evaluations, sensitivities by site, the Pareto curve, estimate errors.
    Raises ConfigError where even the lowest levels exceed the budget.
    """
    problem, state = begin(graph, images, config, choices, Journal(journal, graph, images, config), ahead)
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
    ahead: Ahead | None = None,
) -> tuple[Problem, State]:
    """The search of `config`'s budget with all free sites at the highest level, and the loss of that measured."""
    problem, plan = pose(graph, images, config, choices, journal, ahead)
    state, loss = _loss(problem, State(plan), plan)
    return problem, replace(state, loss=loss)


def pose(
    graph: QuantGraph,
    images: Tensor,
    config: MPTQConfig,
    choices: Choices,
    journal: Journal,
    ahead: Ahead | None = None,
) -> tuple[Problem, Plan]:
    """The search of `config`'s budget, and the plan that it begins with: all free sites at the highest level."""
    if config.budget is None:
        raise ConfigError("no budget given, expected one. Give MPTQConfig(budget=Budget(average_bits=5)).")
    by_latency = config.budget.latency_ms is not None
    levels = (FLOAT_BITS, 8) if by_latency else config.budget.levels
    start, ends = make_plan(graph, config), end_sites(graph)
    free = tuple(name for name in start if name not in ends)
    plan = {name: b if name in ends else stepped((b[0] and 1, 1), 2, levels[0]) for name, b in start.items()}
    # Latency is measured with both sides in float or in 8 bits.
    parts = {name: (2,) if by_latency else parts_of(graph.sites[name]) for name in free}
    candidates = tuple((name, part) for name in free for part in parts[name])
    costs = Costs(graph, config.budget, list(free))
    network = make_network(copy.deepcopy(graph), images, plan, choices)
    return Problem(network, costs, journal, free, levels, candidates, ahead), plan


def probe(problem: Problem, state: State) -> State:
    """Measure every candidate once, well below the start."""
    level = min(problem.levels[1:] or problem.levels, key=lambda value: abs(value - PROBE_BITS))
    increases: dict[Candidate, float] = {}
    _expect(problem, state, (_with(state.plan, candidate, level) for candidate in problem.candidates))
    with Bar("measuring sensitivities", len(problem.candidates)) as bar:
        for candidate in problem.candidates:
            state, loss = _loss(problem, state, _with(state.plan, candidate, level))
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
    if problem.ahead is not None:
        problem.ahead.expect_local(problem.candidates, [level for level in problem.levels if level != FLOAT_BITS])
    heap = [(_score(problem, state, c), i, c) for i, c in enumerate(problem.candidates)]
    heapq.heapify(heap)
    with Bar("Greedy MP", 100) as bar:
        while cost > costs.limit:
            state = _next_step(problem, state, heap, _measure_ahead)
            cost = costs.of(state.plan)
            done = int(100 * (start - cost) / max(start - costs.limit, 1e-12))
            bar.advance(max(0, min(100, done) - bar.done), detail=f"cost {cost:.4g}, loss {state.loss:.3g}")
    return state


def _next_step(problem: Problem, state: State, heap: Heap, measure: Measuring) -> State:
    """The state after the candidate of the least score was looked at: measured, taken, or neither; changes the heap."""
    if not heap:
        costs = problem.costs
        raise ConfigError(
            f"budget {costs.limit:g} can't be met: the lowest levels still cost {costs.of(state.plan):g}. "
            f"Raise it, or allow lower levels than {problem.levels[-1]}."
        )
    _, index, candidate = heapq.heappop(heap)
    level, score = _lower(problem, state, candidate), _score(problem, state, candidate)
    if math.isinf(score) or level is None:
        return state
    if not (heap and score > heap[0][0]):
        if _must_measure(problem, state, candidate, level):
            state = measure(problem, state, candidate, level, heap)
        else:
            state = _take(problem, state, candidate, level)
    heapq.heappush(heap, (_score(problem, state, candidate), index, candidate))
    return state


def _measure_ahead(problem: Problem, state: State, candidate: Candidate, level: int, heap: Heap) -> State:
    """`_measure_step`, while other processes measure what follows if predictions hold."""
    if problem.ahead is not None:
        _expect(problem, state, itertools.islice(_forecast(problem, state, candidate, level, heap), _width(problem)))
    return _measure_step(problem, state, candidate, level)


def _forecast(problem: Problem, state: State, candidate: Candidate, level: int, heap: Heap) -> Iterator[Plan]:
    """The plans that a descent measures from here on, if every increase is the one that is predicted."""
    plans: list[Plan] = []

    def believe(problem: Problem, state: State, candidate: Candidate, level: int, heap: Heap) -> State:
        plans.extend([state.plan] * (state.unmeasured > 0) + [_with(state.plan, candidate, level)])
        increase = _increase(problem, state, candidate, level)
        curve = _learned(state.curves[candidate], level, increase, state.loss)
        return replace(state, curves={**state.curves, candidate: curve}, unmeasured=0.0)

    heap, index = list(heap), problem.candidates.index(candidate)
    state = believe(problem, state, candidate, level, heap)
    heapq.heappush(heap, (_score(problem, state, candidate), index, candidate))
    while heap and problem.costs.of(state.plan) > problem.costs.limit:
        yield from plans
        plans.clear()
        state = _next_step(problem, state, heap, believe)
    yield from plans


def measure_state(problem: Problem, state: State) -> State:
    """Measure the plan so far, where predictions led to it."""
    if state.unmeasured <= 0:
        return state
    before, believed = state.loss - state.unmeasured, state.unmeasured
    state, loss = _loss(problem, state, state.plan)
    errors = (*state.errors, (believed, loss - before))
    return replace(_settled(state), loss=loss, unmeasured=0.0, errors=errors)


def solve(problem: Problem, state: State) -> State:
    """The state with the plan of the integer program on its predictions, where that has the lower measured loss."""
    for _ in range(SOLUTIONS):
        found = least_loss(_choices(problem, state), _limit(problem, state))
        if found is None:
            return state
        plan = {**state.plan, **found}
        guessed = [c for c in problem.candidates if _is_guessed(state, c, _bits(plan, c))]
        if not guessed:
            break
        _expect(problem, state, (_with(state.plan, c, _bits(plan, c)) for c in guessed))
        with Bar("measuring low bits", len(guessed)) as bar:
            for candidate in guessed:
                state = _measure_step(problem, state, candidate, _bits(plan, candidate))
                bar.advance()
    if problem.costs.of(plan) > problem.costs.limit:  # by what HiGHS takes for equal
        return state
    state, loss = _loss(problem, state, plan)
    if loss >= state.loss:
        return state
    note(f"the integer program's plan has a lower loss ({loss:.3g}) than the steps taken: the search goes on from it")
    return _settled(replace(state, plan=plan, loss=loss, is_solution=True))


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
            loss = sum(_increase(problem, state, (name, part), level) for part, level in zip(own, levels, strict=True))
            found.setdefault(name, []).append(Choice(bits, loss, problem.costs.of_site(name, bits)))
    return found


def _limit(problem: Problem, state: State) -> float:
    """What all free sites together may cost: the budget without what costs the same in every plan."""
    free = sum(problem.costs.of_site(name, state.plan[name]) for name in problem.free)
    return problem.costs.limit - (problem.costs.of(state.plan) - free)


def _is_guessed(state: State, candidate: Candidate, level: int) -> bool:
    """Whether a level is one where predictions promise too much, and there is nothing else to go by."""
    is_known = any(measured <= level for measured in state.curves[candidate].increase)
    return level < PROBE_BITS and not is_known and level < _bits(state.plan, candidate)


def at_least_uniform(problem: Problem, state: State) -> State:
    """The state, or the most uniform bits that the budget allows where they have a lower loss.

    The first steps may have led astray: exchanges then go on from what the search is meant to beat.
    """
    for level in problem.levels:
        plan = {n: stepped(b, 2, level) if n in problem.free else b for n, b in state.plan.items()}
        if level != FLOAT_BITS and problem.costs.of(plan) <= problem.costs.limit:
            state, loss = _loss(problem, state, plan)
            if loss < state.loss:
                note(f"uniform bits have a lower loss ({loss:.3g}) than the steps taken: the search goes on from them")
                return _settled(replace(state, plan=plan, loss=loss))
            return state
    return state


def exchange(problem: Problem, state: State) -> State:
    """Give a bit to one tensor and take one from another while that lowers the measured loss."""
    failed, tried = 0, set[str]()
    limit = len(problem.candidates)
    with Bar("exchanging bits", limit) as bar:
        while failed < FAILED_EXCHANGES and bar.done < limit:
            following = list(itertools.islice(_exchanges(problem, state, tried), _width(problem)))
            if not following:
                break
            # Most exchanges fail, and then those after it are tried on the same plan.
            _expect(problem, state, (plan for _, plan in following))
            gain, plan = following[0]
            tried.add(problem.journal.key(plan))
            state, loss = _loss(problem, state, plan)
            bar.advance(detail=f"loss {min(loss, state.loss):.3g}")
            state = replace(state, errors=(*state.errors, (-gain, loss - state.loss)))
            failed = failed + 1 if loss >= state.loss else 0
            if loss < state.loss:
                state = _settled(replace(state, plan=plan, loss=loss, exchanges=state.exchanges + 1))
    return state


def _exchanges(problem: Problem, state: State, tried: set[str]) -> Iterator[tuple[float, Plan]]:
    """Untried pairs of one step up and at most one down within the budget, what promises the most first."""
    levels = {c: (_higher(problem, state, c), _bits(state.plan, c), _lower(problem, state, c)) for c in state.curves}
    ups = [(_rise(problem, state, c, up, bits), c, up) for c, (up, bits, _) in levels.items() if up is not None]
    downs = [
        (_rise(problem, state, c, bits, down), c, down) for c, (_, bits, down) in levels.items() if down is not None
    ]
    options: list[tuple[float, Plan, tuple[Candidate, int] | None]] = []
    for gain, candidate, level in ups:
        plan = _with(state.plan, candidate, level)
        options.append((gain, plan, None))
    for gain, candidate, level in ups:
        plan = _with(state.plan, candidate, level)
        options += [(gain - rise, plan, (other, down)) for rise, other, down in downs if other != candidate]
    for gain, plan, step in sorted((o for o in options if o[0] > 0), key=lambda o: -o[0]):
        plan = plan if step is None else _with(plan, *step)
        if problem.costs.of(plan) <= problem.costs.limit and problem.journal.key(plan) not in tried:
            yield gain, plan


def _loss(problem: Problem, state: State, plan: Plan) -> tuple[State, float]:
    """The loss of a plan, from the journal or by a run, and the state that knows of it."""
    key = problem.journal.key(plan)
    if key in problem.journal.losses:
        return replace(state, from_journal=state.from_journal + 1), problem.journal.losses[key]
    if problem.ahead is None:
        loss, latest = loss_of(problem.network, plan, state.kept)
        state = replace(state, latest=latest, kept=state.kept or latest)
    else:
        loss = problem.ahead.loss(state.plan, plan)
    problem.journal.add(key, loss)
    return replace(state, evaluations=state.evaluations + 1), loss


def _expect(problem: Problem, state: State, plans: Iterable[Plan]) -> None:
    """Let other processes begin with the losses that are likely to be asked for next."""
    if problem.ahead is not None:
        known = problem.journal.losses
        problem.ahead.expect(state.plan, [plan for plan in plans if problem.journal.key(plan) not in known])


def _width(problem: Problem) -> int:
    """How many losses are computed at a time."""
    return 1 if problem.ahead is None else problem.ahead.width


def _settled(state: State) -> State:
    """The state with the values of its own plan kept, where the last run was of that."""
    return replace(state, kept=state.latest) if state.latest and state.latest.plan == state.plan else state


def _take(problem: Problem, state: State, candidate: Candidate, level: int) -> State:
    """The state after a step, with the loss that is predicted."""
    rise = _rise(problem, state, candidate, _bits(state.plan, candidate), level)
    plan, loss = _with(state.plan, candidate, level), state.loss + rise
    step = {"site": candidate[0], "part": candidate[1], "bits": level, "loss": loss, "cost": problem.costs.of(plan)}
    unmeasured = state.unmeasured + max(rise, 1e-15)
    return _settled(replace(state, plan=plan, loss=loss, unmeasured=unmeasured, steps=(*state.steps, step)))


def _measure_step(problem: Problem, state: State, candidate: Candidate, level: int) -> State:
    """The same state, which knows what a candidate's step costs on it."""
    state = measure_state(problem, state)
    bits = _bits(state.plan, candidate)
    predicted = _rise(problem, state, candidate, bits, level)
    state, loss = _loss(problem, state, _with(state.plan, candidate, level))
    increase = loss - state.loss
    over_highest = _increase(problem, state, candidate, bits) + max(increase, 1e-15)
    curve = _learned(state.curves[candidate], level, over_highest, state.loss)
    errors = (*state.errors, (predicted, increase))
    return replace(state, curves={**state.curves, candidate: curve}, errors=errors)


def _learned(curve: Curve, level: int, increase: float, loss: float) -> Curve:
    """A curve with one more measured increase, without those that it contradicts: lower levels are never better."""
    found = {
        other: value
        for other, value in curve.increase.items()
        if not (other < level and value < increase) and not (other > level and value > increase)
    }
    return Curve({**found, level: increase}, {**curve.state, level: loss})


def _must_measure(problem: Problem, state: State, candidate: Candidate, level: int) -> bool:
    """Whether a step is too low, or the state too uncertain, to go by predictions."""
    if level < PROBE_BITS:
        return state.loss > STALE * max(state.curves[candidate].state.get(level, 0.0), 1e-12)
    rise = _rise(problem, state, candidate, _bits(state.plan, candidate), level)
    return state.unmeasured > 0 and state.unmeasured + rise > TRUST * max(state.loss, 1e-6)


def _score(problem: Problem, state: State, candidate: Candidate) -> float:
    """Increase of the loss by the next step down over the cost saved; infinite where there is none."""
    level = _lower(problem, state, candidate)
    if level is None:
        return math.inf
    saved = problem.costs.saved(state.plan, candidate, level)
    rise = max(_rise(problem, state, candidate, _bits(state.plan, candidate), level), 1e-15)
    return rise / saved if saved > 0 else math.inf


def _rise(problem: Problem, state: State, candidate: Candidate, level: int, to: int) -> float:
    """Increase of the loss by going from one level down to another; never negative."""
    return max(_increase(problem, state, candidate, to) - _increase(problem, state, candidate, level), 0.0)


def _increase(problem: Problem, state: State, candidate: Candidate, level: int) -> float:
    """Increase of the loss over the highest level: measured, or by the local error from the nearest measured level."""
    measured = state.curves[candidate].increase
    if level in measured:
        return measured[level]
    error = _local_above(problem, candidate, level)
    if error <= 0:
        return 0.0
    below = [m for m in measured if m < level]
    anchor = max(below) if below else min(measured)
    return measured[anchor] * error / max(_local_above(problem, candidate, anchor), 1e-30)


def _local_above(problem: Problem, candidate: Candidate, bits: int) -> float:
    """Squared output error of a site at some bits, above that at the highest level."""
    if (candidate, bits) not in problem.local:
        highest = problem.levels[0]
        top = 0.0 if highest == FLOAT_BITS else _local_error(problem, candidate, highest)
        own = top if bits == highest else _local_error(problem, candidate, bits)
        problem.local[candidate, bits] = max(own - top, 0.0)
    return problem.local[candidate, bits]


def _local_error(problem: Problem, candidate: Candidate, bits: int) -> float:
    if problem.ahead is None:
        return local_error(problem.network, *candidate, bits)
    return problem.ahead.local_error(candidate, bits)


def _bits(plan: Plan, candidate: Candidate) -> int:
    name, part = candidate
    return plan[name][1] if part == 2 else plan[name][part]


def _lower(problem: Problem, state: State, candidate: Candidate) -> int | None:
    """The next level down, None at the lowest."""
    return next((level for level in problem.levels if level < _bits(state.plan, candidate)), None)


def _higher(problem: Problem, state: State, candidate: Candidate) -> int | None:
    """The next level up, None at the highest."""
    return next((level for level in reversed(problem.levels) if level > _bits(state.plan, candidate)), None)


def _with(plan: Plan, candidate: Candidate, level: int) -> Plan:
    name, part = candidate
    return {**plan, name: stepped(plan[name], part, level)}


def _report(problem: Problem, state: State) -> dict[str, Any]:
    levels = [level for level in problem.levels if level not in (FLOAT_BITS, problem.levels[0])]
    # Levels that the search never looked at have no quantizer, and no number.
    sensitivities = [
        {"site": name, "part": part,
         "loss": {str(b): _increase(problem, state, (name, part), b) for b in levels
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
