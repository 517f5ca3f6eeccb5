"""The losses of Greedy MP, computed by processes on a Ray cluster; the search itself runs where it always does.

Each process builds the network of the search from the model and the calibration images, which go through the object
store once, and then is sent plans. A search asks for one loss after the other, and says which ones it is likely to ask
for next: those are begun before. What it does not ask for in the end is thrown away, so that the journal and the plan
are those of a search alone, whatever the number of processes and their order.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.config import MPTQConfig
from leanvit.errors import EnvironmentProblem
from leanvit.quant.costs import Candidate
from leanvit.quant.evaluate import Made
from leanvit.quant.graph import Measure
from leanvit.quant.mptq import PlanLosses
from leanvit.quant.plan import Plan
from leanvit.scale.cluster import connected, fetch, thread_variables

RESTARTS = 5
"""Times that a process of the search is started again which died with its machine."""


@contextlib.contextmanager
def searching(address: str, workers: int | None = None) -> Iterator[RayAhead]:
    """What computes the losses of a search on a cluster. One thread a process, this one too: as many as a search alone
    that is to write the same journal has (OMP_NUM_THREADS=1). Raises as `connected`."""
    threads = torch.get_num_threads()
    with connected(address) as ray:
        torch.set_num_threads(1)
        try:
            yield RayAhead(ray, workers)
        finally:
            torch.set_num_threads(threads)


class RayAhead:
    """leanvit.quant.ahead.Ahead on a cluster: `workers` processes of `threads` CPUs each.

    Losses are those of a process of as many threads: sums are rounded in the order in which they are taken.
    """

    def __init__(self, ray: ModuleType, workers: int | None = None, threads: int = 1) -> None:
        self.ray, self.threads = ray, threads
        room = int(ray.cluster_resources().get("CPU", 0)) // threads
        self.width = workers or room
        if not 0 < self.width <= room:
            # Ray would wait for more machines for ever.
            raise EnvironmentProblem(
                f"{max(self.width, 1)} processes are to search, and Ray has room for {room}. Give fewer --ray-workers."
            )
        self._given: Any = None
        self._workers: list[Any] = []
        self._load: list[int] = []
        self._waiting: dict[str, tuple[Any, int]] = {}
        self._local: dict[Candidate, Any] = {}

    def begin(
        self, model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None = None
    ) -> None:
        """Start the processes; they build the network while this one does."""
        # Held, for processes that are started again.
        self._given = given = self.ray.put(
            (copy.deepcopy(model).cpu(), [batch.cpu() for batch in batches], config, measure)
        )
        actor = self.ray.remote(
            num_cpus=self.threads,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            runtime_env={"env_vars": thread_variables(self.threads)},
        )(LossWorker)
        self._workers = [actor.remote(given, self.threads) for _ in range(self.width)]
        self._load = [0] * self.width
        self._waiting = {}
        self._local = {}

    def expect(self, plans: Sequence[Plan]) -> None:
        """Begin with some losses, each in the process that has the least to do."""
        for plan in plans:
            key = _key(plan)
            if key not in self._waiting:
                worker = min(range(self.width), key=self._load.__getitem__)
                self._load[worker] += 1
                self._waiting[key] = (self._workers[worker].loss.remote(plan), worker)

    def loss(self, plan: Plan) -> float:
        """The loss of a plan. Raises the error of the process, EnvironmentProblem where it died again and again."""
        self.expect([plan])
        reference, worker = self._waiting.pop(_key(plan))
        found = float(self._get(reference))
        self._load[worker] -= 1
        return found

    def expect_local(self, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
        """Begin with errors of sites, in turns; weights take less time than activations, so both in turns. What was
        made for them goes to the other processes as well."""
        turns = [0, 0, 0]
        made: list[list[Any]] = [[] for _ in self._workers]
        for candidate in candidates:
            part = candidate[1]
            own = turns[part] % self.width
            turns[part] += 1
            found = self._workers[own].local_errors.options(num_returns=2).remote(candidate, tuple(levels))
            self._local[candidate], quantizers = found
            made[own].append(quantizers)
        for own, worker in enumerate(self._workers):
            worker.take.remote(*itertools.chain(*made[:own], *made[own + 1 :]))

    def local_error(self, candidate: Candidate, bits: int) -> float:
        """Squared output error of a part of a site. Raises as `loss`."""
        found = self._local[candidate]
        if not isinstance(found, dict):
            found = self._local[candidate] = self._get(found)
        return float(found[bits])

    def _get(self, reference: Any) -> Any:
        try:
            return fetch(self.ray, reference)
        except self.ray.exceptions.RayTaskError:
            raise
        except self.ray.exceptions.RayError as error:
            reason = " ".join(str(error).split())[:200]
            raise EnvironmentProblem(
                f"a process of the search died {RESTARTS + 1} times ({reason}). Give it a machine with more memory; "
                "the same command goes on from its journal."
            ) from error


class LossWorker:
    """In a process of the cluster: losses of plans (leanvit.quant.mptq.PlanLosses)."""

    def __init__(self, given: tuple[nn.Module, list[Tensor], MPTQConfig, Measure | None], threads: int) -> None:
        torch.set_num_threads(threads)
        self.losses = PlanLosses(*given)

    def loss(self, plan: Plan) -> float:
        """The loss of one plan."""
        return self.losses.loss(plan)

    def local_errors(self, candidate: Candidate, levels: tuple[int, ...]) -> tuple[dict[int, float], Made]:
        """Squared output errors of a part of a site, by level, and the quantizers that have them."""
        return self.losses.local_errors(candidate, levels), self.losses.made(candidate, levels)

    def take(self, *made: Made) -> None:
        """Quantizers that other processes made."""
        for found in made:
            self.losses.take(found)


def _key(plan: Plan) -> str:
    return json.dumps(sorted(plan.items()))
