"""What is measured: a checkpoint, a quantized model or a bundle of any task as a function from pixels to outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs
from leanvit.bench import machine
from leanvit.config import Preprocess, ValConfig
from leanvit.errors import ConfigError
from leanvit.evaluation.measure import Predict
from leanvit.runtime.bundle import is_bundle
from leanvit.runtime.predictor import Predictor
from leanvit.runtime.task import Task, task_named

if TYPE_CHECKING:
    import torch

    from leanvit.checkpoint import CheckpointInfo


@dataclass(frozen=True)
class Subject:
    """A model, ready to be measured.

    outputs: images (N, H, W, 3) uint8, prepared by `preprocess`, to outputs by name. task: what it does. kind: what it
    is.
    runtime: what computes, such as "PyTorch, cpu". threads: of the CPU, None where another device computes.
    simulated: low bits are computed in float, so its speed says nothing of what they are for.
    split: val_fraction and seed of the split that it was trained with, where it is known.
    thresholds: least probability of each label, where it has its own.
    """

    outputs: Callable[[NDArray[np.uint8]], Outputs]
    task: Task
    kind: str
    architecture: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    runtime: str
    threads: int | None
    simulated: bool
    split: Mapping[str, Any]
    thresholds: tuple[float, ...] = ()

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """A classifier's logits (N, classes) float32 of prepared images (N, H, W, 3) uint8."""
        return np.asarray(self.outputs(images)[self.task.continuous], np.float32)


def open_subject(config: ValConfig) -> Subject:
    """Load the model that a configuration names; a bundle without importing torch.

    Raises CheckpointError, BundleError, VerificationError; ConfigError where a runtime is asked for that can't be had.
    """
    if is_bundle(Path(config.model)):
        return _open_bundle(config)
    network, info, device, quantized = _open_network(config)
    task = task_named(info.task)
    return Subject(
        outputs=_network_outputs(network, info, device, task),
        task=task,
        kind="quantized model" if quantized else "checkpoint",
        architecture=info.architecture,
        labels=info.labels,
        preprocess=info.preprocess,
        runtime=f"PyTorch, {device}",
        threads=_torch_threads() if device.type == "cpu" else None,
        simulated=quantized,
        split={"val_fraction": info.val_fraction, "seed": info.seed},
        thresholds=_thresholds(config, task, info.metrics.get(task.answers.get("thresholds", "")), len(info.labels)),
    )


def _open_bundle(config: ValConfig) -> Subject:
    if given := config.load_options().given():
        raise ConfigError(
            f"{', '.join(given)}: of networks, but {config.model} is a bundle, which says it itself. Leave it out."
        )
    threads = config.threads or int(machine()["cores"])
    predictor = Predictor(config.model, threads=threads, runtime=config.runtime or "onnxruntime")
    manifest = predictor.manifest
    return Subject(
        outputs=predictor.outputs,
        task=predictor.task,
        kind="bundle",
        architecture=manifest.architecture,
        labels=manifest.labels,
        preprocess=manifest.preprocess,
        runtime=f"{predictor.runtime}, {manifest.profile}",
        threads=threads,
        simulated=manifest.simulated,
        split=manifest.data,
        thresholds=_thresholds(config, predictor.task, manifest.answers.get("thresholds"), len(manifest.labels)),
    )


def _thresholds(config: ValConfig, task: Task, own: Sequence[float] | None, labels: int) -> tuple[float, ...]:
    """Least probability of each label: what is asked for, else the model's own; none where it has none.

    Raises ConfigError where one is asked for and the task has none.
    """
    if config.score_threshold is None:
        return tuple(own or ())
    if "thresholds" not in task.answers:
        raise ConfigError(
            f"score_threshold does not fit task {task.name} of {config.model}, expected multilabel. Leave it out."
        )
    return (config.score_threshold,) * labels


def _open_network(config: ValConfig) -> tuple[torch.nn.Module, CheckpointInfo, torch.device, bool]:
    """Network of any task, info, device, and whether it is quantized; sets torch's threads.

    Raises CheckpointError, or ConfigError where a runtime or an absent device is asked for.
    """
    import torch

    from leanvit.export.simulated import measured_form
    from leanvit.quant.parts import load_any
    from leanvit.train.setup import pick_device

    _refuse_runtime(config)
    device = pick_device(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    model, info = load_any(config.model, config.load_options())
    if isinstance(model, torch.nn.Module):
        return model.to(device), info, device, False
    return measured_form(model, config.profile)[0].to(device), info, device, True


def _network_outputs(
    network: torch.nn.Module, info: CheckpointInfo, device: torch.device, task: Task
) -> Callable[[NDArray[np.uint8]], Outputs]:
    """A network as a function from prepared images (N, H, W, 3) uint8 to the outputs that its bundle returns."""
    if task.returns == "label":
        predict = network_predict(network, info.preprocess, device)
        return lambda images: {task.continuous: predict(images)}
    import torch

    from leanvit.data.loader import to_input
    from leanvit.tasks.build import raw_outputs

    network = network.eval()

    def outputs(images: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        return raw_outputs(network, cast(Any, task.name), to_input(pixels, info.preprocess, device))

    return outputs


def _refuse_runtime(config: ValConfig) -> None:
    if config.runtime:
        raise ConfigError(f"runtime is {config.runtime}, but {config.model} is no bundle. Make one: leanvit export")


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def network_predict(network: torch.nn.Module, preprocess: Preprocess, device: torch.device | str = "cpu") -> Predict:
    """A PyTorch network as a function from images (N, H, W, 3) uint8 to logits (N, classes) float32 in NumPy.

    The network is moved to `device` and put into eval mode.
    """
    import torch

    from leanvit.data.loader import to_input

    network = network.to(device).eval()

    def predict(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            # Copied where it is a view, which torch can't take or would warn of.
            pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
            logits = network(to_input(pixels, preprocess, device)).float()
        return np.asarray(logits.cpu().numpy(), np.float32)

    return predict
