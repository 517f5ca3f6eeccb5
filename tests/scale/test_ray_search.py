"""Greedy MP with its losses on Ray: journal and plan of a search alone, also where a process of it is killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common import Outcome
from leanvit import MPTQConfig, quantize
from leanvit.config import Budget
from leanvit.scale.search import RaySearch

CONFIG = MPTQConfig(budget=Budget(average_bits=4))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


NETWORK = """
import timm, torch
from torch import nn

def network():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    return model
"""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found: dict[str, Any] = {}
    exec(NETWORK, found)
    network: nn.Module = found["network"]()
    return network


def images() -> Tensor:
    coarse = torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")


def _plan(model: nn.Module, journal: Path, elsewhere: RaySearch | None = None) -> Any:
    return quantize(model, images(), CONFIG, journal=journal, elsewhere=elsewhere).plan


@pytest.fixture(scope="module")
def alone(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes]:
    """Plan and journal of a search without Ray."""
    journal = tmp_path_factory.mktemp("alone") / "alone.jsonl"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    plan = _plan(model, journal)
    torch.set_num_threads(threads)
    return plan, journal.read_bytes()


def test_journal_and_plan_of_one_process_are_those_of_a_search_alone(
    cluster: ModuleType, model: nn.Module, alone: tuple[Any, bytes], tmp_path: Path
) -> None:
    found = _plan(model, tmp_path / "ray.jsonl", RaySearch(cluster, 1))
    assert (found, (tmp_path / "ray.jsonl").read_bytes()) == alone


def test_so_are_those_of_two_of_which_one_is_killed(
    cluster: ModuleType, model: nn.Module, alone: tuple[Any, bytes], tmp_path: Path
) -> None:
    journal, killed = tmp_path / "ray.jsonl", []

    def kill() -> None:
        while not killed:
            if journal.is_file() and len(journal.read_bytes().splitlines()) > 20:
                killed.extend(pid for pid in workers()[:1])
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.05)

    thread = threading.Thread(target=kill)
    thread.start()
    found = _plan(model, journal, RaySearch(cluster, 2))
    thread.join(1)
    assert killed
    assert (found, journal.read_bytes()) == alone


def workers() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if b"ray::LossWorker" in line:
            found.append(int(entry.name))
    return found


def test_the_verb_searches_on_ray(
    cluster: ModuleType, tmp_path: Path, leanvit: Callable[..., Outcome], image_folder: Callable[..., Path]
) -> None:
    (tmp_path / "own.py").write_text(NETWORK)
    data = image_folder("data", cat=6, dog=6, owl=6)
    command = ["quantize", f"python:{tmp_path}/own.py:network", "--data", data, "--calibration-images", 8]
    alone = leanvit(*command, "--average-bits", 4, "--output", tmp_path / "alone")
    assert alone.code == 0, alone.err
    done = leanvit(*command, "--average-bits", 4, "--output", tmp_path / "ray", "--ray", "local", "--ray-workers", 2)
    assert done.code == 0, done.err
    for name in ("search.jsonl", "plan.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    refused = leanvit(*command, "--output", tmp_path / "none", "--ray", "local")
    assert refused.code == 2
    assert "Give --average-bits, or leave --ray out" in refused.err
