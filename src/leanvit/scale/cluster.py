"""A Ray cluster for one command: started on this machine, or joined where it runs.

Nothing is reported to anybody, no dashboard is opened, and a cluster that is started here talks over a loopback address
and takes only those who know the token that it drew: Ray listens everywhere, and runs whatever code it is sent.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from leanvit.config.scale import LOCAL
from leanvit.errors import EnvironmentProblem, LeanvitError, require

STORE_BYTES = 256 * 2**20
"""Of the object store of a cluster that is started here: bundles, networks and batches of results pass through it, and
containers have a small /dev/shm (ray issue 14616)."""

REACHED_SECONDS = 10.0
"""In which a cluster's port must answer."""

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Else Ray says at the start how it will treat GPUs one day.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def thread_variables(threads: int) -> dict[str, str]:
    """What a worker's environment says of threads, so that N workers don't take all cores N times."""
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


@contextlib.contextmanager
def connected(address: str, *, cpus: int | None = None) -> Iterator[ModuleType]:
    """The module `ray`, connected to a cluster; a cluster that was started here ends with the block.

    address: "local" starts one on this machine, with `cpus` CPUs or all of them; else HOST:PORT or "auto".
    Raises MissingDependencyError without the extra `ray`, EnvironmentProblem where the cluster can't be reached.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Read when Ray is imported, and by the processes that it starts.
    if address == LOCAL and "ray" not in sys.modules and "RAY_AUTH_TOKEN" not in os.environ:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    ray = require("ray")
    if ray.is_initialized():
        yield ray
        return
    options = _of_local(cpus) if address == LOCAL else {"address": address}
    ended_by = signal.getsignal(signal.SIGTERM)
    try:
        _require_reachable(address)
        ray.init(**options, log_to_driver=False, logging_level="error", ignore_reinit_error=True)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EnvironmentProblem(
            f"Ray at {address} can't be reached ({reason}). Start one with: ray start --head, or give --ray local."
        ) from error
    finally:
        # Ray puts its own in the place, which ends with another exit code. Only the first thread may put it back.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, ended_by)
    try:
        yield ray
    finally:
        ray.shutdown()


def fetch(ray: ModuleType, reference: Any) -> Any:
    """What a task returned. Raises the error that ended it as it was raised there, where it is one of leanvit's."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, LeanvitError) else error from error


def require_room(ray: ModuleType, threads: int) -> None:
    """Raise EnvironmentProblem where no machine has the CPUs of a task: Ray would wait for one for ever."""
    most = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if most < threads:
        raise EnvironmentProblem(f"threads is {threads}, and no machine has more than {most} CPUs. Lower --threads.")


def _require_reachable(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), REACHED_SECONDS).close()


def _of_local(cpus: int | None) -> dict[str, object]:
    return {
        # Never a cluster that happens to run on this machine.
        "address": "local",
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": STORE_BYTES,
        # A loopback address; Ray takes 127.0.0.1 and localhost for the one that others reach.
        "_node_ip_address": "127.0.0.2",
    }
