"""The losses of Greedy MP, computed by processes on a Ray cluster; the search itself runs where it always does.

Each process builds the network of the search from the model and the calibration images, which go through the object
store once, and runs its share of the images for every plan that it is sent. What it returns, and the quantizers that
one process makes for all, is what this process would have computed: journal and plan are those of a search alone,
whatever the number of processes.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.config import MPTQConfig
from leanvit.errors import EnvironmentProblem
from leanvit.progress import note
from leanvit.quant.costs import Candidate
from leanvit.quant.evaluate import Made, made_for
from leanvit.quant.graph import Measure, Outputs
from leanvit.quant.losses import divergence, joined
from leanvit.quant.mptq import plan_losses
from leanvit.quant.plan import Plan
from leanvit.scale.cluster import connected, fetch, thread_variables

RESTARTS = 5
"""Times that a process of the search is started again which died with its machine."""


@contextlib.contextmanager
def searching(address: str, workers: int | None = None) -> Iterator[RaySearch]:
    """What computes the losses of a search on a cluster. One thread a process, this one too: as many as a search alone
    that is to write the same journal has (OMP_NUM_THREADS=1). Raises as `connected`."""
    threads = torch.get_num_threads()
    with connected(address) as ray:
        torch.set_num_threads(1)
        try:
            yield RaySearch(ray, workers)
        finally:
            torch.set_num_threads(threads)


class RaySearch:
    """leanvit.quant.elsewhere.Elsewhere on a cluster: `workers` processes of `threads` CPUs each.

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
        self._measure: Measure | None = None
        self._truth: Outputs = ()
        self._local: dict[Candidate, Any] = {}

    def begin(
        self, model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None = None
    ) -> None:
        """Start the processes; they build the network while this one does."""
        # Held, for processes that are started again.
        self._given = given = self.ray.put((copy.deepcopy(model).cpu(), [batch.cpu() for batch in batches], config))
        actor = self.ray.remote(
            num_cpus=self.threads,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            runtime_env={"env_vars": thread_variables(self.threads)},
        )(LossWorker)
        self._workers = [actor.remote(given, own, self.width, self.threads) for own in range(self.width)]
        self._measure, self._truth, self._local = measure, (), {}

    def loss(self, plan: Plan) -> float:
        """The loss of a plan. Raises the error of the process, EnvironmentProblem where it died again and again."""
        if not self._truth:
            self._truth = self._get(self._workers[0].truth.remote())
            parts = int(self._get(self._workers[0].part_count.remote()))
            if parts < self.width:
                note(f"images run in {parts} parts: {self.width - parts} of {self.width} processes have none of them")
        found = self._joined(worker.outputs.remote(plan) for worker in self._workers)
        return divergence(self._truth, found, self._measure)

    def prepare(self, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
        """Make quantizers, each in one process: weights take less time than activations, so both in turns. What one
        has made goes to the others."""
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

    def _joined(self, references: Iterable[Any]) -> Outputs:
        """Outputs of all images, from those of the parts that each process has."""
        parts = {part: outputs for found in [*references] for part, outputs in self._get(found).items()}
        return joined(parts[part] for part in sorted(parts))

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
    """In a process of the cluster: what plans compute for its share of the images.

    given: model, batches and configuration of leanvit.quant.mptq.plan_losses. own, of: this process, of how many.
    """

    def __init__(self, given: tuple[nn.Module, list[Tensor], MPTQConfig], own: int, of: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.losses = plan_losses(*given)
        self.parts = range(own, len(self.losses.network.parts), of)

    def part_count(self) -> int:
        """In how many parts the images run."""
        return len(self.losses.network.parts)

    def truth(self) -> Outputs:
        """Float outputs of all images."""
        return self.losses.network.truth

    def outputs(self, plan: Plan) -> dict[int, Outputs]:
        """Outputs with the quantizers of a plan, by part of the images."""
        return dict(zip(self.parts, self.losses.outputs(plan, self.parts), strict=True))

    def local_errors(self, candidate: Candidate, levels: tuple[int, ...]) -> tuple[dict[int, float], Made]:
        """Squared output errors of a part of a site, by level, and the quantizers that have them."""
        errors = {level: self.losses.local_error(candidate, level) for level in levels}
        return errors, made_for(self.losses.network, candidate, levels)

    def take(self, *made: Made) -> None:
        """Quantizers that other processes made: they need not be made here."""
        for found in made:
            self.losses.network.made.update(found)
