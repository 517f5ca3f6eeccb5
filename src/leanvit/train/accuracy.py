"""Accuracy of a network over labelled images, each counted once however many processes share the work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from leanvit.data.loader import Loader, to_input
from leanvit.runtime.tasks.classify import accuracy, counts, predictions
from leanvit.train.processes import Processes


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over `images` images, in percent; loss is the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int
    correct: int


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, device: torch.device | str = "cpu", processes: Processes | None = None
) -> Accuracy:
    """Top-1 and top-5 of `model` over all images of `loader`, each counted once; the network runs in float32.

    processes: share the images, every process taking each n-th; all get the whole result.
    Raises NumericalError where a logit is NaN or infinite, DataError where no image could be read.
    """
    processes = processes or Processes()
    model.eval()
    share = np.arange(processes.rank, len(loader.images), processes.world)
    batches, total = 0, np.zeros(4)
    for pixels, labels in loader.batches(share):
        logits = model(to_input(pixels, loader.preprocess, device)).float()
        total += counts(predictions(logits.cpu().numpy(), labels.numpy(), loader.images.name))
        batches += 1
    most = math.ceil(math.ceil(len(loader.images) / processes.world) / loader.batch_size)
    for _ in range(most - batches if processes.world > 1 else 0):
        # Processes that share weights (FSDP) must call the network equally often.
        model(torch.zeros(1, 3, *loader.preprocess.input_size, device=device))
    summed = processes.sum(torch.from_numpy(total).to(device))[0]
    return Accuracy(**accuracy(summed.cpu().numpy(), loader.images.name))
