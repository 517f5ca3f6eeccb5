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
    from leanvit.config import Budget, MPTQConfig
    from leanvit.export.api import export
    from leanvit.quant import QuantizedModel, quantize
    from leanvit.runtime.predictor import Predictor

# Nothing phones home. ONNX Runtime and huggingface_hub read these when they are imported, hence here.
for _switch in ("ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY"):
    os.environ.setdefault(_switch, "1")

_LAZY = {
    "Budget": "leanvit.config",
    "MPTQConfig": "leanvit.config",
    "Predictor": "leanvit.runtime.predictor",
    "QuantizedModel": "leanvit.quant",
    "quantize": "leanvit.quant",
}

__all__ = ["Budget", "MPTQConfig", "Predictor", "QuantizedModel", "__version__", "export", "quantize"]


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


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'leanvit' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


sys.modules[__name__].__class__ = _Package
_moved.install()
