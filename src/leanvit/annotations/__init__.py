"""Annotated pictures: COCO, YOLO and class map folders, their checks, and composed practice data. No torch."""

from leanvit.annotations.types import (
    IGNORED,
    BoolMask,
    ClassMap,
    Found,
    Instance,
    KeypointScheme,
    Outputs,
    Scene,
    SceneSet,
)

__all__ = ["IGNORED", "BoolMask", "ClassMap", "Found", "Instance", "KeypointScheme", "Outputs", "Scene", "SceneSet"]
