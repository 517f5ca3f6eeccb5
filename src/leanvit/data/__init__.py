"""Images in: where they come from (sets), batches of them (loader, scene_loader), and practice pictures (compose).

The names below are imported when they are first used: composing and inspecting data needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from leanvit import _moved

if TYPE_CHECKING:
    from leanvit.checkpoint import preprocess_for
    from leanvit.data.loader import Loader, check_classes, to_input
    from leanvit.data.sets import ImageSet, load_split

_LAZY = {
    "ImageSet": "leanvit.data.sets",
    "Loader": "leanvit.data.loader",
    "check_classes": "leanvit.data.loader",
    "load_split": "leanvit.data.sets",
    "preprocess_for": "leanvit.checkpoint",
    "to_input": "leanvit.data.loader",
}

__all__ = ["ImageSet", "Loader", "check_classes", "load_split", "preprocess_for", "to_input"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    return _moved.find_name(__name__, name)
