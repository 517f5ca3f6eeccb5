"""Sigmoid outputs: networks whose outputs are labels of their own, and networks with one logit between two labels."""

from __future__ import annotations

from leanvit.load.api import build_classifier
from leanvit.tasks.task import TrainingTask, not_trained, register, single_output

MULTILABEL = register(
    TrainingTask(
        name="multilabel", build=build_classifier, output_names=("logits",), outputs=single_output("logits"),
        losses=not_trained, samples=None,
    )
)  # fmt: skip
BINARY = register(
    TrainingTask(
        name="binary", build=build_classifier, output_names=("logits",), outputs=single_output("logits"),
        losses=not_trained, samples=None,
    )
)  # fmt: skip
