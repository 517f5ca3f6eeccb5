"""Losses that others compute beside a search: journal and plan are those of the search alone, in whatever order."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import leanvit.models  # noqa: F401 - registers our architectures
from leanvit import MPTQConfig, quantize
from leanvit.config import Budget
from leanvit.quant import evaluate
from leanvit.quant.costs import Candidate
from leanvit.quant.evaluate import made_for
from leanvit.quant.graph import Measure
from leanvit.quant.losses import divergence, joined
from leanvit.quant.mptq import plan_losses
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


class Shares:
    """Computes every loss by several networks, each of which has some of the images; the last first."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.asked: list[str] = []
        self.local: dict[Candidate, dict[int, float]] = {}

    def begin(
        self, model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None = None
    ) -> None:
        self.own = [plan_losses(model, batches, config) for _ in range(self.width)]

    def loss(self, plan: Plan) -> float:
        self.asked.append(json.dumps(plan))
        found = {}
        for index, losses in reversed(list(enumerate(self.own))):
            parts = range(index, len(losses.network.parts), self.width)
            found |= dict(zip(parts, losses.outputs(plan, parts), strict=True))
        return divergence(self.own[0].network.truth, joined(found[part] for part in sorted(found)))

    def losses(self, plans: Sequence[Plan]) -> Iterator[float]:
        last_first = [self.loss(plan) for plan in reversed(plans)]
        return reversed(last_first)

    def prepare(self, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
        for candidate in reversed(candidates):
            self.local[candidate] = {level: self.own[-1].local_error(candidate, level) for level in levels}
            made = made_for(self.own[-1].network, candidate, levels)
            assert len(made) == len(levels)
            for losses in self.own:
                losses.network.made.update(made)

    def local_error(self, candidate: Candidate, bits: int) -> float:
        return self.local[candidate][bits]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images in four parts."""
    monkeypatch.setattr(evaluate, "PART_MACS", 0)


def searched(
    model: nn.Module, journal: Path, elsewhere: Any = None, **scheme: Any
) -> tuple[bytes, dict[str, Any], Plan]:
    config = MPTQConfig(**{"budget": Budget(average_bits=4), **scheme})
    found = quantize(model, images(), config, journal=journal, elsewhere=elsewhere)
    return journal.read_bytes(), found.report["search"], found.plan


@pytest.mark.parametrize("scheme", [{}, {"mode": "best", "passes": ("balance", "rotate")}, {"scope": "full"}])
def test_journal_plan_and_report_are_those_of_a_search_alone(
    model: nn.Module, tmp_path: Path, scheme: dict[str, Any]
) -> None:
    alone = searched(model, tmp_path / "alone.jsonl", **scheme)
    elsewhere = Shares(3)
    assert searched(model, tmp_path / "shared.jsonl", elsewhere, **scheme) == alone
    assert len(elsewhere.asked) == len(alone[0].splitlines())


def test_a_search_goes_on_from_its_journal_and_asks_for_nothing_twice(model: nn.Module, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    whole, _, plan = searched(model, journal)
    lines = whole.splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[len(lines) // 2][:20] + b"\n")
    elsewhere = Shares(2)
    _, _, again = searched(model, journal, elsewhere)
    assert again == plan
    assert len(elsewhere.asked) == len(lines) - len(lines) // 2
