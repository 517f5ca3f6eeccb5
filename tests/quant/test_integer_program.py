"""The integer program that allocates bits: the optimum that trying everything finds."""

from __future__ import annotations

import itertools

import hypothesis
from hypothesis import strategies as st

from leanvit.quant.integer_program import Choice, least_loss, sum_of_losses

LEVELS = ((8, 8), (6, 6), (4, 4), (3, 3))
prices = st.lists(st.tuples(st.floats(1e-6, 1.0), st.floats(0.5, 100.0)), min_size=len(LEVELS), max_size=len(LEVELS))


def program(prices: list[list[tuple[float, float]]]) -> dict[str, list[Choice]]:
    """Sites with these losses and costs of the levels."""
    return {
        f"site {number}": [Choice(bits, loss, cost) for bits, (loss, cost) in zip(LEVELS, own, strict=True)]
        for number, own in enumerate(prices)
    }


@hypothesis.given(st.lists(prices, min_size=1, max_size=5), st.floats(0.0, 1.2))
@hypothesis.settings(max_examples=60)
def test_no_plan_within_the_limit_has_a_lower_sum(values: list[list[tuple[float, float]]], share: float) -> None:
    sites = program(values)
    limit = share * sum(max(choice.cost for choice in own) for own in sites.values())
    within = [
        sum(choice.loss for choice in plan)
        for plan in itertools.product(*sites.values())
        if sum(choice.cost for choice in plan) <= limit
    ]
    found = least_loss(sites, limit)
    if found is None:
        assert not within
        return
    costs = {name: next(c.cost for c in sites[name] if c.bits == bits) for name, bits in found.items()}
    assert sum(costs.values()) <= limit * (1 + 1e-5)
    assert sum_of_losses(sites, found) <= min(within, default=float("inf")) * (1 + 2e-4)


def test_every_site_has_one_choice() -> None:
    sites = program([[(0.1, 4.0), (0.2, 3.0), (0.3, 2.0), (0.4, 1.0)]] * 3)
    found = least_loss(sites, 6.0)
    assert found is not None
    assert set(found) == set(sites)
