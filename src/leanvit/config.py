"""Configuration: one dataclass is the Python API, the command-line flag, the YAML key and the help text.

Every configuration carries `version`, rejects unknown keys with a suggestion, and goes to YAML or JSON
and back without loss. This module imports neither torch nor timm.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from leanvit.errors import ConfigError, did_you_mean, require
from leanvit.files import write_atomic

Config = TypeVar("Config")

Runtime = Literal["onnxruntime", "openvino", "openvino-bf16"]
RuntimeChoice = Literal["onnxruntime", "openvino", "openvino-bf16", "auto"]
Profile = Literal["auto", "fp32", "w8a8", "w4a8", "w4a16", "mixed", "exact", "accelerator"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text; `positional=True` makes it a positional argument."""
    metadata["help"] = help
    if default is MISSING:
        return field(metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dicts, lists, numbers and strings."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def from_dict(cls: type[Config], values: dict[str, Any], where: str = "config") -> Config:
    """Build a configuration from plain values, converting lists to tuples where the type says so.

    Raises ConfigError for an unknown key, a missing key, a value of another type, or another version.
    """
    converted = convert(cls, values, where)
    missing = [
        f.name
        for f in fields(cls)  # type: ignore[arg-type]
        if f.default is MISSING and f.default_factory is MISSING and f.name not in values
    ]
    if missing:
        raise ConfigError(f"{where}: missing {', '.join(missing)}")
    return cls(**converted)


def convert(cls: type[Config], values: dict[str, Any], where: str) -> dict[str, Any]:
    """The values of some of a configuration's keys as the types of its fields.

    Raises ConfigError for an unknown key, a value of another type, or another version.
    """
    names = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ConfigError(f"{where}: unknown key '{key}'.{did_you_mean(str(key), names)}")
    hints = get_type_hints(cls)
    converted = {key: _convert(value, hints[key], f"{where}: {key}") for key, value in values.items()}
    expected = names["version"].default if "version" in names else None
    if expected is not None and converted.get("version", expected) != expected:
        raise ConfigError(
            f"{where}: version is {converted['version']}, this leanvit reads version {expected}. "
            "Use the leanvit that wrote it, or write the file again."
        )
    return converted


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`; raises ConfigError where it can't be."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, args, where)
    if origin is Literal:
        if value not in args:
            expected = ", ".join(map(str, args))
            raise ConfigError(f"{where} is {value!r}, expected one of: {expected}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
        if len(inner) != len(value):
            raise ConfigError(f"{where} has {len(value)} entries, expected {len(inner)}")
        return tuple(_convert(v, t, where) for v, t in zip(value, inner, strict=True))
    if origin is list:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}, expected a list")
        return [_convert(v, args[0], where) for v in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}, expected keys and values")
        return {_convert(k, args[0], where): _convert(v, args[1], where) for k, v in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, typing.cast(type, hint)):
            return value
        if not isinstance(value, dict):
            raise ConfigError(f"{where} is {value!r}, expected keys and values")
        return from_dict(typing.cast(type, hint), value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value, where)
    if (isinstance(value, bool) and hint is not bool) or not isinstance(value, hint):
        raise ConfigError(f"{where} is {value!r}, expected {hint.__name__}")
    return value


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{where} is {value}, expected a finite number")
    return number


def _convert_union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and types.NoneType in args:
        return None
    problems = []
    for arg in args:
        if arg is types.NoneType:
            continue
        try:
            return _convert(value, arg, where)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError(problems[-1])


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML or JSON mapping. Raises ConfigError where the file is missing or isn't a mapping."""
    yaml = require("yaml")
    path = Path(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _yaml_loader(yaml))
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}. Check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {path} is not valid YAML: {reason}. Correct the file.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"config file {path} holds {type(values).__name__}, expected keys and values")
    return values


def _yaml_loader(yaml: Any) -> Any:
    """A safe loader that reads 1e-3 as a number, as JSON and YAML 1.2 do; YAML 1.1 reads a string."""
    return _with_exponents(yaml.SafeLoader)


def _with_exponents(base: Any) -> Any:
    """A loader or dumper to which 1e-3 is a number: the dumper then quotes strings that look like one."""
    changed = type(base.__name__, (base,), {})
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
    changed.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))  # type: ignore[attr-defined]
    return changed


def save_yaml(config: Any, path: str | Path) -> None:
    """Write a configuration with all its defaults resolved, in the order of its fields; atomically."""
    yaml = require("yaml")
    text = yaml.dump(to_dict(config), Dumper=_with_exponents(yaml.SafeDumper), sort_keys=False)
    write_atomic(path, text.encode())


def _require_at_least(config: Any, least: int, *names: str) -> None:
    """Raise ConfigError where a number of `config` is below `least`; None passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ConfigError(f"{name} is {value}, expected at least {least}")


@dataclass(frozen=True)
class Preprocess:
    """From a decoded image to the network's input: the one description that every stage shares.

    input_size: (height, width) in pixels of the network's input.
    mean, std: per channel R, G, B, in units where 255 is 1.0; applied inside an exported graph.
    interpolation: resampling filter of the resize.
    crop_pct: share of the resized image that a centre crop keeps, in (0, 1].
    crop_mode: "center" keeps the aspect ratio (resize the shorter side, crop the middle);
        "squash" resizes both sides and loses the aspect ratio.
    """

    input_size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"
    crop_pct: float = 1.0
    crop_mode: Literal["center", "squash"] = "center"
    version: int = 1

    def __post_init__(self) -> None:
        if min(self.input_size) < 1:
            raise ConfigError(f"input_size is {self.input_size}, expected two positive numbers of pixels")
        if not 0 < self.crop_pct <= 1:
            raise ConfigError(f"crop_pct is {self.crop_pct}, expected a share in (0, 1]")
        if min(self.std) <= 0:
            raise ConfigError(f"std is {self.std}, expected three positive numbers")


BEST_PASSES = ("balance", "per-head", "forms", "sequential", "correct")
"""What mode "best" adds to the paper: head balancing, parameters by head, a choice of quantizer at every site,
calibration on the quantized network's own values, and closed-form correction with error-feedback rounding."""


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
            raise ConfigError(f"budget gives {sorted(given) or 'no limit'}, expected exactly one of {list(limits)}")
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
    mode: Literal["paper", "best"] = option("paper", "MPTQ-ViT as published, or with error reduction beyond it.")
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
    seed: int = option(0, "Seed of the rotations and of the choice of calibration images.")

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "first_last_bits"):
            bits = getattr(self, name)
            if not 2 <= bits <= 8:
                raise ConfigError(f"{name} is {bits}, expected 2 to 8")
        if self.smoothing_alpha is not None and not 0 <= self.smoothing_alpha <= 1:
            raise ConfigError(f"smoothing_alpha is {self.smoothing_alpha}, expected 0 to 1")
        _require_at_least(self, 0, "seed")


@dataclass(frozen=True, kw_only=True)
class MPTQConfig(Scheme):
    """How a network is quantized (MPTQ-ViT, arXiv 2401.14895).

    budget: search a mixed-precision plan (Greedy MP) instead of uniform bits. passes: those beyond the paper to
    run, of BEST_PASSES; empty: all in mode "best", none in mode "paper".
    """

    budget: Budget | None = None
    passes: tuple[str, ...] = ()
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.passes:
            if name not in BEST_PASSES:
                raise ConfigError(f"passes: unknown '{name}'.{did_you_mean(name, BEST_PASSES)}")

    @property
    def active_passes(self) -> frozenset[str]:
        """The passes beyond the paper that run."""
        return frozenset(self.passes or (BEST_PASSES if self.mode == "best" else ()))


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """List the architectures that leanvit registers with timm."""

    filter: str = option("*", "Shell pattern of names, e.g. 'revit*'.", positional=True)
    json: bool = option(False, "Print JSON instead of a table.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train or fine-tune a model on an image folder or an embedded data set."""

    data: str = option("digits", "Image folder (one folder a class), 'digits', or 'fashion-mnist[:FOLDER]'.")
    model: str = option("revit_micro", "Any timm architecture; see: leanvit models.")
    output: str = option("runs/train", "Folder for checkpoints, log and resolved config.")
    epochs: int = option(30, "Passes over the training images.")
    batch_size: int = option(64, "Images a step.")
    lr: float = option(2e-3, "Peak learning rate of AdamW.")
    min_lr: float = option(1e-5, "Learning rate at the end of the cosine.")
    warmup_epochs: float = option(2.0, "Epochs of linear warm-up.")
    weight_decay: float = option(0.05, "AdamW's decay; norms, biases and the model's no_weight_decay excepted.")
    clip_grad: float = option(1.0, "Largest gradient norm; 0 turns clipping off.")
    smoothing: float = option(0.1, "Label smoothing.")
    drop_path: float = option(0.0, "Stochastic depth rate.")
    img_size: int | None = option(None, "Input side in pixels; default: the model's own.")
    crop_scale: tuple[float, float] = option((0.7, 1.0), "Area share of the random crop, low and high.")
    hflip: float = option(0.0, "Probability of a horizontal flip.")
    degrees: float = option(10.0, "Largest random rotation, in degrees.")
    val_interval: int = option(1, "Epochs from one validation to the next; the last epoch is always validated.")
    pretrained: bool = option(False, "Start from weights that come with the architecture.")
    initial_checkpoint: str | None = option(None, "Start from this leanvit checkpoint or safetensors file.")
    val_fraction: float = option(0.2, "Share held out where the data has no validation split of its own.")
    bad_images: Literal["fail", "skip"] = option("fail", "What a corrupt training image does.")
    amp: Literal["auto", "bfloat16", "none"] = option("auto", "Autocast; auto: bfloat16 where the chip has it.")
    channels_last: bool = option(False, "Store maps as NHWC: quicker for depthwise convolutions in float32.")
    device: str = option("auto", "cpu, cuda, cuda:1, ...; auto: cuda where there is one.")
    seed: int = option(0, "Seed of the split, the weights, the order and the augmentation.")
    resume: bool = option(False, "Go on from the last epoch in the output folder.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "epochs", "batch_size", "img_size", "val_interval")
        _require_at_least(self, 0, "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "degrees", "seed")
        if not self.lr > 0:
            raise ConfigError(f"lr is {self.lr}, expected more than 0")
        shares = ("smoothing", "drop_path", "hflip")
        for name in shares:
            if not 0 <= getattr(self, name) < 1 and not (name == "hflip" and self.hflip == 1):
                raise ConfigError(f"{name} is {getattr(self, name)}, expected 0 up to 1")
        if not 0 < self.val_fraction < 1:
            raise ConfigError(f"val_fraction is {self.val_fraction}, expected between 0 and 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1]:
            raise ConfigError(f"crop_scale is {self.crop_scale}, expected two rising shares above 0")


@dataclass(frozen=True, kw_only=True)
class ValConfig:
    """Measure top-1 and top-5 of a checkpoint, a quantized model or a bundle."""

    model: str = option(MISSING, "Checkpoint, folder of a training run or quantized model, or bundle.", positional=True)
    data: str = option("digits", "Image folder, 'digits', or 'fashion-mnist[:FOLDER]'.")
    split: Literal["val", "train"] = option("val", "Which part of the data.")
    batch_size: int = option(128, "Images a step.")
    device: str = option("auto", "cpu, cuda, ...")
    json: bool = option(False, "Print JSON instead of a line.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "batch_size")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(Scheme):
    """Quantize a checkpoint after training (MPTQ-ViT) and measure what it costs."""

    model: str = option(MISSING, "Checkpoint, folder of a training run, or NAME.TAG with weights.", positional=True)
    average_bits: float | None = option(None, "Greedy MP: mean bits of weights and activations.")
    model_bytes: int | None = option(None, "Greedy MP: largest size of the weights, in bytes.")
    bitops: int | None = option(None, "Greedy MP: most multiply-adds times bits of both sides.")
    latency_ms: float | None = option(None, "Greedy MP: milliseconds an image, by --latency-table.")
    latency_table: str | None = option(None, "File made by leanvit benchmark --table.")
    plan: str | None = option(None, "Apply this plan.json, perhaps edited, instead of uniform bits or a search.")
    data: str = option("digits", "Calibration (train split) and evaluation (val split) images.")
    calibration_images: int = option(128, "How many training images calibrate the ranges.")
    output: str = option("runs/quantize", "Folder for the quantized model, its plan and its report.")
    batch_size: int = option(64, "Images a step.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(self, 1, "batch_size", "calibration_images")
        if self.plan and self.has_budget:
            raise ConfigError("a plan and a budget are both given, expected one: the plan fixes the bits")

    @property
    def has_budget(self) -> bool:
        """Whether bits are searched for."""
        limits = (self.average_bits, self.model_bytes, self.bitops, self.latency_ms)
        return any(limit is not None for limit in limits)

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
        return MPTQConfig(**shared, budget=budget)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a bundle: ONNX file, manifest, golden outputs and the proof that they agree."""

    model: str = option(MISSING, "Checkpoint or quantized model.", positional=True)
    output: str = option("runs/bundle", "Bundle folder; a failed gate leaves OUTPUT.rejected instead.")
    profile: Profile = option(
        "auto", "How the file computes: w8a8 and w4a8 fast, exact as simulated; auto: what fits the model's bits."
    )
    runtimes: list[Runtime] = option(
        [], "That must pass the gate; default: ONNX Runtime, and of the others that are installed those that do."
    )
    data: str | None = option(None, "Images with labels, to measure accuracy in the runtime; without: NOT verified.")
    max_drop: float = option(
        1.0, "Largest accuracy drop against float, in points (needs --data); where it is more, sites run in float."
    )
    batch_size: int = option(128, "Images a step when the float model is measured.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "batch_size")
        _require_at_least(self, 0, "max_drop")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check a bundle: hashes, golden outputs, batch sizes, and accuracy where data is given."""

    bundle: str = option(MISSING, "Bundle folder.", positional=True)
    model: str | None = option(None, "Checkpoint or quantized model to compare with.")
    data: str | None = option(None, "Images with labels, to measure accuracy again.")
    json: bool = option(False, "Print the checks as JSON.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """Classify images with a bundle; needs onnxruntime, NumPy and Pillow only."""

    bundle: str = option(MISSING, "Bundle folder.", positional=True)
    images: list[str] = option([], "Image files, folders, glob patterns or @FILE with a path a line.", positional=True)
    top_k: int = option(1, "Labels an image.")
    batch_size: int = option(32, "Images a step.")
    threads: int = option(0, "Threads of the runtime; 0: all cores.")
    runtime: RuntimeChoice = option(
        "onnxruntime", "What runs the bundle; auto: the fastest that the gate has proved, measured once and remembered."
    )
    format: Literal["text", "jsonl", "csv"] = option("text", "How results are printed.")
    output: str | None = option(None, "File for the results; default: standard output.")
    resume: bool = option(False, "Go on with the run that left OUTPUT.partial.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "top_k", "batch_size")
        if self.threads < 0:
            raise ConfigError(f"threads is {self.threads}, expected 0 (all cores) or more")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Time bundles and checkpoints against each other, alternated in one run."""

    targets: list[str] = option(
        [], "Bundles and checkpoints; the first is the one that ratios refer to.", positional=True
    )
    runtimes: list[Runtime] = option(["onnxruntime"], "Runtimes in which every bundle is timed.")
    batch_sizes: tuple[int, ...] = option((1, 32), "Batch sizes to time.")
    threads: int = option(0, "Threads; 0: all cores.")
    rounds: int = option(15, "How often each target takes its turn.")
    output: str | None = option(None, "JSON file for the result.")
    table: str | None = option(None, "Measure one model's products instead, for quantize --latency-table; JSON file.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        _require_at_least(self, 0, "threads")
        if self.rounds < 3:
            raise ConfigError(f"rounds is {self.rounds}, expected at least 3 for a median and a spread")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes is {self.batch_sizes}, expected positive numbers")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw one self-contained HTML page from a run folder."""

    run: str = option(MISSING, "Run folder: of demo, train, quantize or a bundle.", positional=True)
    output: str | None = option(None, "HTML file; default: RUN/report.html.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a checkpoint of the papers' authors into a leanvit checkpoint."""

    checkpoint: str = option(MISSING, "Checkpoint of the authors: .pth, .pt or .safetensors.", positional=True)
    output: str = option(MISSING, "File to write, e.g. model.safetensors.", positional=True)
    family: str | None = option(None, "revit, reswin, mobilevit, exmobilevit_928, vitae, ... Default: found.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Show versions, CPU features, which extras are installed and how to get the rest."""

    json: bool = option(False, "Print JSON instead of a table.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Digits in, a proven 8-bit bundle and a report out: the whole path on embedded real images."""

    output: str = option("runs/demo", "Folder for everything that the run makes.")
    epochs: int = option(40, "Training epochs.")
    model: str = option("revit_micro", "Architecture.")
    max_drop: float = option(0.5, "Largest accuracy drop of W8A8 that the gate lets pass, in points.")
    seed: int = option(0, "Seed of split, weights, order and augmentation.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        _require_at_least(self, 1, "epochs")
        _require_at_least(self, 0, "seed", "max_drop")
