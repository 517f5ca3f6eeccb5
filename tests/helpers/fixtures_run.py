"""A short run of the whole path, shared by the tests that look at what it leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanvit.commands.demo import run
from leanvit.config import DemoConfig


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a shortened `leanvit demo`: everything but the accuracy is as in the full one."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    # A network after a few epochs sits on many ties, so a drop of some points is no defect here.
    run(DemoConfig(output=str(folder), epochs=8, max_drop=5.0))
    return folder
