"""Training: fine-tuning, the papers' recipes, distillation, exact resume, many processes."""

from leanvit.train.accuracy import Accuracy, evaluate
from leanvit.train.logs import SUMMARY_NAME
from leanvit.train.loop import Trainer, TrainResult, run
from leanvit.train.optimizer import learning_rate, make_optimizer
from leanvit.train.setup import autocast_dtype, pick_device
from leanvit.train.state import LAST_NAME

__all__ = [
    "LAST_NAME",
    "SUMMARY_NAME",
    "Accuracy",
    "TrainResult",
    "Trainer",
    "autocast_dtype",
    "evaluate",
    "learning_rate",
    "make_optimizer",
    "pick_device",
    "run",
]
