"""One process or many: who this one is, sums over all of them, and who writes.

Started by torchrun, a run has WORLD_SIZE processes, each with a share of every batch; else it has one. Gloo connects
CPUs, NCCL GPUs. Every function here works in a single process as well.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from leanvit.errors import ConfigError

SMALLEST_GROUP = 2**16
"""Parameters below which a block is not worth messages of its own."""

TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class Processes:
    """This process among all: rank from 0 to world - 1; local_rank counts on this machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Sums of tensors (in place, any shape) over all processes."""
        if self.world > 1:
            for value in values:
                dist.all_reduce(value)
        return list(values)


def from_environment() -> Processes:
    """This process by the variables that torchrun sets. Raises ConfigError where one is not a number."""
    try:
        rank, world, local = (int(os.environ.get(n, d)) for n, d in _VARIABLES)
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE or LOCAL_RANK is no number ({error}). Start with torchrun.") from error
    return Processes(rank, world, local)


_VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@contextmanager
def connected(processes: Processes, device: torch.device) -> Iterator[None]:
    """Hold the connection between the processes."""
    if processes.world == 1 or dist.is_initialized():
        yield
        return
    # Functions there take the group of the moment they are imported as their default, and would keep it for ever.
    import torch.distributed.nn  # noqa: F401

    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
        _forget_groups()


def _forget_groups() -> None:
    """Drop what still owns the destroyed group, so that its threads are joined here.

    One that lives on while the interpreter shuts down aborts the process when it lets go of a tensor
    (pytorch/pytorch#179291): a finished training would end with an error.
    """
    for mesh in _meshes:
        # Caches of torch keep every mesh that tensors were sharded over.
        getattr(mesh, "_pg_registry", {}).clear()
    _meshes.clear()
    # Wrapped networks are cycles.
    gc.collect()


_meshes: list[DeviceMesh] = []


def wrap(learner: nn.Module, processes: Processes, device: torch.device, *, all_learn: bool = True) -> nn.Module:
    """`learner` with gradients averaged over all processes (DistributedDataParallel).

    all_learn: whether every parameter that learns has a gradient in every step.
    """
    if processes.world == 1:
        return learner
    ids = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(learner, device_ids=ids, find_unused_parameters=not all_learn)


def shard(learner: nn.Module, processes: Processes, device: torch.device, *, blocks: nn.Module | None = None) -> None:
    """Shard the parameters of `learner` over all processes (FSDP2), one group for each repeated block.

    Blocks are the members of module lists and sequences that hold several modules of one class, as transformers do.
    blocks: the part of the learner in which they are looked for; None: all of it.
    """
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes.world,))
    _meshes.append(mesh)
    # Inner blocks first: what is sharded already is not part of the group around it.
    for module in reversed(list((learner if blocks is None else blocks).modules())):
        children = list(module.children()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
        if len(children) > 1 and len({type(child) for child in children}) == 1:
            for child in children:
                if sum(p.numel() for p in child.parameters()) >= SMALLEST_GROUP:
                    fully_shard(child, mesh=mesh)
    fully_shard(learner, mesh=mesh)


def without_sync(learner: nn.Module, *, last: bool) -> AbstractContextManager[Any]:
    """A context in which gradients stay in this process, unless this is the last part of a step."""
    no_sync: Any = getattr(learner, "no_sync", None)
    return nullcontext() if last or no_sync is None else no_sync()
