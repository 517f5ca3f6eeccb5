"""Export: quantized graph to ONNX, bundle, gate.

The package itself is callable, `leanvit.export(model, "out/")`: the public function and this folder share a
name, and importing any submodule would otherwise replace the function by the module.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write a model as a bundle: see leanvit.export.api.export."""
        from leanvit.export.api import export

        return export(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
