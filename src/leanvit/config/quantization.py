"""Configuration of quantization: scheme, budget, and the verb `quantize`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields, replace
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.config.datasets import BAD_IMAGES, DATA_KINDS, OR_ANNOTATED, BadImages
from leanvit.config.load import NETWORK_KINDS, LoadOptions, require_keep_tokens
from leanvit.config.scale import RayOptions
from leanvit.errors import ConfigError, did_you_mean

BEST_PASSES = ("rotate", "balance", "per-head", "forms", "sequential", "correct")
"""What mode "best" adds to the paper: a residual stream that is turned, head balancing, parameters by head, a choice of
quantizer at every site, calibration on the quantized network's own values, and closed-form correction with
error-feedback rounding. The names of the rows of leanvit.quant.passes.TABLE that are asked for by name, which says what
each does and in which order."""


LEARNED_PASSES = (*BEST_PASSES, "reconstruct")
"""What mode "learned" adds to the paper: all of "best", and gradient steps on scales, rounding and biases."""

NAMED_PASSES = (*LEARNED_PASSES, "affine")
"""All that can be asked for by name. `affine` is in no mode: on two micro models (W4A4 and W3A3, one seed) it took an
eighth to a sixth of the test divergence of mode "paper" away, and beside `correct` (W4A4) changed it by less than a
sixteenth, to either side."""

MODES: dict[str, tuple[str, ...]] = {"paper": (), "best": BEST_PASSES, "learned": LEARNED_PASSES}
"""The passes beyond the paper that a mode runs."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a mixed-precision plan may cost: exactly one of the four limits.

    average_bits: mean bits over the elements of all quantized tensors, weights and one image's activations
        alike, without the patch embedding and the classifier, which keep their bits.
    model_bytes: of the packed weights with their scales and of all that stays in float32.
    bitops: sum of multiply-adds times the bits of both sides. latency_ms: by `latency_table`, the file that
        `leanvit benchmark --table` measures for the runtime at hand; sites are then float or 8 bits.
    levels: bits that a site may have, highest first.
    """

    average_bits: float | None = None
    model_bytes: int | None = None
    bitops: int | None = None
    latency_ms: float | None = None
    latency_table: str | None = None
    levels: tuple[int, ...] = (8, 7, 6, 5, 4, 3, 2)
    version: int = 1

    def __post_init__(self) -> None:
        limits = {n: getattr(self, n) for n in ("average_bits", "model_bytes", "bitops", "latency_ms")}
        given = {name: value for name, value in limits.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(f"budget has {sorted(given) or 'no limit'}, expected exactly one of {list(limits)}")
        if min(given.values()) <= 0:
            raise ConfigError(f"budget is {given}, expected a limit above 0")
        if (self.latency_ms is None) != (self.latency_table is None):
            raise ConfigError("latency_ms and latency_table go together. Run: leanvit benchmark --table FILE MODEL")
        if list(self.levels) != sorted(set(self.levels), reverse=True) or not set(self.levels) <= set(range(2, 9)):
            raise ConfigError(f"levels is {self.levels}, expected falling numbers of bits, each 2 to 8")


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What the API and the command line share of a quantization."""

    weight_bits: int = option(8, "Bits of every weight, 2 to 8.")
    activation_bits: int = option(8, "Bits of every activation, 2 to 8.")
    mode: Literal["paper", "best", "learned"] = option(
        "paper", "MPTQ-ViT as published, with error reduction in closed form beyond it, or with learning on top."
    )
    scope: Literal["matmul", "full"] = option(
        "matmul", "Quantize products only, or also inputs of norms, softmax, GELU and both sides of additions."
    )
    smoothing: Literal["none", "sq", "sq-b"] = option(
        "sq-b", "Even out channels after LayerNorm: SmoothQuant (sq) or with a bias term (sq-b)."
    )
    smoothing_alpha: float | None = option(
        None, "Exponent of SQ-b: 0 leaves ranges to activations, 1 to weights; default: searched for every norm."
    )
    range_search: bool = option(True, "Ranges by least output error; off: minimum and maximum.")
    ratio_search: bool = option(True, "OPT-m: two-region quantizers with a ratio from data, below 8 bits.")
    two_region: tuple[Literal["gelu", "softmax"], ...] = option(("gelu", "softmax"), "Where OPT-m applies.")
    first_last_bits: int = option(8, "Bits of the patch embedding and of the classifier.")
    ignored_scope: tuple[str, ...] = option((), "Site names (shell patterns) that stay in float.")
    passes: tuple[str, ...] = option(
        (),
        "Passes beyond the paper to run: rotate, balance, per-head, forms, sequential, correct, reconstruct, "
        "affine, or MODULE:ROW, a pass of your own; default: in mode learned all but affine, in mode best these but "
        "reconstruct, in mode paper none.",
    )
    minutes: float | None = option(
        None, "Most minutes for the pass reconstruct; default: as long as its steps take, fewer for large networks."
    )
    seed: int = option(0, "Seed of the rotations and of the choice of calibration images.")

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits"):
            bits = getattr(self, name)
            if not 2 <= bits <= 8:
                raise ConfigError(f"{name} is {bits}, expected 2 to 8")
        if self.smoothing_alpha is not None and not 0 <= self.smoothing_alpha <= 1:
            raise ConfigError(f"smoothing_alpha is {self.smoothing_alpha}, expected 0 to 1")
        require_at_least(self, 0, "seed")
        for name in self.passes:
            # A pass from outside is imported where it runs: a file that names one can be read without it.
            if name not in NAMED_PASSES and not all(name.partition(":")):
                raise ConfigError(f"passes: unknown '{name}'.{did_you_mean(name, NAMED_PASSES)}")
        if self.minutes is not None and self.minutes <= 0:
            raise ConfigError(f"minutes is {self.minutes}, expected more than 0")

    @property
    def active_passes(self) -> frozenset[str]:
        """The passes beyond the paper that run."""
        return frozenset(self.passes or MODES[self.mode])


@dataclass(frozen=True, kw_only=True)
class MPTQConfig(Scheme):
    """How a network is quantized (MPTQ-ViT, arXiv 2401.14895).

    budget: search a mixed-precision plan (Greedy MP) instead of uniform bits. passes: those beyond the paper to
    run, of BEST_PASSES or MODULE:ROW for one that is not part of leanvit (see leanvit.quant.passes); empty: all of
    BEST_PASSES in mode "best", none in mode "paper".
    keep_tokens: share of the tokens that a plain vision transformer keeps, in (0, 1], alike ones being merged in the
    block in which that costs least (see leanvit.quant.token_merging); or how many tokens each block merges.
    """

    budget: Budget | None = None
    keep_tokens: float | tuple[int, ...] = 1.0
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_keep_tokens(self.keep_tokens)

    def without(self, name: str) -> MPTQConfig:
        """The same without one of the passes beyond the paper."""
        left = tuple(row for row in self.passes or MODES[self.mode] if row != name)
        return replace(self, passes=left, mode=self.mode if left else "paper")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Scheme, LoadOptions, RayOptions):
    """Quantize a checkpoint after training (MPTQ-ViT) and measure what it costs."""

    model: str = option(MISSING, f"The network: {NETWORK_KINDS}.", positional=True)
    average_bits: float | None = option(None, "Greedy MP: mean bits of weights and activations.")
    model_bytes: int | None = option(None, "Greedy MP: largest size of the weights, in bytes.")
    bitops: int | None = option(None, "Greedy MP: most multiply-adds times bits of both sides.")
    latency_ms: float | None = option(None, "Greedy MP: milliseconds an image, by --latency-table.")
    latency_table: str | None = option(None, "File made by leanvit benchmark --table.")
    plan: str | None = option(None, "Apply this plan.json, perhaps edited, instead of uniform bits or a search.")
    data: str = option(
        "digits", f"Images to calibrate on (train split) and to evaluate (val split): {DATA_KINDS}; {OR_ANNOTATED}."
    )
    calibration_images: int = option(128, "How many training images calibrate the ranges.")
    bad_images: BadImages = option("fail", BAD_IMAGES)
    profile: str = option("auto", "Measure what a bundle of this profile runs; auto: the one that export takes.")
    output: str = option("runs/quantize", "Folder for the quantized model, its plan and its report.")
    batch_size: int = option(64, "Images a step.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        LoadOptions.__post_init__(self)
        RayOptions.__post_init__(self)
        require_at_least(self, 1, "batch_size", "calibration_images")
        if self.ray and not self.has_budget:
            raise ConfigError(
                f"ray is {self.ray}, but only a search of bits runs there, expected a budget. "
                "Give --average-bits, or leave --ray out."
            )
        if self.plan and self.has_budget:
            raise ConfigError("a plan and a budget are both given, expected one: the plan fixes the bits")

    @property
    def has_budget(self) -> bool:
        """Whether bits are searched for."""
        limits = (self.average_bits, self.model_bytes, self.bitops, self.latency_ms)
        return any(limit is not None for limit in limits)

    def load_options(self) -> LoadOptions:
        """The part that the API's load() takes: tokens are merged by `scheme`, which knows calibration images."""
        return replace(super().load_options(), keep_tokens=1.0)

    def scheme(self) -> MPTQConfig:
        """The part that the API's quantize() takes."""
        shared = {f.name: getattr(self, f.name) for f in fields(Scheme)}
        budget = Budget(
            average_bits=self.average_bits,
            model_bytes=self.model_bytes,
            bitops=self.bitops,
            latency_ms=self.latency_ms,
            latency_table=self.latency_table,
        ) if self.has_budget else None  # fmt: skip
        return MPTQConfig(**shared, budget=budget, keep_tokens=self.keep_tokens)
