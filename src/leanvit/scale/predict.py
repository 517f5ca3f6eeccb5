"""leanvit predict --ray: the parts of `leanvit.runtime.parts`, made by tasks on a Ray cluster. No torch.

A task makes one part with the function that makes it alone, so that its bytes are the same. Tasks and not actors: a
task of a machine that is lost is done again on another one by Ray itself, and a worker's process keeps its predictor
for the next task. The bundle goes through the object store once; images and results need no disk that all machines
see, but images that are given by path do. This process writes the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from leanvit.config import PredictConfig
from leanvit.config.scale import LOCAL
from leanvit.runtime import parts
from leanvit.runtime.parts import Job, Numbered, Part
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.sources import Piece
from leanvit.scale.bundles import pack, unpacked
from leanvit.scale.cluster import connected, fetch, require_room, thread_variables

TRIES = 5
"""Times that a part is begun again whose process died: machines are lost now and then, and an image that kills its
decoder kills it each time."""

_predictors: dict[str, Predictor] = {}


def run(config: PredictConfig) -> int:
    """`leanvit.runtime.parts.run` on a cluster; each task has `config.threads` CPUs, or one.

    Raises as that does, MissingDependencyError and EnvironmentProblem where there is no cluster.
    """
    config = replace(config, threads=config.threads or 1)
    with connected(config.ray or LOCAL) as ray:
        require_room(ray, config.threads)
        return parts.run(config, lambda job, todo: parts_of(ray, job, todo))


def parts_of(ray: ModuleType, job: Job, todo: Iterator[Numbered]) -> Iterator[tuple[int, Piece, Part]]:
    """The part of every piece, as they come; no more are in work or waiting than the cluster has room for."""
    config = job.config
    # In a list, a reference is not fetched before the task asks for it: once in a process.
    bundle = [ray.put(pack(config.bundle))]
    shared = ray.put(job)
    make = ray.remote(
        num_cpus=config.threads, max_retries=TRIES, runtime_env={"env_vars": thread_variables(config.threads)}
    )(make_part)
    waiting: dict[Any, Numbered] = {}
    more = True
    while more or waiting:
        while more and len(waiting) < _room(ray, config):
            following = next(todo, None)
            more = following is not None
            if following is not None:
                waiting[make.remote(bundle, shared, following[1])] = following
        if waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            number, piece = waiting.pop(done[0])
            yield number, piece, _result(ray, done[0], piece)


def _room(ray: ModuleType, config: PredictConfig) -> int:
    """Tasks that may be in work or waiting: one more than run, so that none waits for this process."""
    if config.ray_workers:
        return config.ray_workers
    return int(ray.cluster_resources().get("CPU", 1)) // config.threads + 1


def _result(ray: ModuleType, reference: Any, piece: Piece) -> Part:
    """What a task returned, or the failure that it is to have died each time."""
    try:
        found: Part = fetch(ray, reference)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:160]
        return Part(failure=f"{piece}: its process died {TRIES + 1} times ({reason}). Look for a damaged image in it")
    return found


def make_part(bundle: list[Any], job: Job, piece: Piece) -> Part:
    """In a worker: one part, by the predictor that this process keeps for the bundle."""
    config = job.config
    key = f"{bundle[0].hex()} {config.runtime} {config.threads}"
    if key not in _predictors:
        import ray

        _predictors.clear()
        _predictors[key] = Predictor(unpacked(ray.get(bundle[0])), threads=config.threads, runtime=config.runtime)
    return parts.make_part(_predictors[key], job, piece)
