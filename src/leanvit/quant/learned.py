"""Pass `reconstruct`: what a quantized network has besides its bits is learned, block after block.

A block ends where few tensors are alive, as after a residual addition. Its weights (in steps of their quantizer), all
scales and what is added or multiplied by channel (biases, norms, LayerScale) go down the gradient of

    loss = global / global_0 + 2 local / local_0                                  (GLF-Q; _0: before the first step)
    local   mean squared error of what the block returns, from the float network's
    global  mean squared error of what the classifier reads, when the block's output goes on through the float rest

with gradients straight through every rounding (LSQ, arXiv 1902.08153), on the images and on variants of them. Blocks
before it are quantized already, so a block takes back what they lost. A quarter of the images is held out: of each
block the state is kept that has the least loss on them, which may be the one before the first step. The float function
and the bits stay: only scales, rounding and biases change, which costs nothing where the file runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from leanvit.progress import Bar, note
from leanvit.quant.block_journal import BlockJournal
from leanvit.quant.blocks import Block, blocks_of, run_nodes
from leanvit.quant.convolution_outputs import fit_output, sites_with_outputs
from leanvit.quant.graph import QuantGraph, get_tensor, head_sites, node_argument
from leanvit.quant.interpret import observe_nodes
from leanvit.quant.losses import divergence, outputs_of
from leanvit.quant.quantizers import ActivationQuantizer, WeightQuantizer
from leanvit.quant.variants import variants_of, with_variants
from leanvit.quant.work import Work

STEPS = 600
"""Of a block at most; GLF-Q takes thousands on a GPU. vit_micro at W3A3, 1,024 images, seed 0: the divergence on test
images goes from 0.048 to 0.036 in 200 steps and to 0.028 in 600."""

MOST_MACS = 2e13
"""Multiply-adds that the steps of all blocks may take: a ViT-S at 224 px then takes 180 steps a block of 0.2 s each on
two cores of an Intel Xeon at 2.8 GHz, and all of mode learned 992 s (benchmarks/results/ptq_cost.json). A number of
steps by what they compute is the same on every machine, unlike --minutes."""

LOOKS = 8
"""At the images that are held out, evenly over the steps of a block, the last one after the last step."""

TIMED_STEPS = 2
"""After which it is known how many the given minutes allow; the first of them also warms up."""

LOOK_STEPS = 2.0
"""What a look and its share of the way to the next block take, in steps: an estimate, for --minutes alone."""

BATCH = 16
"""Images a step, and at once where nothing is learned."""

FEW, FEWER = 4, 1
"""Images a step, and how many of them go on through the rest, of a network that is too large for STEPS of all: steps
count for more than images. vit_micro at W3A3, 128 images, seed 0, steps of 16 images and 4, 8 and 2, 8 and 1, 4 and 1
for as many multiply-adds (48 to 192 steps): divergence on test images 0.0544, 0.0540, 0.0498, 0.0497, from 0.0557."""

LOCAL_SHARE = 2.0
"""Weight of the local error beside the global one (GLF-Q)."""

WEIGHT_RATE, SCALE_RATE, CHANNEL_RATE = 2e-2, 2e-3, 1e-3
"""Learning rates of Adam: weights in steps of their quantizer, logarithms of scales, and what acts by channel, in units
of its own root mean square."""

HELD_OUT = 4
"""One of so many images decides whether a block is kept."""

TINY = 1e-12
"""Below which an error or a signal counts as this much, so that none is divided by zero."""


class LearnedWeight(nn.Module):
    """Stands for a WeightQuantizer while it is learned: integers that may lie between two, and the logarithm of what
    the scale is multiplied by."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.first = quantizer.scale.clone()
        self.steps = nn.Parameter(quantizer.codes.float())
        self.log_scale = nn.Parameter(torch.zeros_like(quantizer.scale))

    def forward(self) -> Tensor:
        """The dequantized weight; its gradient goes straight through the rounding."""
        low, high = self.quantizer.low, self.quantizer.high
        steps = self.steps + (self.steps.round() - self.steps).detach()
        scale = self.first * self.log_scale.exp()
        return steps.clamp(low, high) * scale.view(-1, *[1] * (steps.dim() - 1))

    def remember(self) -> None:
        """Let the quantizer have what is learned by now."""
        integers = self.steps.detach().round().clamp(self.quantizer.low, self.quantizer.high)
        self.quantizer.set_integers(integers, self.first * self.log_scale.detach().exp())

    def settled(self) -> WeightQuantizer:
        """The quantizer as it was remembered."""
        return self.quantizer


class LearnedActivation(nn.Module):
    """Stands for an ActivationQuantizer while it is learned: the logarithm of what its scale is multiplied by."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.first = self.remembered = quantizer.scale.clone()
        self.log_scale = nn.Parameter(torch.zeros_like(quantizer.scale))

    def forward(self, x: Tensor) -> Tensor:
        """`x` quantized with the scale so far."""
        self.quantizer.scale = self.first * self.log_scale.exp()
        return self.quantizer(x)

    def remember(self) -> None:
        """Note what is learned by now."""
        self.remembered = self.first * self.log_scale.detach().exp()

    def settled(self) -> ActivationQuantizer:
        """The quantizer as it was remembered."""
        self.quantizer.scale = self.remembered
        return self.quantizer


@dataclass
class _Walk:
    """What goes on from block to block.

    truth, values: the tensors between two blocks, (N, ...) by name, of the float network and of the quantized one.
    images: the calibration images, `count` of them, and variants behind. features: what the classifiers read in the
    float network. most_steps: of a block. batch: images a step, `ahead` of which go on through the rest. held, trained:
    the images that decide, and those that are learned from, by index.
    """

    images: Tensor
    count: int
    graph: QuantGraph
    reference: GraphModule
    features: dict[str, Tensor]
    generator: torch.Generator
    most_steps: int = 0
    batch: int = BATCH
    ahead: int = BATCH
    truth: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    @property
    def held(self) -> Tensor:
        return torch.arange(0, self.count, HELD_OUT)

    @property
    def trained(self) -> Tensor:
        numbers = torch.arange(len(self.images))
        return numbers[(numbers % HELD_OUT != 0) | (numbers >= self.count)]


@dataclass(frozen=True)
class Errors:
    """Squared errors of one block, each as a share of the squared signal: of what it returns, and of the features."""

    local: Tensor
    features: Tensor | None

    def loss(self, first: Errors) -> Tensor:
        """The loss of the pass; `first`: the errors before the first step."""
        loss = LOCAL_SHARE * self.local / first.local.clamp(min=TINY)
        if self.features is not None and first.features is not None:
            loss = loss + self.features / first.features.clamp(min=TINY)
        return loss


def learn(work: Work) -> None:
    """The pass: learn every block of the quantized graph, then set the quantizers of convolutions' outputs anew.

    What was learned goes again where outputs diverge more for it, as they may: no block is judged by them. They are
    those on a variant of each calibration image, as the closed forms have fitted the images themselves.
    """
    if work.quantized is None:
        return
    graph, reference = work.quantized, work.graph.module
    judges = variants_of(work.images, torch.Generator().manual_seed(work.config.seed + 1))
    truth = outputs_of(reference, judges)
    before = divergence(truth, outputs_of(graph.module, judges), graph.measure)
    closed_form = deepcopy(graph.module.state_dict())
    work.notes["reconstruct"] = _learn_blocks(work, graph)
    after = divergence(truth, outputs_of(graph.module, judges), graph.measure)
    work.notes["learned"] = {"loss": {"before": before, "after": after}, "taken": after <= before}
    if after <= before:
        _set_outputs(graph, work.images)
        return
    note(f"reconstruct: loss {after:.4g} on variants of the images, {before:.4g} before: what was learned is left out")
    graph.module.load_state_dict(closed_form)


def _learn_blocks(work: Work, graph: QuantGraph) -> list[dict[str, Any]]:
    """Learn one block after another, or go on where a journal ends; returns a note of each."""
    reference = work.graph.module
    for parameter in (*graph.module.parameters(), *reference.parameters()):
        parameter.requires_grad_(False)
    journal = BlockJournal(work.journal, graph.module, work.images, work.config)
    generator = torch.Generator().manual_seed(work.config.seed)
    images = with_variants(work.images, HELD_OUT, generator)
    state = _Walk(images, len(work.images), graph, reference, _features(work, images), generator)
    blocks = blocks_of(graph, reference, state.features)
    if affordable_steps(blocks, BATCH, BATCH) < STEPS:
        state.batch, state.ahead = FEW, FEWER
    state.most_steps = STEPS if work.config.minutes else affordable_steps(blocks, state.batch, state.ahead)
    journal.restore(graph.module, state.generator)
    known = len(journal.notes)
    deadline = time.monotonic() + 60 * work.config.minutes if work.config.minutes else math.inf
    with Bar("reconstructing", len(blocks)) as bar:
        for index, block in enumerate(blocks):
            targets = _run_all(state, reference, block.reference, state.truth, block)
            if index >= known:
                now = time.monotonic()
                learned = _learn_block(state, block, targets, now + (deadline - now) / (len(blocks) - index))
                journal.add(learned, graph.module, state.generator)
            state.values = _run_all(state, graph.module, block.quantized, state.values, block)
            state.truth = targets
            found = journal.notes[index]
            bar.advance(1, f"{block.name}, loss {found['before']:.3g} -> {found['after']:.3g}")
    return journal.notes


@torch.no_grad()
def _features(work: Work, images: Tensor) -> dict[str, Tensor]:
    """What the classifiers read in the float network, or what it returns where it has none; (N, ...) by name."""
    graph, module = work.graph, work.graph.module
    nodes = graph.nodes()
    wanted = {node_argument(nodes[graph.sites[name].node], 0).name for name in head_sites(graph)}
    if not wanted:
        wanted = {source.name for node in module.graph.nodes if node.op == "output" for source in node.all_input_nodes}
    found: dict[str, list[Tensor]] = {name: [] for name in sorted(wanted)}
    for batch in torch.split(images, BATCH):
        observe_nodes(module, wanted, batch, lambda name, value: found[name].append(value))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _errors(state: _Walk, block: Block, targets: dict[str, Tensor], rows: Tensor, ahead: int = BATCH) -> Errors:
    """Errors of a block on the images with these numbers, as the quantized graph is now. targets: what the float block
    returns, (N, ...). ahead: how many images go on through the rest."""
    images = state.images[rows]
    given = {name: state.values[name][rows] for name in block.reads}
    found = run_nodes(state.graph.module, block.quantized, given, images)
    local = share_of_signal(
        {name: found[name] for name in block.writes}, {name: values[rows] for name, values in targets.items()}
    )
    if not block.rest:
        return Errors(local, None)
    some = {name: found[name][:ahead] for name in block.writes}
    reached = run_nodes(state.reference, block.rest, some, images[:ahead])
    features = {name: values[rows[:ahead]] for name, values in state.features.items()}
    return Errors(local, share_of_signal({name: reached[name] for name in features}, features))


def share_of_signal(found: dict[str, Tensor], true: dict[str, Tensor]) -> Tensor:
    """Sum over some tensors of the squared error as a share of the squared signal, (); differentiable."""
    shares = [
        (values.float() - true[name].float()).square().sum() / true[name].float().square().sum().clamp(min=TINY)
        for name, values in found.items()
    ]
    return torch.stack(shares).sum()


@torch.no_grad()
def _held_out(state: _Walk, block: Block, targets: dict[str, Tensor]) -> Errors:
    """Errors of a block on the images that are held out."""
    parts = [_errors(state, block, targets, rows) for rows in torch.split(state.held, BATCH)]
    features = [part.features for part in parts if part.features is not None]
    local = torch.stack([part.local for part in parts]).mean()
    return Errors(local, torch.stack(features).mean() if features else None)


def _learn_block(state: _Walk, block: Block, targets: dict[str, Tensor], until: float) -> dict[str, Any]:
    """Learn one block, and keep of what was learned what the images held out like best, if they like it at all.

    until: time.monotonic() to stop at. Returns a note for the report.
    """
    first = _held_out(state, block, targets)
    learned = Learned(state.graph.module, block.quantized)
    best = before = float(first.loss(first))
    steps = kept = 0
    for steps, total in _steps(state, block, targets, learned, first, until):
        if steps % max(1, total // LOOKS) == 0 or steps == total:
            found = float(_held_out(state, block, targets).loss(first))
            if found < best:
                best, kept = found, steps
                learned.remember()
    learned.end()
    return {"block": block.name, "before": before, "after": best, "steps": steps, "kept": kept}


def _steps(
    state: _Walk, block: Block, targets: dict[str, Tensor], learned: Learned, first: Errors, until: float
) -> Iterator[tuple[int, int]]:
    """Gradient steps, after each its number and how many there will be, or what the time allows.

    Rates fall along a cosine to 0 at the last step.
    """
    if not learned.groups or not len(state.trained):
        return
    optimizer = torch.optim.Adam(learned.groups)
    rates = [group["lr"] for group in optimizer.param_groups]
    total, step, started = state.most_steps, 0, time.monotonic()
    while step < total and time.monotonic() < until:
        share = 0.5 * (1 + math.cos(math.pi * step / total))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate
        drawn = torch.randperm(len(state.trained), generator=state.generator)[: state.batch]
        with torch.enable_grad():
            loss = _errors(state, block, targets, state.trained[drawn], state.ahead).loss(first)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        if step == TIMED_STEPS:
            total = _steps_until(time.monotonic() - started, until - started, total)
        yield step, total


def affordable_steps(blocks: Sequence[Block], batch: int, ahead: int) -> int:
    """How many steps every block may have, so that all of them keep within MOST_MACS. batch: images a step. ahead: of
    them through the rest.

    A step goes forward, and backward to values and to weights, through the block; through the rest not to weights.
    """
    once = sum(3 * batch * block.macs + 2 * ahead * block.rest_macs for block in blocks)
    return max(LOOKS, min(STEPS, int(MOST_MACS / max(1, once))))


def _steps_until(seconds: float, allowed: float, most: int) -> int:
    """How many steps a block has time for, `most` at most. seconds: that TIMED_STEPS took. allowed: for all and the
    looks."""
    if math.isinf(allowed):
        return most
    return max(TIMED_STEPS, min(most, int(allowed / seconds * TIMED_STEPS - LOOK_STEPS * LOOKS)))


@torch.no_grad()
def _run_all(
    state: _Walk, module: GraphModule, nodes: Sequence[Node], held: dict[str, Tensor], block: Block
) -> dict[str, Tensor]:
    """What a block returns in one of the two graphs for all images, (N, ...) by name. held: what it reads."""
    parts: dict[str, list[Tensor]] = {name: [] for name in block.writes}
    for rows in torch.split(torch.arange(len(state.images)), BATCH):
        found = run_nodes(module, nodes, {name: held[name][rows] for name in block.reads}, state.images[rows])
        for name in block.writes:
            parts[name].append(found[name])
    return {name: torch.cat(values) for name, values in parts.items()}


class Learned:
    """What is learned of one block: its quantizers, replaced until `end`, and its parameters by channel.

    groups: of parameters with their learning rates, as optimizers take them.
    """

    def __init__(self, module: GraphModule, nodes: Sequence[Node]) -> None:
        self.module = module
        self.replaced: dict[str, LearnedWeight | LearnedActivation] = {}
        self.channels: dict[str, Tensor] = {}
        self.groups: list[dict[str, Any]] = []
        for node in nodes:
            path = str(node.target)
            if node.op == "call_module":
                self._replace(path)
            elif node.op == "get_attr" and path not in self.channels and _is_by_channel(get_tensor(module, path)):
                self._take(path, get_tensor(module, path))

    def _replace(self, path: str) -> None:
        quantizer = self.module.get_submodule(path)
        if isinstance(quantizer, WeightQuantizer):
            learned: LearnedWeight | LearnedActivation = LearnedWeight(quantizer)
            self.groups.append({"params": [learned.steps], "lr": WEIGHT_RATE})
        elif isinstance(quantizer, ActivationQuantizer):
            learned = LearnedActivation(quantizer)
        else:
            return
        self.groups.append({"params": [learned.log_scale], "lr": SCALE_RATE})
        self.module.set_submodule(path, learned)
        self.replaced[path] = learned

    def _take(self, path: str, tensor: Tensor) -> None:
        self.channels[path] = tensor.detach().clone()
        tensor.requires_grad_(True)
        rms = float(tensor.detach().square().mean().sqrt())
        self.groups.append({"params": [tensor], "lr": CHANNEL_RATE * (rms or 1.0)})

    def remember(self) -> None:
        """What is learned by now is what `end` will leave."""
        for learned in self.replaced.values():
            learned.remember()
        self.channels = {path: get_tensor(self.module, path).detach().clone() for path in self.channels}

    def end(self) -> None:
        """Put the quantizers back, as they were remembered last, or else as they were."""
        for path, learned in self.replaced.items():
            self.module.set_submodule(path, learned.settled())
        for path, remembered in self.channels.items():
            tensor = get_tensor(self.module, path)
            tensor.requires_grad_(False)
            tensor.data.copy_(remembered)


def _is_by_channel(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.is_floating_point()


@torch.no_grad()
def _set_outputs(graph: QuantGraph, images: Tensor) -> None:
    """Set the quantizers of convolutions' outputs on what these return now."""
    convolutions = {name: site for name, site in sites_with_outputs(graph).items() if site in graph.outputs}
    if convolutions:
        observe_nodes(
            graph.module, set(convolutions), images,
            lambda name, value: graph.outputs.__setitem__(convolutions[name], fit_output(value)),
        )  # fmt: skip
