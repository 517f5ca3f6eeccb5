"""What the pass `reconstruct` has learned so far, on disk after every block, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.fx import GraphModule

from leanvit.config import MPTQConfig, to_dict
from leanvit.files import write_atomic

SUFFIX = ".blocks.safetensors"
"""Of the file, after the name of the journal of a search that stands beside it."""

GENERATOR = "generator"
"""Name of the tensor with the state of the random numbers; no quantizer or parameter has it."""


class BlockJournal:
    """The state of a quantized graph after the last block that was learned. notes: one of each block so far."""

    def __init__(self, path: str | Path | None, module: GraphModule, images: Tensor, config: MPTQConfig) -> None:
        """Note what the run is of: configuration, images, and the graph before the first block."""
        self.path = Path(path).with_suffix(SUFFIX) if path else None
        state = [float(value.double().sum()) for value in module.state_dict().values()]
        facts = [to_dict(config), list(images.shape), float(images.double().sum()), state]
        self.run = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.notes: list[dict[str, Any]] = []

    def restore(self, module: GraphModule, generator: torch.Generator) -> None:
        """Give a graph, the random numbers and the notes what the file holds, if it is of this run; a damaged file
        counts as none."""
        if self.path is None or not self.path.is_file():
            return
        try:
            with safe_open(str(self.path), "pt") as file:
                facts = file.metadata() or {}
                if facts.get("run") != self.run:
                    return
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
        except SafetensorError:
            return
        generator.set_state(tensors.pop(GENERATOR))
        module.load_state_dict(tensors)
        self.notes = json.loads(facts["notes"])

    def add(self, note: dict[str, Any], module: GraphModule, generator: torch.Generator) -> None:
        """Keep the note of a block, and the graph with it, at once on disk."""
        self.notes.append(note)
        if self.path is None:
            return
        tensors = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
        tensors[GENERATOR] = generator.get_state()
        write_atomic(self.path, save(tensors, {"run": self.run, "notes": json.dumps(self.notes)}))
