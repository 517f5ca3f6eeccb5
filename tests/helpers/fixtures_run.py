"""A short run of the whole path, shared by the tests that look at what it leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from common import ROOT
from leanvit.commands.demo import run
from leanvit.config import DemoConfig
from made_once import made_once, shared_folder

FULL_RUN = ROOT / "runs" / "demo"
"""Where `make demo` writes."""


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a shortened `leanvit demo`: everything but the accuracy is as in the full one; only to be read.

    Where CI has just made the full one on the same checkout it is that.
    """
    if "CI" in os.environ and (FULL_RUN / "demo.json").is_file():
        return FULL_RUN

    def make(folder: Path) -> None:
        # A network after a few epochs sits on many ties, so a drop of some points is no defect here.
        run(DemoConfig(output=str(folder), epochs=3, max_drop=5.0, speed=False))

    return made_once(shared_folder(tmp_path_factory) / "demo", make)
