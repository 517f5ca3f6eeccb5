"""Joining a cluster: errors that name the remedy, signals and secrets as they should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from common import Outcome
from leanvit.config import PredictConfig, QuantizeConfig
from leanvit.errors import ConfigError, is_installed
from leanvit.scale.bundles import pack, unpacked
from leanvit.scale.cluster import thread_variables

WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from leanvit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_extra_the_command_that_installs_it_is_named(shared_bundle: Path, photo: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_RAY, "predict", str(shared_bundle), str(photo)]
    done = subprocess.run([*command, "--output", "x/", "--ray", "local"], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr == 'leanvit: ray is not installed. Run: pip install "leanvit[ray]"\n'


def test_importing_leanvit_imports_no_ray() -> None:
    code = (
        "import sys, leanvit, leanvit.scale, leanvit.scale.cluster, leanvit.scale.predict; print('ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.skipif(not is_installed("ray"), reason='ray is missing: pip install "leanvit[ray]"')
@pytest.mark.ray
def test_an_address_where_nobody_listens_is_named_in_seconds(
    shared_bundle: Path, photo: Path, tmp_path: Path, leanvit: Callable[..., Outcome]
) -> None:
    started = time.monotonic()
    done = leanvit("predict", shared_bundle, photo, "--output", f"{tmp_path}/x/", "--ray", "127.0.0.1:9")
    assert done.code == 4
    assert "127.0.0.1:9 can't be reached" in done.err
    assert "Start one with: ray start --head, or give --ray local" in done.err
    assert time.monotonic() - started < 60


def test_sigterm_stays_the_command_s(cluster: ModuleType) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    assert getattr(handler, "__module__", "") != "ray._private.worker"
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize("config", [PredictConfig, QuantizeConfig])
def test_workers_without_ray_are_refused(config: type) -> None:
    needed = {"bundle": "b"} if config is PredictConfig else {"model": "m"}
    with pytest.raises(ConfigError, match="Give --ray local or an address"):
        config(**needed, ray_workers=2)
    with pytest.raises(ConfigError, match="ray_workers is 0, expected at least 1"):
        config(**needed, ray="local", ray_workers=0, **({"average_bits": 4.0} if config is QuantizeConfig else {}))


def test_a_packed_bundle_is_the_bundle(shared_bundle: Path) -> None:
    folder = unpacked(pack(shared_bundle))
    names = {path.name for path in shared_bundle.iterdir()}
    assert {path.name for path in folder.iterdir()} == names
    assert all((folder / name).read_bytes() == (shared_bundle / name).read_bytes() for name in names)
    assert folder.stat().st_mode & 0o077 == 0


def test_a_worker_has_the_threads_that_it_was_granted() -> None:
    assert thread_variables(3)["OMP_NUM_THREADS"] == "3"
