"""The losses of Greedy MP, computed by processes on a Ray cluster; the search itself runs where it always does.

Processes start, and import what they need, while this one still reads its images. Each builds the network of the search
from the model and the calibration images, which go through the object store once, and runs its share of the images for
every plan that it is sent. What it returns, and the quantizers that one process makes for all, is what this process
would have computed: journal and plan are those of a search alone, whatever the number of processes.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.config import MPTQConfig
from leanvit.errors import EnvironmentProblem, require
from leanvit.progress import note
from leanvit.quant.costs import Candidate
from leanvit.quant.evaluate import Made, PlanLosses, made_for
from leanvit.quant.graph import Measure, Outputs
from leanvit.quant.losses import divergence, joined
from leanvit.quant.mptq import plan_losses
from leanvit.quant.plan import Plan
from leanvit.scale.cluster import connected, fetch, thread_variables

AHEAD = 4
"""Plans that are begun before the loss of the first is asked for: no process waits, and few outputs are held."""

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
        actor = ray.remote(
            num_cpus=threads,
            max_restarts=RESTARTS,
            max_task_retries=RESTARTS,
            runtime_env={"env_vars": thread_variables(threads)},
        )(LossWorker)
        self._workers = [actor.remote(own, self.width, threads) for own in range(self.width)]
        self._given: tuple[Any, ...] = ()
        self._measure: Measure | None = None
        self._truth: Outputs = ()
        self._local: dict[Candidate, Any] = {}

    def begin(
        self, model: nn.Module, batches: list[Tensor], config: MPTQConfig, measure: Measure | None = None
    ) -> None:
        """Let the processes build the network, while this one does."""
        given = copy.deepcopy(model).cpu(), [batch.cpu() for batch in batches], config
        # In a tuple, which Ray hands on as it is: a process fetches what lies there when it builds the network.
        self._given = (self.ray.put(given),)
        for worker in self._workers:
            worker.build.remote(self._given)
        self._measure, self._truth, self._local = measure, (), {}

    def loss(self, plan: Plan) -> float:
        """The loss of a plan. Raises the error of the process, EnvironmentProblem where it died again and again."""
        return next(self.losses([plan]))

    def losses(self, plans: Sequence[Plan]) -> Iterator[float]:
        """The same of several plans: no process waits for another between them. Raises as `loss`."""
        self._see_truth()
        begun = collections.deque[list[Any]]()
        for plan in plans:
            begun.append([worker.outputs.remote(self._given, plan) for worker in self._workers])
            if len(begun) > AHEAD:
                yield self._loss_of(begun.popleft())
        while begun:
            yield self._loss_of(begun.popleft())

    def prepare(self, candidates: Sequence[Candidate], levels: Sequence[int]) -> None:
        """Make quantizers, each in one process: weights take less time than activations, so both in turns. What one
        has made goes to the others."""
        turns = [0, 0, 0]
        made: list[list[Any]] = [[] for _ in self._workers]
        for candidate in candidates:
            part = candidate[1]
            own = turns[part] % self.width
            turns[part] += 1
            found = self._workers[own].local_errors.options(num_returns=2)
            self._local[candidate], quantizers = found.remote(self._given, candidate, tuple(levels))
            made[own].append(quantizers)
        for own, worker in enumerate(self._workers):
            worker.take.remote(self._given, *itertools.chain(*made[:own], *made[own + 1 :]))

    def local_error(self, candidate: Candidate, bits: int) -> float:
        """Squared output error of a part of a site. Raises as `loss`."""
        found = self._local[candidate]
        if not isinstance(found, dict):
            found = self._local[candidate] = self._get(found)
        return float(found[bits])

    def _see_truth(self) -> None:
        """Have the float outputs, once."""
        if self._truth:
            return
        self._truth = self._get(self._workers[0].truth.remote(self._given))
        parts = int(self._get(self._workers[0].part_count.remote(self._given)))
        if parts < self.width:
            note(f"images run in {parts} parts: {self.width - parts} of {self.width} processes have none of them")

    def _loss_of(self, references: list[Any]) -> float:
        """The loss of a plan from the outputs for the parts that each process has."""
        parts = {part: outputs for found in self._get(references) for part, outputs in found.items()}
        return divergence(self._truth, joined(parts[part] for part in sorted(parts)), self._measure)

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

    own, of: this process, of how many. given, of all methods: where model, batches and configuration of
    leanvit.quant.mptq.plan_losses lie; a process that was started again builds the network from there once more.
    """

    def __init__(self, own: int, of: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self.own, self.of = own, of
        self._built: tuple[tuple[Any, ...], PlanLosses] | None = None

    def build(self, given: tuple[Any, ...]) -> None:
        """Make the network of a search."""
        self._losses(given)

    def part_count(self, given: tuple[Any, ...]) -> int:
        """In how many parts the images run."""
        return len(self._losses(given).network.parts)

    def truth(self, given: tuple[Any, ...]) -> Outputs:
        """Float outputs of all images."""
        return self._losses(given).network.truth

    def outputs(self, given: tuple[Any, ...], plan: Plan) -> dict[int, Outputs]:
        """Outputs with the quantizers of a plan, by part of the images."""
        losses = self._losses(given)
        parts = range(self.own, len(losses.network.parts), self.of)
        return dict(zip(parts, losses.outputs(plan, parts), strict=True))

    def local_errors(
        self, given: tuple[Any, ...], candidate: Candidate, levels: tuple[int, ...]
    ) -> tuple[dict[int, float], Made]:
        """Squared output errors of a part of a site, by level, and the quantizers that have them."""
        losses = self._losses(given)
        errors = {level: losses.local_error(candidate, level) for level in levels}
        return errors, made_for(losses.network, candidate, levels)

    def take(self, given: tuple[Any, ...], *made: Made) -> None:
        """Quantizers that other processes made: they need not be made here."""
        for found in made:
            self._losses(given).network.made.update(found)

    def _losses(self, given: tuple[Any, ...]) -> PlanLosses:
        if self._built is None or self._built[0] != given:
            self._built = None  # Two networks at once would be too many.
            self._built = given, plan_losses(*require("ray").get(given[0]))
        return self._built[1]
