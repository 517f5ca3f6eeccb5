"""Every error that leanvit raises on purpose, its exit code, and the words that help.

An error says what was found, what was expected, where, and what to do next, in one line.
This module imports the standard library only, so that every other module can raise from it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType
from typing import NoReturn

EXIT_OK = 0
EXIT_USAGE = 2
EXIT_BAD_INPUT = 3
EXIT_ENVIRONMENT = 4
EXIT_VERIFICATION = 5
EXIT_PARTIAL = 6
EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class LeanvitError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code = EXIT_BUG


class ConfigError(LeanvitError):
    """A flag, a config key or an argument is unknown or out of range."""

    exit_code = EXIT_USAGE


class UnknownModelError(ConfigError):
    """No architecture of this name is registered with timm."""


class DataError(LeanvitError):
    """Images, labels or a data set can't be used."""

    exit_code = EXIT_BAD_INPUT


class ImageError(DataError):
    """One image can't be decoded, or must not be."""


class CalibrationError(DataError):
    """Calibration images are too few, not finite, or not normalised as the model expects."""


class ModelError(LeanvitError):
    """A model or its weights can't be used."""

    exit_code = EXIT_BAD_INPUT


class ShapeError(ModelError):
    """A tensor has a shape that the model can't take."""


class CheckpointError(ModelError):
    """A checkpoint is missing, damaged, not finite, or of another architecture."""


class ExportError(ModelError):
    """A model can't be exported: the message names the operation."""


class BundleError(ModelError):
    """A bundle folder is missing a file or has a schema that this version can't read."""


class EnvironmentProblem(LeanvitError):
    """The machine lacks something: a package, disk space, a free folder."""

    exit_code = EXIT_ENVIRONMENT


class MissingDependencyError(EnvironmentProblem):
    """An optional package is not installed."""


class RunLockedError(EnvironmentProblem):
    """Another process is writing to the same run folder."""


class NumericalError(LeanvitError):
    """A loss, a weight or an output is not finite."""

    exit_code = EXIT_VERIFICATION


class VerificationError(LeanvitError):
    """An artifact does not return what was recorded for it, or is not the file that was recorded."""

    exit_code = EXIT_VERIFICATION


class PartialError(LeanvitError):
    """Some inputs were skipped; everything else was done and is kept."""

    exit_code = EXIT_PARTIAL


EXTRAS = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "peers",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "mlflow": "trackers",
    "datasets": "data",
    "pyarrow": "parquet",
    "pyarrow.parquet": "parquet",
    "braceexpand": "data",
    "pycocotools": "tasks",
    "pycocotools.mask": "tasks",
    "faster_coco_eval": "tasks",
    "segmentation_models_pytorch": "tasks",
    "transformers": "transformers",
    "ray": "ray",
    "fsspec": "ray",
    "s3fs": "s3",
    "skimage": "tasks",
    "fastapi": "serve",
    "uvicorn": "serve",
    "h11": "serve",
    "starlette": "serve",
    "prometheus_client": "serve",
    "python_multipart": "serve",
}
# Modules whose package has another name on PyPI.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def require(module: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Raises MissingDependencyError where the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise_missing(module)


def raise_missing(module: str) -> NoReturn:
    """Raise MissingDependencyError with the command that installs `module`."""
    raise MissingDependencyError(f"{module} is not installed. Run: {how_to_install(module)}")


def require_store(url: str, error: ImportError) -> NoReturn:
    """Raise MissingDependencyError for the client that fsspec needs for a URL."""
    clients = {"s3": '"leanvit[s3]"', "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs",
               "http": "aiohttp", "https": "aiohttp"}  # fmt: skip
    scheme = url.split("://", 1)[0]
    raise MissingDependencyError(f"{url} needs a client: pip install {clients.get(scheme, scheme)}") from error


def how_to_install(module: str) -> str:
    """The command that installs `module`: the extra that brings it, else its package."""
    extra = EXTRAS.get(module)
    return f'pip install "leanvit[{extra}]"' if extra else f"pip install {PACKAGES.get(module, module)}"


def is_installed(module: str) -> bool:
    """Whether `module` could be imported; nothing is imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent package that is missing or broken
        return False


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest known name, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""
