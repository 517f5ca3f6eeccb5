"""leanvit: images and a vision transformer in; a small, fast, proven artifact out.

The names below are imported when they are first used, so that `import leanvit` needs neither torch nor timm.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from leanvit import _moved
from leanvit._version import __version__

if TYPE_CHECKING:
    from leanvit.config import Budget, ExportOptions, LoadOptions, MPTQConfig, OptimizeOptions
    from leanvit.export.api import export
    from leanvit.load.api import load
    from leanvit.optimize.api import optimize
    from leanvit.quant import QuantizedModel, quantize
    from leanvit.runtime.predictor import Predictor

# Nothing phones home. ONNX Runtime and huggingface_hub read these when they are imported, hence here.
for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_switch, "1")

_LAZY = {
    "Budget": ("leanvit.config", "Budget"),
    "ExportOptions": ("leanvit.config", "ExportOptions"),
    "LoadOptions": ("leanvit.config", "LoadOptions"),
    "MPTQConfig": ("leanvit.config", "MPTQConfig"),
    "OptimizeOptions": ("leanvit.config", "OptimizeOptions"),
    "Predictor": ("leanvit.runtime.predictor", "Predictor"),
    "QuantizedModel": ("leanvit.quant", "QuantizedModel"),
    "quantize": ("leanvit.quant", "quantize"),
}

__all__ = [
    "Budget",
    "ExportOptions",
    "LoadOptions",
    "MPTQConfig",
    "OptimizeOptions",
    "Predictor",
    "QuantizedModel",
    "__version__",
    "export",
    "load",
    "optimize",
    "quantize",
]


class _Package(ModuleType):
    """This package: functions that share their name with a room stay functions.

    Importing leanvit.export.api makes Python put the subpackage where the function of that name is; a property is
    looked up first. Modules of such a room are imported as `from leanvit.export import api`.
    """

    @property
    def export(self) -> Any:
        return importlib.import_module("leanvit.export.api").export

    @export.setter
    def export(self, room: ModuleType) -> None:
        """Python's import system stores the room here; sys.modules keeps it."""

    @property
    def load(self) -> Any:
        importlib.import_module("leanvit.tasks")  # checkpoints of every task can be built then
        return importlib.import_module("leanvit.load.api").load

    @load.setter
    def load(self, room: ModuleType) -> None:
        """As for export."""

    @property
    def optimize(self) -> Any:
        return importlib.import_module("leanvit.optimize.api").optimize

    @optimize.setter
    def optimize(self, room: ModuleType) -> None:
        """As with `export`."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        module, attribute = _LAZY[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'leanvit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
_moved.install()
