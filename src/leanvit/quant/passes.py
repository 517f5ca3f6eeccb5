"""The passes of the engine, in the order in which they run. To add one: a file with its function, and a row here.

A pass that is not part of leanvit needs no row here: MPTQConfig(passes=("my_file:MY_ROW",)), or --passes my_file:MY_ROW
on the command line, names a `Pass` in a module on Python's path or in the current folder. It follows the rows of its
stage, in the order given.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from leanvit.config import MPTQConfig
from leanvit.errors import ConfigError
from leanvit.quant.greedy_mp import choose_bits
from leanvit.quant.heads import balance
from leanvit.quant.learned import learn
from leanvit.quant.rotate import rotate
from leanvit.quant.sq_b import add_biases, smooth_norms
from leanvit.quant.work import Pass, Stage, Work


def choosing(**changes: Any) -> Callable[[Work], None]:
    """A pass that says how quantizers are set: it changes fields of calibrate.Choices."""

    def run(work: Work) -> None:
        work.choices = replace(work.choices, **changes)

    return run


def correct(work: Work) -> None:
    """Let the walk correct weights (see `reconstruct`): every linear gets a bias that takes what rounding shifts."""
    add_biases(work)
    work.choices = replace(work.choices, correct=True)


def affine(work: Work) -> None:
    """Let the walk fit a line to each output channel, for which every linear gets a bias."""
    add_biases(work)
    work.choices = replace(work.choices, affine=True)


def two_regions(work: Work) -> None:
    """Let OPT-m set two-region quantizers on the sources that the configuration names."""
    work.choices = replace(work.choices, two_region=frozenset(work.config.two_region))


TABLE: tuple[Pass, ...] = (
    # First, because what comes next writes into the biases that it adds.
    Pass(
        "correct",
        "ridge regression of the weight on quantized inputs, rounding that feeds errors back, bias from the means",
        "ERQ (2407.06794), GPTQ (2210.17323), QuantEase (2309.01885)",
        "prepare",
        correct,
    ),
    # Before what looks at single channels, which it makes others.
    Pass(
        "rotate",
        "turns the residual stream, so that what few channels carry is spread over all; exact in float; where it pays",
        "QuaRot (2404.00456), SpinQuant (2405.16406); a rotation that keeps the mean: ours",
        "prepare",
        rotate,
    ),
    # Before SQ-b, which then sees the weights that balancing leaves.
    Pass(
        "balance",
        "transforms q against k, and v against the projection, so that each pair quantizes well; exact in float",
        "ours",
        "prepare",
        balance,
    ),
    Pass(
        "smoothing",
        "SQ-b: moves and scales the channels that follow a LayerNorm, and undoes it in the linears that read them",
        "MPTQ-ViT, SQ-b",
        "prepare",
        smooth_norms,
        lambda config: config.smoothing != "none",
    ),
    Pass(
        "ranges",
        "ranges by the least error of the site's output instead of minimum and maximum",
        "PTQ4ViT (2111.12293)",
        "prepare",
        choosing(search=True),
        lambda config: config.range_search,
    ),
    Pass(
        "ratios",
        "OPT-m: two-region quantizers with step and ratio from data, on softmax and GELU outputs below 8 bits",
        "MPTQ-ViT, OPT-m",
        "prepare",
        two_regions,
        lambda config: config.ratio_search,
    ),
    Pass(
        "per-head",
        "quantizer parameters for each attention head where the axis is free",
        "ours",
        "prepare",
        choosing(per_head=True),
    ),
    Pass(
        "forms",
        "every softmax and GELU site chooses between uniform and two-region",
        "ours",
        "prepare",
        choosing(choose=True),
    ),
    Pass(
        "sequential",
        "each site is calibrated on what the quantized network before it really returns",
        "common practice",
        "prepare",
        choosing(sequential=True),
    ),
    Pass(
        "affine",
        "a line fitted to each output channel of a linear or convolution; the weight's scale and the bias take it in",
        "QwT-v2 (2505.20932)",
        "prepare",
        affine,
    ),
    # Last before quantizers are put in: it tries them on the graph as it will be.
    Pass(
        "greedy-mp",
        "Greedy MP: bits for every site within a budget",
        "MPTQ-ViT, Greedy MP",
        "bits",
        choose_bits,
        lambda config: config.budget is not None,
    ),
    # On quantizers that are set, so that it begins where the closed forms end.
    Pass(
        "reconstruct",
        "gradient steps on scales, rounding and biases of block after block, by the local and the final error",
        "GLF-Q, LSQ (1902.08153)",
        "after",
        learn,
    ),
)


def passes_of(config: MPTQConfig, stage: Stage) -> list[Pass]:
    """The passes of one stage that a configuration asks for, in order.

    Raises ConfigError where a pass from outside can't be imported, or is none.
    """
    outside = [load_pass(name) for name in config.passes if ":" in name]
    return [row for row in (*TABLE, *outside) if row.stage == stage and row.runs(config)]


def run_passes(work: Work, stage: Stage) -> int:
    """Run the passes of one stage on the work at hand; returns how many there were."""
    rows = passes_of(work.config, stage)
    for row in rows:
        row.run(work)
        work.notes.setdefault("passes", []).append(row.name)
    return len(rows)


def load_pass(name: str) -> Pass:
    """The row that `module:ROW` names, under that name.

    Raises ConfigError where the module can't be imported, or holds no Pass of that name.
    """
    module, _, attribute = name.partition(":")
    try:
        row = getattr(_import(module), attribute, None)
    except (ImportError, SyntaxError) as error:
        raise ConfigError(
            f"passes: '{name}' can't be imported: {error}. Expected MODULE:ROW, a module on Python's path or in the "
            "current folder. Run where its file lies, or set PYTHONPATH to its folder."
        ) from error
    if not isinstance(row, Pass):
        raise ConfigError(
            f"passes: '{name}' is {type(row).__name__}, expected a leanvit.quant.Pass. "
            f"Write {attribute} = Pass(...) in {module}."
        )
    return replace(row, name=name)


def _import(module: str) -> ModuleType:
    """A module on Python's path, or in the current folder, where a console script does not look by itself."""
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(folder)
