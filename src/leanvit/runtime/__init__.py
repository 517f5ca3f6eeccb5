"""All that serves a bundle: its folder, the runtimes, predictors of every task, and files of results. No torch."""

from __future__ import annotations

import importlib
from typing import Any

from leanvit import _moved


def __getattr__(name: str) -> Any:
    """Names of leanvit 0.1, where this room was one module."""
    if name not in _moved.NAMES_OF_RUNTIME:
        raise AttributeError(f"module 'leanvit.runtime' has no attribute '{name}'")
    new = _moved.NAMES_OF_RUNTIME[name]
    _moved.warn(f"leanvit.runtime.{name}", f"{new}.{name}", stacklevel=3)
    return getattr(importlib.import_module(new), name)
