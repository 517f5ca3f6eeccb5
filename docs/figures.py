"""Draw the figures and write the tables of docs/models from the code.

    .venv/bin/python docs/figures.py            write docs/models/*.svg and the tables between the markers
    .venv/bin/python docs/figures.py --check    exit 1 where a file is not what the code draws now

Models are built on the meta device and run once on shapes alone; hooks note what enters and leaves every module.
Names, kinds and shapes in a figure are those noted; only the places of boxes and the words on arrows are ours.
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from dataflow import dataflow
from drawing import EDGES, FILLS, PALETTE, Row, arrow, box, merged, picture, stack, text
from markupsafe import Markup
from torch import nn

from leanvit.models import list_models
from leanvit.models._attention import History, make_windows
from leanvit.models.exmobilevit import OFFICIAL_WINDOWS
from leanvit.models.revit import ResidualAttention
from leanvit.report.svg import element

PAGES = Path(__file__).parent / "models"
COMMAND = ".venv/bin/python docs/figures.py"


# --- what the code does -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One run of a module: it, and the shapes (or plain values) of its arguments and its result."""

    module: Any
    inputs: Any
    output: Any


def shapes(value: Any) -> Any:
    """Tensors as tuples of their sides, in whatever they are nested."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    return tuple(map(shapes, value)) if isinstance(value, list | tuple) else value


def trace(name: str) -> dict[str, Call]:
    """Every module of a registered model by its path, as one image of the default size met it first."""
    calls: dict[str, Call] = {}

    def noting(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, arguments: Any, result: Any) -> None:
            calls.setdefault(path, Call(module, shapes(arguments), shapes(result)))

        return note

    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        for path, module in model.named_modules():
            module.register_forward_hook(noting(path))
        model(torch.empty(1, *model.pretrained_cfg["input_size"]))
    return calls


def sides(shape: Sequence[int]) -> str:
    """Sides of a tensor without the batch."""
    return " × ".join(map(str, shape[1:]))


def conv_text(conv: nn.Conv2d) -> str:
    """Kernel, stride, dilation and groups of a convolution, what is 1 left out."""
    parts = [f"{conv.kernel_size[0]}×{conv.kernel_size[1]}"]
    parts += [f"stride {conv.stride[0]}"] if conv.stride[0] > 1 else []
    parts += [f"dilation {conv.dilation[0]}"] if conv.dilation[0] > 1 else []
    parts += [f"{conv.groups} groups"] if conv.groups > 1 else []
    return ", ".join(parts)


# --- residual attention -------------------------------------------------------------------------------------


def head_rows(calls: dict[str, Call], classifier: str = "head") -> list[Row]:
    """The last norm and the classifier."""
    norm, head = calls.get("norm"), calls[classifier]
    rows = [] if norm is None else [Row("norm", "LayerNorm, then the mean over tokens", f"{norm.output[-1]}")]
    return [*rows, Row(classifier, "Linear" if rows else "mean over tokens, Linear", f"{head.output[-1]} classes")]


def matching(calls: dict[str, Call], pattern: str) -> list[tuple[str, Call]]:
    """Modules whose whole path matches, in the order in which they ran."""
    return [(path, call) for path, call in calls.items() if re.fullmatch(pattern, path)]


def many(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def mixing(index: int) -> str:
    """Words on the arrow from a layer to what it carries on."""
    return "S →" if index == 0 else "α S →"


def stem_row(calls: dict[str, Call], path: str, conv: str) -> Row:
    """The module that takes the image, and the convolution in it."""
    output = calls[path].output
    out = output[0] if isinstance(output[0], tuple) else output
    return Row(path, conv_text(calls[f"{path}.{conv}"].module), sides(out), "conv")


def layer_row(path: str, detail: str, tokens: Sequence[int], logits: Sequence[int], index: int, down: str) -> Row:
    """A layer of residual attention: its tokens, and at the side the logits R that it carries on."""
    return Row(
        path,
        detail,
        sides(tokens),
        "attention",
        side=sides(logits),
        side_name=f"R{index + 1}",
        link=mixing(index),
        back="← softmax(R)",
        down=down,
    )


def revit_stack() -> str:
    """ReViT-B: tokens down the left, logits down the right."""
    calls = trace("revit_base_patch16_224")
    rows = [stem_row(calls, "patch_embed", "proj")]
    for index, (path, call) in enumerate(matching(calls, r"blocks\.\d+")):
        tokens, logits = call.output
        rows.append(layer_row(path, "residual attention, MLP", tokens, logits, index, "(1 - α)" if index else ""))
    return stack(
        "ReViT-B/16: attention logits carried from layer to layer", "3 × 224 × 224", merged(rows + head_rows(calls))
    )


def revit_attention() -> str:
    """One layer of ReViT-Ti's attention as torch.export sees it."""
    attention = ResidualAttention(192, num_heads=3)
    arguments = (torch.zeros(1, 196, 192), torch.zeros(1, 3, 196, 196), torch.zeros(1))
    results = ("tokens", "R, carried on")
    return dataflow("One layer of residual attention", attention, arguments, ("q", "k", "v"), results)


def revit_weights() -> str:
    """How much each layer's own logits count in R of every layer, at the initial alpha, by the code's History."""
    depth, alpha, cell = 12, 0.5, 42
    history, rows, none = History(), [], torch.empty(1, 1, 1, 1)
    for _ in range(depth):
        history = history.extended(none, none, alpha, 1.0)
        rows.append([float(weight) for weight in history.weights])
    left, top = 120, 66
    parts = [
        text(
            left + depth * cell / 2,
            24,
            "share of the own logits of layer i in what layer l applies softmax to",
            size=13,
        )
    ]
    for i in range(depth):
        parts.append(text(left + (i + 0.5) * cell, top - 8, f"i = {i + 1}" if i == 0 else i + 1))
        parts.append(text(left - 10, top + (i + 0.5) * cell + 4, f"l = {i + 1}" if i == 0 else i + 1, anchor="end"))
    for row, weights in enumerate(rows):
        for column, weight in enumerate(weights):
            x, y = left + column * cell, top + row * cell
            shade = {"fill": EDGES["carried"], "fill_opacity": f"{weight:.3f}", "stroke": "#e5e7eb"}
            parts.append(element("rect", x=x, y=y, width=cell, height=cell, **shade))
            words = f"{weight:.3f}".removeprefix("0") if weight >= 0.0005 else "0"
            parts.append(text(x + cell / 2, y + cell / 2 + 4, words if weight < 1 else "1", size=11))
    return picture("Weights of all layers in the carried logits at alpha = 0.5", top + depth * cell + 20, parts, 680)


def remvit_stack() -> str:
    """ReMViTv2-T: what happens to the logits where heads and grids change."""
    calls = trace("remvitv2_tiny")
    rows = [stem_row(calls, "patch_embed", "proj")]
    before: tuple[Any, ...] | None = None
    for index, (path, call) in enumerate(matching(calls, r"blocks\.\d+")):
        tokens, grid, (logits, q_grid, k_grid) = call.output
        now = (logits[1], q_grid, k_grid)
        detail = f"pooling attention of {many(logits[1], 'head')}, MLP; {grid[0]} × {grid[1]} tokens"
        rows.append(layer_row(path, detail, tokens, logits, index, resize_text(before, now)))
        before = now
    rows = merged(rows + head_rows(calls))
    return stack("ReMViTv2-T: carried logits follow heads and grids", "3 × 224 × 224", rows)


def resize_text(before: tuple[Any, ...] | None, now: tuple[Any, ...]) -> str:
    """What `resize_logits` has to do between two layers."""
    if before is None:
        return ""
    parts = ["mean of heads"] if before[0] != now[0] else []
    for name, old, new in zip(("q", "k"), before[1:], now[1:], strict=True):
        parts += [f"{name} {old[0]}² to {new[0]}²"] if old != new else []
    return ", ".join(["(1 - α)", *parts])


def reswin_stack() -> str:
    """ReSwin-T: windows times heads change at every stage."""
    calls = trace("reswin_tiny_patch4_window7_224")
    rows = [stem_row(calls, "patch_embed", "proj")]
    before, index = None, 0
    for path, call in matching(calls, r"layers\.\d+\.(blocks\.\d+|downsample)"):
        if path.endswith("downsample"):
            rows.append(Row(path, "patch merging", sides(call.output)))
            continue
        tokens, logits = call.output
        shifted = "shifted window" if call.inputs[1] is not None else "window"
        detail = f"attention in {many(logits[1], shifted)} of {logits[-1]} tokens, MLP"
        matched = "(1 - α), by index" if before == logits else "(1 - α), resampled by index"
        rows.append(layer_row(path, detail, tokens, logits, index, "" if before is None else matched))
        before, index = logits, index + 1
    rows = merged(rows + head_rows(calls))
    return stack("ReSwin-T: windows × heads × queries × keys carried", "3 × 224 × 224", rows)


def reswin_windows() -> str:
    """Which token stands in which window, plain and shifted, and which pairs a shifted window knew before."""
    side, window, cell = 8, 4, 30
    plain, shifted = make_windows((side, side), window, True, torch.device("cpu"))
    parts: list[Markup] = []
    for panel, (name, kind) in enumerate((("plain windows", plain), ("shifted windows", shifted))):
        left = 30 + panel * 370
        parts.append(text(left + side * cell / 2, 26, f"{name} and their index", size=13))
        for token, place in enumerate(kind.inverse.tolist()):
            index = place // window**2
            x, y = left + token % side * cell, 40 + token // side * cell
            parts.append(element("rect", x=x, y=y, width=cell, height=cell, fill=PALETTE[index], stroke="#ffffff"))
            parts.append(text(x + cell / 2, y + cell / 2 + 4, index))
    bottom = 40 + side * cell
    if shifted.known is None or shifted.mask is None:
        raise RuntimeError("shifted windows have no mask or no known pairs")
    seen = shifted.mask[:, 0] == 0
    shares = (shifted.known[:, 0] & seen).sum((1, 2)) / seen.sum((1, 2))
    for index, share in enumerate(shares.tolist()):
        words = f"shifted window {index}: {share:.0%} of its visible pairs shared plain window before"
        parts.append(
            text(30, bottom + 26 + 18 * index, words.replace("shared plain", "shared a plain"), anchor="start")
        )
    return picture("Plain and shifted windows of 4 × 4 on 8 × 8 tokens", bottom + 100, parts, 670)


# --- ExMobileViT --------------------------------------------------------------------------------------------


def exmobilevit_stack() -> str:
    """ExMobileViT-928: three scales on their way to the classifier."""
    calls = trace("exmobilevit_928")
    model = calls[""].module
    rows = [stem_row(calls, "backbone.stem", "conv")]
    for path, call in matching(calls, r"backbone\.stages\.\d+"):
        tap = int(path[-1])
        kinds = [type(part).__name__ for part in call.module]
        detail = ", ".join(f"{len(list(g))} × {kind}" for kind, g in itertools.groupby(kinds))
        row = Row(path, detail, sides(call.output), "attention" if "MobileViTBlock" in kinds else "conv")
        if tap in model.taps:
            index = model.taps.index(tap)
            conv = calls[f"shortcut.convs.{index}"]
            row = replace(
                row,
                side=f"1×1, {sides(conv.inputs[0])} to {conv.output[1]}, pooled",
                side_name=f"shortcut.convs.{index}",
            )
        rows.append(row)
    rows.append(
        Row(
            "fc",
            "Linear without bias",
            f"{calls['fc'].output[-1]} classes",
            side=f"concatenated: {calls['fc'].inputs[0][-1]} features",
            from_side=True,
            side_name="f",
        )
    )
    return stack("ExMobileViT-928: early scales go straight to the classifier", "3 × 256 × 256", rows)


def exmobilevit_pooling() -> str:
    """What the authors' windows see of the two early maps."""
    parts: list[Markup] = []
    for panel, (window, side) in enumerate(OFFICIAL_WINDOWS):
        cell, left = 224 / side, 40 + panel * 320
        share = window**2 / side**2
        parts.append(
            text(left + 112, 24, f"map {panel + 1}: {window} × {window} of {side} × {side}, {share:.0%}", size=13)
        )
        parts.append(element("rect", x=left, y=36, width=224, height=224, fill=FILLS["plain"], stroke=EDGES["plain"]))
        size = window * cell
        parts.append(
            element("rect", x=left, y=36, width=size, height=size, fill=FILLS["carried"], stroke=EDGES["carried"])
        )
        parts.append(text(left + size / 2, 36 + size / 2, "averaged"))
    return picture("What pool='official' averages of the early maps", 280, parts, 640)


# --- ViTAE --------------------------------------------------------------------------------------------------


def cell_detail(cell: Any) -> str:
    """Kind of attention of a cell, and its convolution branch."""
    if cell.attn is None:
        return "PRM alone"
    heads = getattr(cell.attn, "num_heads", 1)
    size = getattr(cell.attn, "window_size", None)
    where = f" in {size} × {size} windows" if size else ""
    kind = {"WindowAttention": "attention", "Attention": "full attention"}
    name = kind.get(type(cell.attn).__name__, type(cell.attn).__name__)
    return f"{name}{where}, {many(heads, 'head')}; PCM; MLP"


def vitae_stack(name: str, title: str) -> str:
    """Stages of cells, with their grids."""
    calls, rows = trace(name), []
    for path, call in matching(calls, r"stages\.\d+\.(reduction|blocks\.\d+)"):
        tokens, grid = call.output
        kind = "conv" if path.endswith("reduction") else "attention"
        out = f"{sides(tokens)}, a grid of {grid[0]} × {grid[1]}"
        rows.append(Row(path, cell_detail(call.module), out, kind))
    return stack(title, "3 × 224 × 224", merged(rows + head_rows(calls)))


def chain(x: float, y: float, width: float, kind: str, boxes: Sequence[Sequence[object]]) -> tuple[list[Markup], float]:
    """Boxes below each other with arrows between; returns them and the bottom."""
    parts: list[Markup] = []
    for index, lines in enumerate(boxes):
        if index:
            parts.append(arrow((x + width / 2, y), (x + width / 2, y + 18)))
            y += 18
        height = 14 + 15 * len(lines)
        parts.append(box(x, y, width, height, kind, lines))
        y += height
    return parts, y


def pcm_boxes(calls: dict[str, Call], path: str) -> list[list[str]]:
    """The convolutions of a PCM with what follows each."""
    pcm = calls[path].module
    boxes = []
    for index, (conv, norm) in enumerate(zip(pcm.convs, pcm.norms, strict=True)):
        act = index < len(pcm.convs) - 1 or pcm.final_act
        after = [type(norm).__name__] if not isinstance(norm, nn.Identity) else []
        words = ", ".join([*after, *(["SiLU"] if act else [])])
        boxes.append(
            [
                f"{path.split('.')[-1]}.convs.{index}",
                conv_text(conv),
                *([words] if words else []),
                sides(calls[f"{path}.convs.{index}"].output),
            ]
        )
    return boxes


def cell_picture(name: str, path: str, title: str) -> str:
    """One cell: what its attention and its convolution branch see, and where they meet."""
    calls = trace(name)
    call, cell = calls[path], calls[path].module
    tokens, grid = call.inputs
    parts = [box(300, 16, 280, 32, "plain", [f"x: {sides(tokens)}, a grid of {grid[0]} × {grid[1]}"])]
    y, centre = 84.0, 250.0
    attended = tokens
    if hasattr(cell, "prm"):
        convs = list(cell.prm.convs)
        width = (460 - 8 * (len(convs) - 1)) / len(convs)
        for index, conv in enumerate(convs):
            x = 20 + index * (width + 8)
            out = sides(calls[f"{path}.prm.convs.{index}"].output)
            lines = [f"prm.convs.{index}", *conv_text(conv).split(", "), "GELU", out]
            height = 14 + 15 * (4 + max(len(conv_text(c).split(", ")) for c in convs) - 1)
            parts += [box(x, y, width, height, "conv", lines), arrow((400, 48), (x + width / 2, y))]
            parts.append(arrow((x + width / 2, y + height), (centre, y + height + 34)))
        attended = calls[f"{path}.prm"].output[0]
        y += height + 34
    else:
        parts.append(arrow((400, 48), (centre, y)))
    words = ["concatenated, norm1" if hasattr(cell, "prm") else "norm1", sides(attended)]
    attention = [
        f"attn: {type(cell.attn).__name__}",
        cell_detail(cell).split(";")[0],
        sides(calls[f"{path}.attn"].output),
    ]
    left, bottom = chain(centre - 130, y, 260, "attention", [words, attention])
    right, end = chain(540, 84, 240, "conv", pcm_boxes(calls, f"{path}.pcm"))
    parts += [*left, *right, arrow((480, 48), (660, 84))]
    join = max(bottom, end) + 30
    skip = "" if hasattr(cell, "prm") else "x + "
    parts.append(box(300, join, 280, 34, "plain", [f"y = {skip}attention + PCM"]))
    parts += [
        arrow((centre, bottom), (centre, join + 17), (300, join + 17)),
        arrow((660, end), (660, join + 17), (580, join + 17)),
    ]
    last, end = chain(
        300,
        join + 52,
        280,
        "plain",
        [[f"y + MLP(norm2(y)), hidden {calls[f'{path}.mlp.fc1'].output[-1]}", sides(call.output[0])]],
    )
    return picture(title, end + 20, [*parts, arrow((440, join + 34), (440, join + 52)), *last])


FIGURES: dict[str, Callable[[], str]] = {
    "revit.svg": revit_stack,
    "revit_attention.svg": revit_attention,
    "revit_weights.svg": revit_weights,
    "remvit.svg": remvit_stack,
    "reswin.svg": reswin_stack,
    "reswin_windows.svg": reswin_windows,
    "exmobilevit.svg": exmobilevit_stack,
    "exmobilevit_pooling.svg": exmobilevit_pooling,
    "vitae.svg": lambda: vitae_stack("vitae_tiny", "ViTAE-T: reduction cells, then normal cells"),
    "vitae_reduction.svg": lambda: cell_picture("vitae_tiny", "stages.0.reduction", "First reduction cell of ViTAE-T"),
    "vitae_normal.svg": lambda: cell_picture("vitae_tiny", "stages.2.blocks.0", "Normal cell of ViTAE-T"),
    "vitaev2.svg": lambda: vitae_stack("vitaev2_small", "ViTAEv2-S: four scales"),
    "vitaev2_reduction.svg": lambda: cell_picture(
        "vitaev2_small", "stages.0.reduction", "First reduction cell of ViTAEv2-S"
    ),
}


# --- tables -------------------------------------------------------------------------------------------------

TABLE = re.compile(r"(<!-- variants[^>]*-->\n).*?(<!-- end of variants -->)", re.DOTALL)


def variants(entries: Iterable[dict[str, Any]]) -> str:
    """A Markdown table of architectures: what is counted beside what their authors state."""
    lines = [
        "| model | input | params, counted | params, authors | GMACs, counted | GMACs, authors | top-1, authors "
        "| what it is |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for e in entries:
        params = "" if e["paper_params"] is None else f"{e['paper_params']:,}"
        macs = "" if e["paper_macs"] is None else f"{e['paper_macs']:g}"
        top1 = "" if e["paper_top1"] is None else f"{e['paper_top1']:.1f}"
        said = " ".join((timm.model_entrypoint(e["name"]).__doc__ or "").split("\n")[0].split())
        size = " × ".join(map(str, e["input_size"]))
        lines.append(
            f"| `{e['name']}` | {size} | {e['params']:,} | {params} | {e['macs']:.4f} | {macs} | {top1} | {said} |"
        )
    return "\n".join(lines) + "\n"


def page_text(page: Path, entries: Sequence[dict[str, Any]]) -> str:
    """A page with its table written anew: of its family, or of all in README.md."""
    own = [e for e in entries if page.stem in ("README", e["family"])]
    own.sort(key=lambda e: (e["family"], e["params"]))
    found = page.read_text(encoding="utf-8")
    return TABLE.sub(lambda match: match[1] + variants(own) + match[2], found)


def outputs() -> dict[Path, str]:
    """Every file that this program writes, and what belongs in it."""
    entries = list_models()
    drawn = {PAGES / name: draw() for name, draw in FIGURES.items()}
    return drawn | {page: page_text(page, entries) for page in sorted(PAGES.glob("*.md"))}


def main() -> int:
    """Write or check; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    check = parser.parse_args().check
    stale = {p: new for p, new in outputs().items() if not p.exists() or p.read_text(encoding="utf-8") != new}
    for path, new in stale.items():
        print(f"{path}: {'out of date; run: ' + COMMAND if check else 'written'}")
        if not check:
            path.write_text(new, encoding="utf-8")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
