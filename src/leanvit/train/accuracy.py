"""Accuracy of a network over labelled images, each counted once however many processes share the work."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from leanvit.data.loader import Loader, to_input
from leanvit.errors import DataError, NumericalError
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
    """Top-1 and top-5 of `model` over all images of `loader`, each counted once, in float32.

    processes: share the images, every process taking each n-th; all get the whole result.
    Raises NumericalError where a logit is NaN or infinite, DataError where no image could be read.
    """
    processes = processes or Processes()
    model.eval()
    share = np.arange(processes.rank, len(loader.images), processes.world)
    batches = 0
    counts = torch.zeros(4, dtype=torch.float64)
    for pixels, labels in loader.batches(share):
        logits = model(to_input(pixels, loader.preprocess, device)).float()
        labels = labels.to(logits.device)
        if not logits.isfinite().all():
            raise NumericalError("the model's logits are NaN or infinite. Train again with a lower --lr.")
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        batches += 1
        loss = F.cross_entropy(logits, labels, reduction="sum")
        counts += torch.tensor([len(labels), int(top[:, 0].sum()), int(top.sum()), float(loss)], dtype=torch.float64)
    most = math.ceil(math.ceil(len(loader.images) / processes.world) / loader.batch_size)
    for _ in range(most - batches if processes.world > 1 else 0):
        # Processes that share weights (FSDP) must call the network equally often.
        model(torch.zeros(1, 3, *loader.preprocess.input_size, device=device))
    images, correct, correct5, total = processes.sum(counts.to(device))[0].tolist()
    if not images:
        raise DataError("no image could be read, so there is no accuracy. Check --data.")
    return Accuracy(100 * correct / images, 100 * correct5 / images, total / images, int(images), int(correct))
