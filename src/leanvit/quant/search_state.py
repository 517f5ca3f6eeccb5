"""Where a search of bits is: what was measured, what that predicts of steps not taken, and the steps themselves.

Values that each step replaces; the stages that take them are in leanvit.quant.greedy_mp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from leanvit.quant.costs import Candidate, Costs, stepped
from leanvit.quant.elsewhere import Losses
from leanvit.quant.journal import Journal
from leanvit.quant.plan import FLOAT_BITS, Plan

PROBE_BITS = 4
"""Level at which candidates are first measured: far enough down to stand out of the noise."""

TRUST = 0.1
"""Share of the loss that predicted steps may add before the state is measured: predictions are off by up to twice,
so that the loss is known to a fifth."""

STALE = 1.5
"""Growth of the loss after which a measured increase is no longer believed."""


@dataclass(frozen=True)
class Problem:
    """What stays the same during a search.

    free: sites whose bits may change. levels: bits, highest first. candidates: every part of every free site.
    losses: of plans and of single tensors, computed in this process or in others. local: squared output errors by
    candidate and level, above those of the highest, filled when first asked for.
    """

    losses: Losses
    costs: Costs
    journal: Journal
    free: tuple[str, ...]
    levels: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    local: dict[tuple[Candidate, int], float] = field(default_factory=dict)


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
    steps: taken, for the report. errors: (predicted, measured) increases. evaluations: runs of the network;
    from_journal: losses that were known.
    is_solution: whether the search went on from the plan of the integer program.
    """

    plan: Plan
    loss: float = 0.0
    unmeasured: float = 0.0
    curves: dict[Candidate, Curve] = field(default_factory=dict)
    steps: tuple[dict[str, Any], ...] = ()
    errors: tuple[tuple[float, float], ...] = ()
    evaluations: int = 0
    from_journal: int = 0
    exchanges: int = 0
    is_solution: bool = False


def measure_state(problem: Problem, state: State) -> State:
    """Measure the plan so far, where predictions led to it."""
    if state.unmeasured <= 0:
        return state
    before, believed = state.loss - state.unmeasured, state.unmeasured
    state, loss = loss_of_plan(problem, state, state.plan)
    errors = (*state.errors, (believed, loss - before))
    return replace(state, loss=loss, unmeasured=0.0, errors=errors)


def loss_of_plan(problem: Problem, state: State, plan: Plan) -> tuple[State, float]:
    """The loss of a plan, from the journal or by a run, and the state that knows of it."""
    key = problem.journal.key(plan)
    if key in problem.journal.losses:
        return replace(state, from_journal=state.from_journal + 1), problem.journal.losses[key]
    loss = problem.losses.loss(plan)
    problem.journal.add(key, loss)
    return replace(state, evaluations=state.evaluations + 1), loss


def losses_of_plans(problem: Problem, state: State, plans: Sequence[Plan]) -> Iterator[tuple[State, float]]:
    """`loss_of_plan` of plans that are known from the start: other processes need not wait between them."""
    keys = [problem.journal.key(plan) for plan in plans]
    missing = {key: plan for key, plan in zip(keys, plans, strict=True) if key not in problem.journal.losses}
    computed = iter(problem.losses.losses(list(missing.values())))
    for key in keys:
        if key in problem.journal.losses:
            state = replace(state, from_journal=state.from_journal + 1)
        else:
            problem.journal.add(key, next(computed))
            state = replace(state, evaluations=state.evaluations + 1)
        yield state, problem.journal.losses[key]


def take_step(problem: Problem, state: State, candidate: Candidate, level: int) -> State:
    """The state after a step, with the loss that is predicted."""
    rise = rise_of(problem, state, candidate, bits_of(state.plan, candidate), level)
    plan, loss = with_level(state.plan, candidate, level), state.loss + rise
    step = {"site": candidate[0], "part": candidate[1], "bits": level, "loss": loss, "cost": problem.costs.of(plan)}
    unmeasured = state.unmeasured + max(rise, 1e-15)
    return replace(state, plan=plan, loss=loss, unmeasured=unmeasured, steps=(*state.steps, step))


def measure_step(problem: Problem, state: State, candidate: Candidate, level: int) -> State:
    """The same state, which knows what a candidate's step costs on it."""
    state = measure_state(problem, state)
    bits = bits_of(state.plan, candidate)
    predicted = rise_of(problem, state, candidate, bits, level)
    state, loss = loss_of_plan(problem, state, with_level(state.plan, candidate, level))
    increase = loss - state.loss
    over_highest = increase_of(problem, state, candidate, bits) + max(increase, 1e-15)
    curve = learned_curve(state.curves[candidate], level, over_highest, state.loss)
    errors = (*state.errors, (predicted, increase))
    return replace(state, curves={**state.curves, candidate: curve}, errors=errors)


def learned_curve(curve: Curve, level: int, increase: float, loss: float) -> Curve:
    """A curve with one more measured increase, without those that it contradicts: lower levels are never better."""
    found = {
        other: value
        for other, value in curve.increase.items()
        if not (other < level and value < increase) and not (other > level and value > increase)
    }
    return Curve({**found, level: increase}, {**curve.state, level: loss})


def must_measure(problem: Problem, state: State, candidate: Candidate, level: int) -> bool:
    """Whether a step is too low, or the state too uncertain, to go by predictions."""
    if level < PROBE_BITS:
        return state.loss > STALE * max(state.curves[candidate].state.get(level, 0.0), 1e-12)
    rise = rise_of(problem, state, candidate, bits_of(state.plan, candidate), level)
    return state.unmeasured > 0 and state.unmeasured + rise > TRUST * max(state.loss, 1e-6)


def score_of(problem: Problem, state: State, candidate: Candidate) -> float:
    """Increase of the loss by the next step down over the cost saved; infinite where there is none."""
    level = lower_level(problem, state, candidate)
    if level is None:
        return math.inf
    saved = problem.costs.saved(state.plan, candidate, level)
    rise = max(rise_of(problem, state, candidate, bits_of(state.plan, candidate), level), 1e-15)
    return rise / saved if saved > 0 else math.inf


def rise_of(problem: Problem, state: State, candidate: Candidate, level: int, to: int) -> float:
    """Increase of the loss by going from one level down to another; never negative."""
    return max(increase_of(problem, state, candidate, to) - increase_of(problem, state, candidate, level), 0.0)


def increase_of(problem: Problem, state: State, candidate: Candidate, level: int) -> float:
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
        top = 0.0 if highest == FLOAT_BITS else problem.losses.local_error(candidate, highest)
        own = top if bits == highest else problem.losses.local_error(candidate, bits)
        problem.local[candidate, bits] = max(own - top, 0.0)
    return problem.local[candidate, bits]


def bits_of(plan: Plan, candidate: Candidate) -> int:
    name, part = candidate
    return plan[name][1] if part == 2 else plan[name][part]


def lower_level(problem: Problem, state: State, candidate: Candidate) -> int | None:
    """The next level down, None at the lowest."""
    return next((level for level in problem.levels if level < bits_of(state.plan, candidate)), None)


def higher_level(problem: Problem, state: State, candidate: Candidate) -> int | None:
    """The next level up, None at the highest."""
    return next((level for level in reversed(problem.levels) if level > bits_of(state.plan, candidate)), None)


def with_level(plan: Plan, candidate: Candidate, level: int) -> Plan:
    name, part = candidate
    return {**plan, name: stepped(plan[name], part, level)}
