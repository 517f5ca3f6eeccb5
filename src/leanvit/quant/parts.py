"""Quantization of a task's network: every part by MPTQ, and the metric of what comes out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from leanvit.checkpoint import CheckpointInfo
from leanvit.config import Budget, LoadOptions, MPTQConfig, to_dict
from leanvit.errors import CalibrationError, CheckpointError, ConfigError
from leanvit.files import read_json, write_json
from leanvit.load.api import load
from leanvit.load.describe import of_quantized
from leanvit.progress import note
from leanvit.quant import QuantizedModel, quantize
from leanvit.quant.elsewhere import Elsewhere
from leanvit.quant.mptq import quantize_part
from leanvit.quant.store import QUANTIZED_NAME, is_quantized, load_quantized, save_quantized
from leanvit.runtime.task import task_named
from leanvit.tasks.build import build_network
from leanvit.tasks.parts import WHOLE, CutNetwork, example_of, part_inputs, parts_of, with_parts

REPORT_NAME = "quantize.json"


@dataclass
class QuantizedNetwork:
    """A task's network with quantized parts.

    network: the float network, which holds what is not quantized (proposals, NMS). parts: by name, in order.
    report: JSON values: metrics in float and quantized, average bits, bytes.
    """

    network: nn.Module
    parts: dict[str, QuantizedModel]
    report: dict[str, Any]

    @property
    def module(self) -> nn.Module:
        """The simulated quantized network, with the float network's interface."""
        return with_parts(self.network, {name: part.module for name, part in self.parts.items()})

    @property
    def plan(self) -> dict[str, tuple[int, int]]:
        """Bits of every site; names begin with that of their part."""
        return {f"{part}.{site}": bits for part, model in self.parts.items() for site, bits in model.plan.items()}


def models_of(model: QuantizedModel | QuantizedNetwork) -> dict[str, QuantizedModel]:
    """The quantized models of a network by the name of their part; a classifier's is the one part of it."""
    return model.parts if isinstance(model, QuantizedNetwork) else {WHOLE: model}


def site_name(model: QuantizedModel | QuantizedNetwork, part: str, site: str) -> str:
    """What `model.plan` calls a site of one of its parts."""
    return f"{part}.{site}" if isinstance(model, QuantizedNetwork) else site


def own_sites(model: QuantizedModel | QuantizedNetwork, part: str, sites: Collection[str]) -> list[str]:
    """Those of some sites, named as in `model.plan`, that are in a part, as its own graph names them."""
    start = site_name(model, part, "")
    return [site.removeprefix(start) for site in sites if site.startswith(start)]


def quantize_network(
    network: nn.Module,
    info: CheckpointInfo,
    x: Tensor,
    config: MPTQConfig | None = None,
    *,
    plan: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    elsewhere: Elsewhere | None = None,
) -> QuantizedNetwork:
    """Quantize every part of a task's network; the network itself is not changed.

    x: (N, 3, H, W) float32 normalised calibration pictures, or crops for pose. plan: bits of every site by its whole
    name. folder: keeps the journals of a search of bits and of what is learned.
    Raises CalibrationError where no box was found in x, and what leanvit.quantize raises.
    """
    config = config or MPTQConfig()
    if config.keep_tokens != 1.0:
        raise ConfigError(
            f"keep_tokens is {config.keep_tokens}, and a network for the task '{info.task}' reads a map of all tokens. "
            "Leave keep_tokens out."
        )
    budgets = _budgets(parts_of(network.eval()), config.budget)
    inputs = part_inputs(network, x, config.seed)
    measures = network.part_measures((x.shape[-2], x.shape[-1])) if isinstance(network, CutNetwork) else {}
    quantized: dict[str, QuantizedModel] = {}
    for name, part in parts_of(network).items():
        if not len(inputs[name]):
            raise CalibrationError(
                f"the network found nothing in {len(x)} calibration pictures, so its {name} head can't be calibrated. "
                "Train it further, or give pictures with objects."
            )
        own = None
        if plan is not None:
            own = {site.removeprefix(f"{name}."): bits for site, bits in plan.items() if site.startswith(f"{name}.")}
        journal = Path(folder) / f"search_{name}.jsonl" if folder else None
        note(f"quantizing {name}: {len(inputs[name])} inputs")
        own_config = replace(config, budget=budgets[name])
        measure = measures.get(name)
        quantized[name] = quantize_part(
            part, inputs[name], own_config, plan=own, journal=journal, measure=measure, elsewhere=elsewhere
        )
        quantized[name] = replace(quantized[name], preprocess=info.preprocess)
    return QuantizedNetwork(network, quantized, _sizes(quantized, config))


def quantize_any(
    network: nn.Module,
    info: CheckpointInfo,
    x: Tensor,
    config: MPTQConfig | None = None,
    *,
    plan: dict[str, Any] | None = None,
    folder: str | Path | None = None,
    elsewhere: Elsewhere | None = None,
) -> QuantizedModel | QuantizedNetwork:
    """Quantize a network of any task: a classifier is one graph, all others have parts (`quantize_network`)."""
    if task_named(info.task).data != "images":
        return quantize_network(network, info, x, config, plan=plan, folder=folder, elsewhere=elsewhere)
    journal = Path(folder) / "search.jsonl" if folder else None
    return replace(
        quantize(network, x, config, plan=plan, journal=journal, elsewhere=elsewhere), preprocess=info.preprocess
    )


def _budgets(parts: dict[str, nn.Module], budget: Budget | None) -> dict[str, Budget | None]:
    """What the plan of each part may cost: average bits are those of each, bytes are shared by their parameters.

    Raises ConfigError for a limit that can't be shared.
    """
    if budget is None or len(parts) == 1 or budget.average_bits is not None:
        return dict.fromkeys(parts, budget)
    if budget.model_bytes is None:
        raise ConfigError(
            f"the network has the parts {', '.join(parts)}, which run as often as there are objects, so that bitops "
            "and latency_ms of an image are not known. Expected a budget of average_bits or model_bytes."
        )
    counts = {name: sum(parameter.numel() for parameter in part.parameters()) for name, part in parts.items()}
    shares = {name: budget.model_bytes * count // sum(counts.values()) for name, count in counts.items()}
    return {name: replace(budget, model_bytes=share) for name, share in shares.items()}


def _sizes(parts: dict[str, QuantizedModel], config: MPTQConfig) -> dict[str, Any]:
    keys = ("quantized_bytes", "float_bytes")
    totals: dict[str, Any] = {key: sum(part.report[key] for part in parts.values()) for key in keys}
    return totals | {"config": to_dict(config), "parts": {name: len(part.plan) for name, part in parts.items()}}


def save_network(folder: str | Path, quantized: QuantizedNetwork, info: CheckpointInfo) -> Path:
    """Write a folder for each part, and plan.json and quantize.json over all of them."""
    folder = Path(folder)
    for name, part in quantized.parts.items():
        save_quantized(folder / name, part, info)
    write_json(folder / "plan.json", quantized.plan)
    write_json(folder / REPORT_NAME, quantized.report)
    return folder


def load_any(
    spec: str, options: LoadOptions | None = None
) -> tuple[nn.Module | QuantizedModel | QuantizedNetwork, CheckpointInfo]:
    """Float or quantized network of any task, and its info.

    spec: whatever leanvit.load takes, or a folder of a quantized network, which of the options takes its labels alone.
    Raises CheckpointError, ConfigError.
    """
    model: QuantizedModel | QuantizedNetwork
    if is_quantized(spec):
        model, info = load_quantized(spec)
    elif is_quantized_network(spec):
        model, info = load_quantized_network(spec)
    else:
        return load(spec, options)
    return model, of_quantized(info, options, spec)


def is_quantized_network(folder: str | Path) -> bool:
    """Whether `folder` holds the quantized parts of a task's network."""
    return bool(_part_folders(Path(folder)))


def _part_folders(folder: Path) -> list[str]:
    """Names of the parts that were saved in a folder, in the order of the network where its report tells it.

    A run may hold whole quantized classifiers, which are none.
    """
    if not (folder / REPORT_NAME).is_file():
        return []
    order = list(read_json(folder / REPORT_NAME).get("parts", {}))
    found = sorted(file.parent.name for file in folder.glob(f"*/{QUANTIZED_NAME}"))
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))


def load_quantized_network(folder: str | Path) -> tuple[QuantizedNetwork, CheckpointInfo]:
    """Build a quantized network from its folder.

    Raises CheckpointError where a part is missing, damaged or of another network than the first.
    """
    folder = Path(folder)
    names = _part_folders(folder)
    if not names:
        raise CheckpointError(f"{folder}: no quantized parts inside. Quantize first: leanvit quantize CHECKPOINT")
    built: list[tuple[CheckpointInfo, nn.Module]] = []

    def make(name: str, info: CheckpointInfo) -> tuple[nn.Module, Tensor]:
        if not built:
            built.append((info, build_network(info).eval()))
        first, network = built[0]
        parts = parts_of(network)
        if info != first or name not in parts:
            raise CheckpointError(
                f"{folder}: part {name} is of another network than {names[0]}, expected parts of one. "
                "Quantize again, into an empty folder."
            )
        return parts[name], example_of(network, name, info)

    found = {name: load_quantized(folder / name, partial(make, name))[0] for name in names}
    info, network = built[0]
    missing = [name for name in parts_of(network) if name not in found]
    if missing:
        raise CheckpointError(f"{folder}: the parts {', '.join(missing)} are missing. Quantize again.")
    ordered = {name: found[name] for name in parts_of(network)}
    return QuantizedNetwork(network, ordered, read_json(folder / REPORT_NAME)), info
