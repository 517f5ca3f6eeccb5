"""Greedy MP: bits for every site within a budget, found by giving up what costs the answers least.

From all sites at the highest level, the next step down is the one with the least

    score = increase of the loss / cost saved

(MPTQ-ViT, arXiv 2401.14895; NetAdapt, arXiv 1804.03230). The loss is the KL divergence of the quantized from
the float answers on calibration images. What keeps the search short (ours): every candidate is measured once, at
PROBE_BITS; its local output error tells the levels above from that. Below, where local errors promise too much,
no step is taken that was not measured on the state it is taken from. At the end, bits are exchanged between
pairs of tensors as long as that lowers the measured loss. The network runs from the changed site on. Every
evaluation is written to a journal, from which a killed search goes on.
"""

from __future__ import annotations

import copy
import functools
import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from leanvit.config import Budget, MPTQConfig
from leanvit.errors import ConfigError
from leanvit.progress import Bar, note
from leanvit.quant.calibrate import Choices
from leanvit.quant.costs import Candidate, Costs, stepped
from leanvit.quant.evaluate import Evaluator
from leanvit.quant.graph import QuantGraph, end_sites
from leanvit.quant.journal import Journal
from leanvit.quant.plan import FLOAT_BITS, Plan, make_plan, parts_of

PROBE_BITS = 4
"""Level at which candidates are first measured: far enough down to stand out of the noise."""

TRUST = 0.1
"""Share of the loss that predicted steps may add before the state is measured."""

STALE = 1.5
"""Growth of the loss after which a measured increase is no longer believed."""

LEAST_SHARE = 0.01
"""Of the median increase: what a candidate is believed to cost at least, as no bits are free."""

FAILED_EXCHANGES = 12
"""Exchanges in a row that may fail to lower the loss before the search ends."""


@dataclass
class Search:
    """What a search did, for the report.

    steps: one entry each: site, part, bits, loss (predicted or measured), cost. evaluations: runs of the network.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: int = 0
    from_journal: int = 0
    exchanges: int = 0


@dataclass
class Curve:
    """What is known of the loss that one candidate adds at each level.

    measured: {level: increase over the highest level}. state: loss of the network when each was measured.
    local_error: squared output error of the site at a level; asked for once each, as a quantizer is searched for it.
    """

    local_error: Callable[[int], float]
    measured: dict[int, float] = field(default_factory=dict)
    state: dict[int, float] = field(default_factory=dict)
    local: dict[int, float] = field(default_factory=dict)

    def error(self, level: int) -> float:
        """Squared output error of the site at a level."""
        if level not in self.local:
            self.local[level] = self.local_error(level)
        return self.local[level]

    def at(self, level: int) -> float:
        """Increase of the loss at a level: measured, or from the nearest measured level by the local error."""
        if level in self.measured:
            return self.measured[level]
        if self.error(level) <= 0:
            return 0.0
        below = [m for m in self.measured if m < level]
        anchor = max(below) if below else min(self.measured)
        return self.measured[anchor] * self.error(level) / max(self.error(anchor), 1e-30)

    def rise(self, level: int, to: int) -> float:
        """Increase of the loss by going from one level down to another; never negative."""
        return max(self.at(to) - self.at(level), 0.0)

    def learn(self, level: int, increase: float, state: float) -> None:
        """Take in a measured increase over the highest level, keeping lower levels worse than higher ones."""
        self.measured[level], self.state[level] = increase, state
        for other in list(self.measured):
            if (other < level and self.measured[other] < increase) or (
                other > level and self.measured[other] > increase
            ):
                del self.measured[other]


def allocate(
    graph: QuantGraph, images: Tensor, config: MPTQConfig, choices: Choices, journal: str | Path | None = None
) -> tuple[Plan, dict[str, Any]]:
    """A plan within the budget of `config` by Greedy MP (see the module).

    graph: float, smoothed, without quantizers. images: (N, 3, H, W) calibration images.
    Returns the plan and, for the report: evaluations, sensitivities by site, the Pareto curve, estimate errors.
    Raises ConfigError where even the lowest levels exceed the budget.
    """
    if config.budget is None:
        raise ConfigError("no budget given, expected one. Give MPTQConfig(budget=Budget(average_bits=5)).")
    greedy = Greedy(graph, images, config, choices, Journal(journal, graph, images, config))
    return greedy.run()


class Greedy:
    """The state of one search."""

    def __init__(
        self, graph: QuantGraph, images: Tensor, config: MPTQConfig, choices: Choices, journal: Journal
    ) -> None:
        self.budget = config.budget or Budget(average_bits=8)
        self.journal = journal
        self.levels = (FLOAT_BITS, 8) if self.budget.latency_ms is not None else self.budget.levels
        start = make_plan(graph, config)
        ends = end_sites(graph)
        self.free = [name for name in start if name not in ends]
        self.plan: Plan = {
            name: bits if name in ends else stepped((bits[0] and 1, 1), 2, self.levels[0])
            for name, bits in start.items()
        }
        self.costs = Costs(graph, self.budget, self.free)
        self.evaluator = Evaluator(copy.deepcopy(graph), images, self.plan, choices)
        self.search = Search()
        self.loss = self._evaluate(self.plan)
        self.curves: dict[Candidate, Curve] = {}
        self.unmeasured = 0.0
        self.errors: list[tuple[float, float]] = []

    def run(self) -> tuple[Plan, dict[str, Any]]:
        """Step down until the budget holds, then exchange."""
        self._probe_all()
        self._descend()
        self._measure_state()
        uniform = self._best_uniform()
        if uniform is not None and uniform[0] < self.loss:
            # Led astray by the first steps: exchanges go on from what the search is meant to beat.
            self.loss, self.plan, changed = uniform
            self.evaluator.accept(self.plan, *changed)
            note(f"uniform bits have a lower loss ({self.loss:.3g}) than the steps taken: the search goes on from them")
        self._exchange()
        kept = {name: bits for name, bits in self.plan.items() if bits[1] != FLOAT_BITS}
        return kept, self._report(self.costs.of(self.plan))

    def _probe_all(self) -> None:
        """Measure every candidate once, well below the start."""
        candidates = [(name, part) for name in self.free for part in self._parts(name)]
        with Bar("measuring sensitivities", len(candidates)) as bar:
            for candidate in candidates:
                level = min(self.levels[1:] or self.levels, key=lambda value: abs(value - PROBE_BITS))
                increase = self._evaluate(self._with(candidate, level), candidate[0]) - self.loss
                above = functools.partial(self._local_above, candidate)
                self.curves[candidate] = Curve(above, {level: increase}, {level: self.loss})
                bar.advance()
        rises = sorted(max(i, 0.0) for curve in self.curves.values() for i in curve.measured.values())
        least = max(LEAST_SHARE * rises[len(rises) // 2], 1e-12) if rises else 1e-12
        for curve in self.curves.values():
            for level, increase in curve.measured.items():
                curve.measured[level] = max(increase, least)

    def _descend(self) -> None:
        """Take the step of the least score again and again until the budget holds."""
        start, limit = self.costs.of(self.plan), self.costs.limit
        heap = [(self._score(c), i, c) for i, c in enumerate(self.curves)]
        heapq.heapify(heap)
        cost = start
        with Bar("Greedy MP", 100) as bar:
            while cost > limit:
                _, index, candidate = self._pop(heap, cost)
                level, score = self._next(candidate), self._score(candidate)
                if math.isinf(score) or level is None:
                    continue
                if heap and score > heap[0][0]:
                    heapq.heappush(heap, (score, index, candidate))
                    continue
                if self._must_measure(candidate, level):
                    self._measure(candidate, level)
                    heapq.heappush(heap, (self._score(candidate), index, candidate))
                    continue
                self._accept(candidate, level)
                cost = self.costs.of(self.plan)
                heapq.heappush(heap, (self._score(candidate), index, candidate))
                done = 100 * (start - cost) / max(start - limit, 1e-12)
                bar.advance(max(0, min(100, int(done)) - bar.done), detail=f"cost {cost:.4g}, loss {self.loss:.3g}")

    def _pop(self, heap: list[tuple[float, int, Candidate]], cost: float) -> tuple[float, int, Candidate]:
        if not heap:
            raise ConfigError(
                f"budget {self.costs.limit:g} can't be met: the lowest levels still cost {cost:g}. "
                f"Raise it, or allow lower levels than {self.levels[-1]}."
            )
        return heapq.heappop(heap)

    def _best_uniform(self) -> tuple[float, Plan, list[str]] | None:
        """The most uniform bits that the budget allows: loss, plan, sites that differ; None where it allows none."""
        for level in self.levels:
            plan = {n: stepped(b, 2, level) if n in self.free else b for n, b in self.plan.items()}
            if level != FLOAT_BITS and self.costs.of(plan) <= self.costs.limit:
                # Named as changes: a run without them would leave the evaluator in this plan.
                changed = [name for name, bits in plan.items() if bits != self.plan[name]]
                return self._evaluate(plan, *changed), plan, changed
        return None

    def _parts(self, name: str) -> tuple[int, ...]:
        return (2,) if self.budget.latency_ms is not None else parts_of(self.evaluator.graph.sites[name])

    def _bits(self, candidate: Candidate) -> int:
        name, part = candidate
        return self.plan[name][1] if part == 2 else self.plan[name][part]

    def _next(self, candidate: Candidate) -> int | None:
        lower = [level for level in self.levels if level < self._bits(candidate)]
        return lower[0] if lower else None

    def _local_above(self, candidate: Candidate, bits: int) -> float:
        """Squared output error of a site at some bits, above that at the highest level."""
        if bits == self.levels[0]:
            return 0.0
        top = 0.0 if self.levels[0] == FLOAT_BITS else self.evaluator.local_error(candidate, self.levels[0])
        return max(self.evaluator.local_error(candidate, bits) - top, 0.0)

    def _score(self, candidate: Candidate) -> float:
        level = self._next(candidate)
        if level is None:
            return math.inf
        saved = self.costs.saved(self.plan, candidate, level)
        rise = max(self.curves[candidate].rise(self._bits(candidate), level), 1e-15)
        return rise / saved if saved > 0 else math.inf

    def _must_measure(self, candidate: Candidate, level: int) -> bool:
        """Whether a step is too low, or the state too uncertain, to go by predictions."""
        curve = self.curves[candidate]
        if level < PROBE_BITS:
            return self.loss > STALE * max(curve.state.get(level, 0.0), 1e-12)
        rise = curve.rise(self._bits(candidate), level)
        return self.unmeasured > 0 and self.unmeasured + rise > TRUST * max(self.loss, 1e-6)

    def _measure(self, candidate: Candidate, level: int) -> None:
        """Measure a candidate's step on the current state."""
        self._measure_state()
        curve, bits = self.curves[candidate], self._bits(candidate)
        predicted = curve.rise(bits, level)
        increase = self._evaluate(self._with(candidate, level), candidate[0]) - self.loss
        self.errors.append((predicted, increase))
        curve.learn(level, curve.at(bits) + max(increase, 1e-15), self.loss)

    def _measure_state(self) -> None:
        """Measure the plan so far."""
        if self.unmeasured > 0:
            before, believed = self.loss - self.unmeasured, self.unmeasured
            self.loss = self._evaluate(self.plan)
            self.errors.append((believed, self.loss - before))
            self.unmeasured = 0.0

    def _accept(self, candidate: Candidate, level: int) -> None:
        rise = self.curves[candidate].rise(self._bits(candidate), level)
        self.plan = self._with(candidate, level)
        self.loss += rise
        self.unmeasured += max(rise, 1e-15)
        self.evaluator.accept(self.plan, candidate[0])
        self.search.steps.append(
            {"site": candidate[0], "part": candidate[1], "bits": level, "loss": self.loss,
             "cost": self.costs.of(self.plan)}
        )  # fmt: skip

    def _exchange(self) -> None:
        """Give a bit to one tensor and take one from another while that lowers the measured loss."""
        failed, tried = 0, set[str]()
        limit = len(self.curves)
        with Bar("exchanging bits", limit) as bar:
            while failed < FAILED_EXCHANGES and bar.done < limit:
                found = self._best_exchange(tried)
                if found is None:
                    break
                gain, plan, changed = found
                tried.add(self.journal.key(plan))
                loss = self._evaluate(plan, *changed)
                bar.advance(detail=f"loss {min(loss, self.loss):.3g}")
                self.errors.append((-gain, loss - self.loss))
                failed = failed + 1 if loss >= self.loss else 0
                if loss < self.loss:
                    self.loss, self.plan = loss, plan
                    self.evaluator.accept(plan, *changed)
                    self.search.exchanges += 1

    def _best_exchange(self, tried: set[str]) -> tuple[float, Plan, list[str]] | None:
        """The untried pair of one step up and at most one down that promises the most within the budget."""
        ups = [(self._gain_up(c), c) for c in self.curves if self._previous(c) is not None]
        downs = [(self._rise_down(c), c) for c in self.curves if self._next(c) is not None]
        options: list[tuple[float, Candidate, Candidate | None]] = [(gain, up, None) for gain, up in ups]
        options += [(gain - rise, up, down) for gain, up in ups for rise, down in downs if up != down]
        for gain, up, down in sorted((o for o in options if o[0] > 0), key=lambda o: -o[0]):
            plan = self._raised(up)
            if down is not None:
                level = self._next(down)
                plan = {**plan, down[0]: stepped(plan[down[0]], down[1], level or self.levels[-1])}
            if self.costs.of(plan) <= self.costs.limit and self.journal.key(plan) not in tried:
                return gain, plan, [up[0]] if down is None else [up[0], down[0]]
        return None

    def _previous(self, candidate: Candidate) -> int | None:
        higher = [level for level in self.levels if level > self._bits(candidate)]
        return higher[-1] if higher else None

    def _raised(self, candidate: Candidate) -> Plan:
        return self._with(candidate, self._previous(candidate) or self.levels[0])

    def _gain_up(self, candidate: Candidate) -> float:
        return self.curves[candidate].rise(self._previous(candidate) or self.levels[0], self._bits(candidate))

    def _rise_down(self, candidate: Candidate) -> float:
        return self.curves[candidate].rise(self._bits(candidate), self._next(candidate) or self.levels[-1])

    def _with(self, candidate: Candidate, level: int) -> Plan:
        name, part = candidate
        return {**self.plan, name: stepped(self.plan[name], part, level)}

    def _evaluate(self, plan: Plan, *changed: str) -> float:
        key = self.journal.key(plan)
        if key in self.journal.losses:
            self.search.from_journal += 1
            return self.journal.losses[key]
        loss = self.evaluator.loss(plan, *changed)
        self.search.evaluations += 1
        self.journal.add(key, loss)
        return loss

    def _report(self, cost: float) -> dict[str, Any]:
        levels = [level for level in self.levels if level not in (FLOAT_BITS, self.levels[0])]
        # Levels that the search never looked at have no quantizer, and no number.
        sensitivities = [
            {"site": name, "part": part,
             "loss": {str(b): curve.at(b) for b in levels if b in curve.local or b in curve.measured}}
            for (name, part), curve in self.curves.items()
        ]  # fmt: skip
        ratios = sorted(measured / predicted for predicted, measured in self.errors if predicted > 0)
        return {
            "evaluations": self.search.evaluations,
            "from_journal": self.search.from_journal,
            "candidates": len(self.curves),
            "exchanges": self.search.exchanges,
            "steps": self.search.steps,
            "loss": self.loss,
            "cost": cost,
            "limit": self.costs.limit,
            "estimate_ratio_median": ratios[len(ratios) // 2] if ratios else None,
            "measured_steps": len(ratios),
            "sensitivities": sensitivities,
        }


Loss = Callable[[Plan], float]


def plain_greedy(plan: Plan, candidates: list[Candidate], levels: tuple[int, ...], costs: Costs, loss: Loss) -> Plan:
    """The search as published, every candidate measured at every step: the reference for `allocate`.

    plan: the start. loss: evaluates a plan. Returns the plan within the budget.
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
