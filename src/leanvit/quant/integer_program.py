"""The bits of least loss within a budget, where every site's share of loss and cost is known and shares add up.

An integer program (a knapsack in which every site takes one of its choices), solved by HiGHS through scipy. Losses of
sites don't quite add up, so its optimum is no better than its prices: Greedy MP measures what it proposes, and reports
how far the plan that is kept is from it (LampQ and MixFrag allocate bits so).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Bits = tuple[int, int]

RELATIVE_GAP = 1e-4
"""Of the optimum: HiGHS may stop here, in a second for 200 sites; what it proposes is measured anyway."""

NODES = 20_000
"""Of HiGHS's tree, at most: bounded by work and not by time, so that the same problem has the same answer."""


@dataclass(frozen=True)
class Choice:
    """What a site may have, the loss that it then adds (nats, not negative) and what it costs (units of the budget)."""

    bits: Bits
    loss: float
    cost: float


def least_loss(sites: Mapping[str, Sequence[Choice]], limit: float) -> dict[str, Bits] | None:
    """One choice a site, of the least sum of losses whose sum of costs is within `limit`; None where there is none."""
    names = [name for name, choices in sites.items() for _ in choices]
    choices = [choice for own in sites.values() for choice in own]
    losses, costs = (np.array(values) for values in ([c.loss for c in choices], [c.cost for c in choices]))
    rows = {name: row for row, name in enumerate(sites)}
    one_each = coo_array((np.ones(len(choices)), ([rows[name] for name in names], range(len(choices)))))
    # HiGHS compares with absolute tolerances of 1e-6 or so: losses and costs as shares of what they sum up to.
    loss_unit, cost_unit = (max(float(np.abs(values).sum()) / len(sites), 1e-30) for values in (losses, costs))
    found = milp(
        losses / loss_unit,
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(costs[None] / cost_unit, -np.inf, limit / cost_unit),
        ],
        # With presolve the HiGHS of scipy 1.17 writes to the process's stdout, where verbs write JSON.
        options={"mip_rel_gap": RELATIVE_GAP, "node_limit": NODES, "presolve": False},
    )
    if found.x is None:
        return None
    return {names[index]: choices[index].bits for index in np.flatnonzero(found.x > 0.5)}


def sum_of_losses(sites: Mapping[str, Sequence[Choice]], plan: Mapping[str, Bits]) -> float:
    """What the choices of a plan add up to, in nats."""
    return sum(choice.loss for name, own in sites.items() for choice in own if choice.bits == tuple(plan[name]))
