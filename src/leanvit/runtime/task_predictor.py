"""The predictor of tasks before there was one for all of them, for the exporter and its tests."""

from leanvit.runtime.predictor import Predictor as TaskPredictor

__all__ = ["TaskPredictor"]
