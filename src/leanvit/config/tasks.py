"""What the options of a training are for the tasks of the package: defaults of their own, and what they learn from.

Data without torch, so that TrainConfig can be resolved and `leanvit train --help` printed without it. A task from
outside brings its own: TrainingTask.defaults and TrainingTask.options.
"""

from __future__ import annotations

from typing import Any

Task = str
"""The name of a task; the tables of tasks are leanvit.runtime.task.TASKS and leanvit.tasks.TASKS."""

CLASSIFY = "classify"
MULTILABEL = "multilabel"
LABELLED = (CLASSIFY, MULTILABEL)
"""Those that learn from labels of whole images."""

OBJECTS = ("detect", "segment")
PICTURES = (*OBJECTS, "semantic", "pose")
"""Those that learn from annotated pictures."""

STRIDE = 32
"""Sides of the input of PICTURES are multiples of the coarsest map's stride."""

IMAGES_DEFAULTS: dict[str, Any] = {
    "data": "digits", "model": "revit_micro", "output": "runs/train", "epochs": 30, "batch_size": 64, "lr": 2e-3,
    "min_lr": 1e-5, "warmup_epochs": 2.0, "clip_grad": 1.0, "hflip": 0.0, "degrees": 10.0, "grad_accum_steps": 1,
}  # fmt: skip
PICTURES_DEFAULTS: dict[str, Any] = {
    "model": "vitaev2_small", "output": "runs/task", "epochs": 12, "batch_size": 16, "img_size": (640, 640), "lr": 1e-4,
    "min_lr": 1e-6, "warmup_epochs": 0.5, "clip_grad": 10.0, "hflip": 0.5, "grad_accum_steps": 1,
}  # fmt: skip

PART_PICTURES = 4
"""Of a step of a detector that are learned from at a time, unless --grad-accum-steps says otherwise: a Mask R-CNN on
vitaev2_micro at 640 px with the defaults then takes 5.6 GiB; all 16 pictures at once took 17.9 GB."""

OBJECTS_DEFAULTS: dict[str, Any] = {k: v for k, v in PICTURES_DEFAULTS.items() if k != "grad_accum_steps"}
MULTILABEL_DEFAULTS: dict[str, Any] = {name: value for name, value in IMAGES_DEFAULTS.items() if name != "data"}

DEFAULTS: dict[str, dict[str, Any]] = {
    CLASSIFY: IMAGES_DEFAULTS,
    MULTILABEL: MULTILABEL_DEFAULTS,
    **dict.fromkeys(PICTURES, PICTURES_DEFAULTS),
    **dict.fromkeys(OBJECTS, OBJECTS_DEFAULTS),
    "pose": {**PICTURES_DEFAULTS, "degrees": 30.0},
}
"""The default of every option that has one of its own for each task, by task."""
