"""Configuration: one dataclass is the Python API, the command-line flag, the YAML key and the help text.

Every configuration carries `version`, rejects unknown keys with a suggestion, and goes to YAML or JSON
and back without loss. This package imports neither torch nor timm.
"""

from leanvit import _moved
from leanvit.config.analysis import AnalyzeConfig
from leanvit.config.base import command_line, convert, from_dict, load_yaml, option, save_yaml, to_dict
from leanvit.config.commands import (
    BenchmarkConfig,
    ConvertConfig,
    DemoConfig,
    DoctorConfig,
    ExportConfig,
    ExportOptions,
    ModelsConfig,
    Opset,
    PredictConfig,
    ReportConfig,
    Runtime,
    RuntimeChoice,
    VerifyConfig,
)
from leanvit.config.compose import DataComposeConfig
from leanvit.config.datasets import BadImages, DataInspectConfig
from leanvit.config.evaluation import Corruption, Padding, ValConfig
from leanvit.config.image import FASHION_MNIST_CLASSES, IMAGENET_MEAN, IMAGENET_STD, Interpolation, Preprocess
from leanvit.config.load import LoadOptions
from leanvit.config.optimize import OptimizeConfig, OptimizeOptions
from leanvit.config.quantization import (
    BEST_PASSES,
    LEARNED_PASSES,
    NAMED_PASSES,
    Budget,
    MPTQConfig,
    QuantizeConfig,
    Scheme,
)
from leanvit.config.serve import ServeConfig
from leanvit.config.sweep import SweepConfig
from leanvit.config.tasks import Task
from leanvit.config.training import TrainConfig
from leanvit.config.web import WebConfig

__all__ = [
    "BEST_PASSES",
    "FASHION_MNIST_CLASSES",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "LEARNED_PASSES",
    "NAMED_PASSES",
    "AnalyzeConfig",
    "BadImages",
    "BenchmarkConfig",
    "Budget",
    "ConvertConfig",
    "Corruption",
    "DataComposeConfig",
    "DataInspectConfig",
    "DemoConfig",
    "DoctorConfig",
    "ExportConfig",
    "ExportOptions",
    "Interpolation",
    "LoadOptions",
    "MPTQConfig",
    "ModelsConfig",
    "Opset",
    "OptimizeConfig",
    "OptimizeOptions",
    "Padding",
    "PredictConfig",
    "Preprocess",
    "QuantizeConfig",
    "ReportConfig",
    "Runtime",
    "RuntimeChoice",
    "Scheme",
    "ServeConfig",
    "SweepConfig",
    "Task",
    "TrainConfig",
    "ValConfig",
    "VerifyConfig",
    "WebConfig",
    "command_line",
    "convert",
    "from_dict",
    "load_yaml",
    "option",
    "save_yaml",
    "to_dict",
]


def __getattr__(name: str) -> object:
    """Names of 0.1, for one release."""
    if name != "TaskTrainConfig":
        return _moved.find_name(__name__, name)
    import warnings

    warnings.warn("TaskTrainConfig is TrainConfig with a task now: TrainConfig(task=...)", FutureWarning, stacklevel=2)
    return TrainConfig
