"""Losses that others compute beside a search: journal and plan are those of the search alone, in whatever order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import MPTQConfig, quantize
from leanvit.config import Budget
from leanvit.quant.costs import Candidate
from leanvit.quant.graph import Measure
from leanvit.quant.mptq import PlanLosses
from leanvit.quant.plan import Plan


def images(count: int = 12) -> Tensor:
    """Smooth random pictures, normalised."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model


class Backwards:
    """Computes what is expected at once, the last first, as if it came over a network."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.asked: list[str] = []
        self.surprises = 0
        self.known: dict[str, float] = {}
        self.local: dict[Candidate, dict[int, float]] = {}

    def begin(
        self, model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None = None
    ) -> None:
        self.losses = PlanLosses(model, batches, config, measure)

    def expect(self, plans: Sequence[Plan]) -> None:
        for plan in reversed(plans):
            if json.dumps(plan) not in self.known:
                self.known[json.dumps(plan)] = self.losses.loss(plan)

    def loss(self, plan: Plan) -> float:
        self.asked.append(json.dumps(plan))
        if json.dumps(plan) not in self.known:
            self.surprises += 1
            self.known[json.dumps(plan)] = self.losses.loss(plan)
        return self.known[json.dumps(plan)]

    def expect_local(self, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
        for candidate in reversed(candidates):
            self.local[candidate] = self.losses.local_errors(candidate, levels)

    def local_error(self, candidate: Candidate, bits: int) -> float:
        return self.local[candidate][bits]


def searched(model: nn.Module, journal: Path, ahead: Any = None, **scheme: Any) -> tuple[bytes, dict[str, Any], Plan]:
    config = MPTQConfig(**{"budget": Budget(average_bits=4), **scheme})
    found = quantize(model, images(), config, journal=journal, ahead=ahead)
    return journal.read_bytes(), found.report["search"], found.plan


@pytest.mark.parametrize("scheme", [{}, {"mode": "best", "passes": ("balance", "rotate")}, {"scope": "full"}])
def test_journal_plan_and_report_are_those_of_a_search_alone(
    model: nn.Module, tmp_path: Path, scheme: dict[str, Any]
) -> None:
    alone = searched(model, tmp_path / "alone.jsonl", **scheme)
    for width in (1, 3):
        ahead = Backwards(width)
        assert searched(model, tmp_path / f"{width}.jsonl", ahead, **scheme) == alone
        assert len(ahead.asked) == len(alone[0].splitlines())


def test_most_of_what_a_search_asks_for_was_expected(model: nn.Module, tmp_path: Path) -> None:
    ahead = Backwards(2)
    searched(model, tmp_path / "journal.jsonl", ahead)
    assert ahead.surprises <= len(ahead.asked) // 10
    # What nobody asks for in the end is at most a third: processes that guess wrongly are no help.
    assert len(ahead.known) <= 1.5 * len(set(ahead.asked))


def test_a_search_goes_on_from_its_journal_and_asks_for_nothing_twice(model: nn.Module, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    whole, _, plan = searched(model, journal)
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20] + b"\n")
    ahead = Backwards(2)
    _, _, again = searched(model, journal, ahead)
    assert again == plan
    assert len(ahead.asked) == len(lines) - len(lines) // 2
