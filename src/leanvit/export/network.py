"""What is exported, of any task: a network as graphs, in the form that its profile runs, and as ONNX."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from leanvit.annotations import Outputs
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Opset
from leanvit.data.loader import to_input
from leanvit.errors import ConfigError
from leanvit.export.gate.given import images_at_a_time
from leanvit.export.gate.rounding import some_tensor
from leanvit.export.onnx.detection import assemble
from leanvit.export.onnx.lower import lower
from leanvit.export.onnx.profiles import Profile, pick
from leanvit.export.simulated import profile_for, say_other_profile, say_what_it_loses, simulated
from leanvit.imaging import Pixels
from leanvit.quant import QuantizedModel
from leanvit.quant.graph import QuantGraph, trace
from leanvit.quant.parts import QuantizedNetwork, models_of, own_sites
from leanvit.quant.plan import Plan
from leanvit.tasks.build import task_of_network
from leanvit.tasks.detect import Detector
from leanvit.tasks.parts import WHOLE, example_of, output_names, parts_of

Model = nn.Module | QuantizedModel | QuantizedNetwork


@dataclass(frozen=True)
class Joining:
    """How the lowered parts of a network become one graph.

    join: (onnx.ModelProto by part, network, (height, width)) -> onnx.ModelProto. opset: the one that it writes.
    """

    join: Callable[[dict[str, Any], Any, tuple[int, int]], Any]
    opset: Opset


JOININGS: dict[type[nn.Module], Joining] = {
    # ONNX Runtime has no RoIAlign of a later opset.
    Detector: Joining(assemble, opset=21),
}
"""A network in several parts of a task from outside the package adds a row here."""


@dataclass(frozen=True)
class Exported:
    """A network on its way into a file.

    model: as it was given. info: its task, labels, preprocessing and origin. graphs: of every part. profile: of all.
    """

    model: Model
    info: CheckpointInfo
    graphs: Mapping[str, QuantGraph]
    profile: Profile

    @property
    def is_quantized(self) -> bool:
        """Whether it has a plan."""
        return isinstance(self.model, QuantizedModel | QuantizedNetwork)

    @property
    def plan(self) -> Plan:
        """Bits of every site; empty for a float network."""
        return {} if isinstance(self.model, nn.Module) else self.model.plan

    @property
    def network(self) -> nn.Module | None:
        """The float network; None for a quantized model that is one graph."""
        if isinstance(self.model, QuantizedNetwork):
            return self.model.network
        return None if isinstance(self.model, QuantizedModel) else self.model

    def in_torch(self, lifted: Collection[str] = ()) -> nn.Module:
        """What the file is compared with: for a float file the network itself, not the graph that it is made of."""
        if isinstance(self.model, nn.Module):
            return self.model
        return simulated(self.model, self.profile, lifted)

    @property
    def _joining(self) -> Joining | None:
        return next((row for kind, row in JOININGS.items() if isinstance(self.network, kind)), None)

    def opset(self, asked: Opset) -> Opset:
        """The opset of the file: the one that was asked for, but where parts are joined that of their joining."""
        return self._joining.opset if self._joining else asked

    def in_onnx(self, lifted: Collection[str], opset: Opset, *, smallest: bool = False) -> Any:
        """One onnx.ModelProto: `images` (batch, H, W, 3) uint8 in, the task's outputs out, dynamic batch.

        smallest: without names that only people read.
        """
        joining, opset = self._joining, self.opset(opset)
        first = next(iter(self.graphs))
        names = self._output_names()
        lowered = {
            name: lower(
                graph,
                self.info.preprocess if name == first else None,
                self.profile,
                lifted if isinstance(self.model, nn.Module) else own_sites(self.model, name, lifted),
                outputs=names[name],
                opset=opset,
                smallest=smallest,
            )
            for name, graph in self.graphs.items()
        }
        if joining:
            return joining.join(lowered, self.network, self.info.preprocess.input_size)
        if len(lowered) > 1:
            raise ConfigError(
                f"{type(self.network).__name__} has the parts {', '.join(lowered)}, expected one, or a way to join "
                "them. Add a row to leanvit.export.network.JOININGS."
            )
        return lowered[first]

    def _output_names(self) -> dict[str, tuple[str, ...]]:
        if self.network is not None:
            return output_names(self.network, self.info)
        return {WHOLE: task_of_network(self.info).output_names}


def exported(model: Model, info: CheckpointInfo, profile: str) -> Exported:
    """A network as graphs, with the profile of that name. Raises ConfigError for one that does not fit."""
    if not isinstance(model, nn.Module):
        chosen = profile_for(model, profile)
        say_other_profile(model, chosen)
        say_what_it_loses(model, chosen)
        return Exported(model, info, {name: part.graph for name, part in models_of(model).items()}, chosen)
    chosen = pick(profile)
    parts = {name: part.eval().cpu() for name, part in parts_of(model.eval()).items()}
    return Exported(
        model, info, {name: trace(part, example_of(model, name, info)) for name, part in parts.items()}, chosen
    )


def network_outputs(network: nn.Module, info: CheckpointInfo, pixels: Pixels) -> Outputs:
    """Outputs of a torch network, of float32 or float64, for prepared images (N, H, W, 3) uint8, as a bundle's."""
    like, task = some_tensor(network), task_of_network(info)
    step, found = images_at_a_time(pixels), []
    for start in range(0, len(pixels), step):
        x = to_input(torch.from_numpy(pixels[start : start + step]), info.preprocess, like.device).to(like.dtype)
        found.append(task.outputs(network, x) | task.more_outputs(network, x))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}
