"""Which networks of timm walk the whole line: float export, trace, W8A8, export and gate, with random weights.

    OMP_NUM_THREADS=1 python benchmarks/timm_networks.py --output benchmarks/results/timm_networks.json
    python benchmarks/tables.py      (writes what the file has into docs/timm_networks.md)

The list (timm_networks.txt) has a network a line: NAME | options that make it small | input size, where it is not the
model's own | words, which are not read. Weights are random (seed 0), BatchNorm has the statistics of some images, and
logits are centred on them, because what all images share would hide what differs. Calibration and golden images are
smooth random pictures and charts. Every network runs
in a process of its own with a time limit; rows are written as they come, and those that are there are not measured
again. SQNR is that of the ONNX file in ONNX Runtime against the simulation, the worst of the gate's batch sizes.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import json
import math
import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from leanvit import imaging
from leanvit.checkpoint import preprocess_for
from leanvit.config import ExportOptions, MPTQConfig, Preprocess
from leanvit.data.loader import to_input
from leanvit.errors import LeanvitError
from leanvit.export.api import export
from leanvit.export.gate.golden import charts, synthetic_images
from leanvit.export.onnx.lower import lower
from leanvit.export.simulated import profile_for, simulated
from leanvit.files import read_json, write_json
from leanvit.progress import note
from leanvit.quant import QuantizedModel, quantize
from leanvit.quant.graph import node_argument, quantizer_of, trace
from leanvit.quant.quantizers import ActivationQuantizer
from measure import SEED, facts

LIST = Path(__file__).with_suffix(".txt")
SECONDS = 900
CALIBRATION_IMAGES, CHART_IMAGES, CLASSES = 32, 8, 10
CALIBRATION_SEED = 1
"""Golden images have seed 0."""

# What the searches add is measured elsewhere (ptq.py); here only whether a network passes.
QUICK = MPTQConfig(range_search=False, ratio_search=False, smoothing="none")
OPTIONS = ExportOptions(min_speedup=0, runtimes=("onnxruntime",))


@dataclasses.dataclass(frozen=True)
class Network:
    """One line of the list."""

    name: str
    options: dict[str, Any]
    size: tuple[int, int] | None

    def create(self) -> nn.Module:
        """The network with random weights, in eval mode."""
        torch.manual_seed(SEED)
        return timm.create_model(self.name, num_classes=CLASSES, **self.options).eval().requires_grad_(False)

    def preprocess(self, model: nn.Module) -> Preprocess:
        """The model's own preprocessing, at the size of the list."""
        own = preprocess_for(model)
        side = self.options.get("img_size")
        return dataclasses.replace(own, input_size=self.size or ((side, side) if side else own.input_size))


def read_list(path: Path) -> list[Network]:
    """The networks of a list file."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            name, options, size, *_ = [*(part.strip() for part in line.split("|")), "", ""]
            found.append(Network(name, _options(options), ast.literal_eval(size) if size else None))
    return found


def _options(text: str) -> dict[str, Any]:
    """The keywords of `dict(img_size=64, depth=2)`."""
    call: Any = ast.parse(text or "dict()", mode="eval").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}


@torch.no_grad()
def settle(model: nn.Module, images: Tensor) -> None:
    """Give BatchNorm the statistics of some images, in place: random weights with none let the signal fade away."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    for norm in norms:
        norm.momentum = None  # the mean of what is seen
        norm.reset_running_stats()
    model.train()
    model(images)
    model.eval()


def classifiers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """The layers that return logits."""
    heads = model.get_classifier()
    several = heads if isinstance(heads, tuple | nn.ModuleList) else (heads,)
    layers = [[layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.Conv2d)] for head in several]
    return [found[-1] for found in layers if found]


@torch.no_grad()
def centre(model: nn.Module, images: Tensor) -> None:
    """Take the mean logits of some images out of the biases of the classifiers, in place.

    Classifiers that begin with zeros (mixers) get random weights: their logits would depend on nothing.
    """
    layers = classifiers(model)
    for layer in layers:
        if not layer.weight.any():
            nn.init.trunc_normal_(layer.weight, std=0.02)
    mean = model(images).mean(0)
    for layer in layers:
        if layer.bias is not None:
            layer.bias -= mean


def count_macs(model: nn.Module, image: Tensor) -> int:
    """Multiply-adds of one image (1, 3, H, W)."""
    counter = FlopCounterMode(display=False)
    # The counter knows products, and not every fused attention.
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(image)
    return int(counter.get_total_flops()) // 2


def integer_macs(quantized: QuantizedModel) -> int:
    """Multiply-adds of the sites that the profile runs on integers: all their operands are quantized."""
    module: Any = simulated(quantized)
    nodes, total = {node.name: node for node in module.graph.nodes}, 0
    for site in quantized.graph.sites.values():
        operands = [quantizer_of(module, node_argument(nodes[site.node], i)) for i in range(1 if site.weight else 2)]
        total += site.macs * all(isinstance(quantizer, ActivationQuantizer) for quantizer in operands)
    return total


def measure(network: Network, folder: Path) -> dict[str, Any]:
    """One row: `ok`, and the step and the sentence where it is not; writes bundles into a folder."""
    row: dict[str, Any] = {"name": network.name, "ok": False, "step": "create"}
    started = time.monotonic()
    try:
        _walk(network, folder, row)
        row |= {"ok": True, "step": ""}
    except Exception as error:  # every failure is a row; what kind it is, the row says
        row |= {"error": " ".join(str(error).split()), "refused": isinstance(error, LeanvitError)}
        row["kind"] = type(error).__name__
    finally:
        for kind in ("fp32", "w8a8"):
            row |= _golden(folder, kind)
        row["seconds"] = round(time.monotonic() - started, 1)
    return row


def calibration_pixels(preprocess: Preprocess) -> imaging.Pixels:
    """Prepared pictures of the kinds that golden images have, of another seed: BatchNorm must have seen such."""
    size = preprocess.input_size
    plain = synthetic_images(CALIBRATION_IMAGES - CHART_IMAGES, size, CALIBRATION_SEED)
    drawn = [imaging.encode_png(pixels) for pixels in charts(CHART_IMAGES, size, CALIBRATION_SEED)]
    return np.stack([*plain, *(imaging.load(chart, preprocess, "chart") for chart in drawn)])


def _walk(network: Network, folder: Path, row: dict[str, Any]) -> None:
    model = network.create()
    preprocess = network.preprocess(model)
    pixels = calibration_pixels(preprocess)
    images = to_input(torch.from_numpy(pixels), preprocess)
    settle(model, images)
    centre(model, images)
    row |= {"input": list(preprocess.input_size), "macs": count_macs(model, images[:1]), "step": "export fp32"}
    export(model, folder / "fp32", OPTIONS, preprocess=preprocess)
    row["step"] = "quantize"
    quantized = quantize(model, images, QUICK)
    row |= {
        "sites": len(quantized.plan), "unquantized": quantized.report["unquantized"],
        "integer_macs": integer_macs(quantized), "profile": profile_for(quantized).name,
        "step": "export w8a8",
    }  # fmt: skip
    export(quantized, folder / "w8a8", OPTIONS, preprocess=preprocess)


def _golden(folder: Path, kind: str) -> dict[str, Any]:
    """What verify.json of a bundle, rejected or not, says of its golden images."""
    files = [file for name in (kind, f"{kind}.rejected") if (file := folder / name / "verify.json").is_file()]
    if not files:
        return {}
    rows = [row for row in read_json(files[0])["checks"] if row["name"].startswith("golden images at batch")]
    worst = min((float(row["found"].split()[0]) for row in rows), default=None)
    asked = {float(row["expected"].split()[2]) for row in rows}
    # JSON has no infinity: no difference at all, or none that is a number.
    finite = worst if worst is not None and math.isfinite(worst) else None
    return {f"{kind}_db": finite, f"{kind}_asked_db": min(asked, default=None)}


def warm_up() -> None:
    """Import and load what every network needs, so that forked processes have it."""
    image = torch.zeros(1, 3, 8, 8)
    lower(trace(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), image), Preprocess(input_size=(8, 8)), "fp32")
    # Loaded and not run: threads would not come along.
    importlib.import_module("onnxruntime")


def measure_in_child(network: Network, seconds: int) -> dict[str, Any]:
    """The row of one network, measured in a process of its own."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(network, sender))
    child.start()
    sender.close()
    row = {"name": network.name, "ok": False, "step": ""}
    try:
        if receiver.poll(seconds):
            return dict(receiver.recv())
        return row | {"kind": "time", "error": f"more than {seconds} s"}
    except EOFError:
        child.join()
        return row | {"kind": "exit", "error": f"the process ended with {child.exitcode}"}
    finally:
        child.kill()
        child.join()


def _child(network: Network, sender: Connection) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sender.send(measure(network, Path(folder)))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each network."""
    lines = [
        "| network | input | sites | integer MACs | SQNR float file, dB | SQNR W8A8 file, dB | seconds | result |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        size = "x".join(str(side) for side in row.get("input", ()))
        share = f"{row['integer_macs'] / row['macs']:.0%}" if row.get("integer_macs") is not None else ""
        cells = [row["name"], size, row.get("sites", ""), share, _ratio(row, "fp32"), _ratio(row, "w8a8")]
        words = "passed" if row["ok"] else f"{row['step']}: {row['error']}"
        lines.append(f"| {' | '.join(str(cell) for cell in (*cells, row.get('seconds', ''), words))} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any], kind: str) -> str:
    found = row.get(f"{kind}_db")
    return "" if found is None else f"{found:.1f}"


def main() -> None:
    """Measure what is not stored yet; print the table of everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", type=Path, default=LIST)
    parser.add_argument("--networks", nargs="*", help="of the list; default: all")
    parser.add_argument("--again", action="store_true", help="measure stored rows that did not pass once more")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for one network")
    parser.add_argument("--output", type=Path, help="JSON file; rows that it has are not measured again")
    options = parser.parse_args()
    networks = {network.name: network for network in read_list(options.list)}
    rows = read_json(options.output)["rows"] if options.output and options.output.is_file() else []
    known = {row["name"]: row for row in rows if row["ok"] or not options.again}
    wanted = [name for name in options.networks or networks if name not in known]
    if wanted:
        warm_up()
    for name in wanted:
        known[name] = measure_in_child(networks[name], options.seconds) | {"commit": facts()["commit"]}
        note(f"{json.dumps(known[name])}")
        if options.output:
            ordered = [known[name] for name in networks if name in known]
            write_json(options.output, {**facts(), "rows": ordered})
    found = [known[name] for name in networks if name in known]
    print(table(found))
    print(f"\n{sum(row['ok'] for row in found)} of {len(found)} pass")


if __name__ == "__main__":
    main()
