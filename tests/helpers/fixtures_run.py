"""A short run of the whole path, shared by the tests that look at what it leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from leanvit.commands.demo import run
from leanvit.config import DemoConfig


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a shortened `leanvit demo`: everything but the accuracy is as in the full one; only to be read."""
    base = tmp_path_factory.getbasetemp()
    # Workers of xdist have folders beside each other: the first makes the run, for all.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "runs" / "demo"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "demo.json").is_file():
            # A network after a few epochs sits on many ties, so a drop of some points is no defect here.
            run(DemoConfig(output=str(folder), epochs=8, max_drop=5.0))
    return folder
