"""Configuration of the other verbs: one dataclass each."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Literal

from leanvit.config.base import option, require_at_least
from leanvit.config.datasets import BAD_IMAGES, DATA_KINDS, OR_ANNOTATED, BadImages
from leanvit.config.load import NETWORK_KINDS, LoadOptions
from leanvit.config.scale import RayOptions
from leanvit.errors import ConfigError

Runtime = Literal["onnxruntime", "openvino", "openvino-bf16"]


RuntimeChoice = Literal["onnxruntime", "openvino", "openvino-bf16", "auto"]


Opset = Literal[21, 23]
"""Of an ONNX file: 23 has attention as one operation, 21 runs in older runtimes."""


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """List the architectures that leanvit registers with timm."""

    filter: str = option("*", "Shell pattern of names, e.g. 'revit*'.", positional=True)
    json: bool = option(False, "Print JSON instead of a table.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the API and the command line share of an export; docs/bundle.md has the profiles."""

    profile: str = option(
        "auto",
        "How the file computes: fp32; w8a8, w4a8 and mixed, fast; openvino, fast there; exact, as simulated; w4a16, "
        "small; accelerator, for compilers; auto: the one that quantize measured, else by the bits.",
    )
    runtimes: tuple[Runtime, ...] = option(
        (), "That must pass the gate; default: ONNX Runtime, and of the others that are installed those that do."
    )
    max_drop: float = option(
        1.0, "Largest accuracy drop against float, in points (needs --data); where it is more, sites run in float."
    )
    min_speedup: float = option(
        1.0, "Least speed of a fast profile's file here, in times that of its float form; 0: don't measure."
    )
    opset: Opset = option(23, "Of the ONNX file; 21 is for ONNX Runtime before 1.24 and slower in attention.")
    normalize: bool = option(False, "Bring embeddings to length 1, as the bundle's predictions return them (embed).")
    smallest: bool = option(False, "Leave module paths out of the ONNX file as names, where kilobytes count.")

    def __post_init__(self) -> None:
        require_at_least(self, 0, "max_drop", "min_speedup")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(ExportOptions, LoadOptions):
    """Write a bundle: ONNX file, manifest, golden outputs and the proof that they agree."""

    model: str = option(
        MISSING, f"Quantized model, or the network: {NETWORK_KINDS}; with --triton also a bundle.", positional=True
    )
    output: str = option("runs/bundle", "Bundle folder; a failed gate leaves OUTPUT.rejected instead.")
    triton: str | None = option(
        None, "Triton model repository to which the bundle is added, as the next version of the model of its name."
    )
    data: str | None = option(
        None,
        f"Labelled images, to measure accuracy in the runtime (without: NOT verified): {DATA_KINDS}; {OR_ANNOTATED}.",
    )
    batch_size: int | None = option(
        None, "Images a step when accuracy is measured; default: 128 (classify), 8 (other tasks)."
    )
    bad_images: BadImages = option("fail", BAD_IMAGES)
    explain: bool = option(False, "Say what runs on integer kernels and what does not, and which sites cost most.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        LoadOptions.__post_init__(self)
        require_at_least(self, 1, "batch_size")

    def options(self) -> ExportOptions:
        """The part that the API's export() takes."""
        return ExportOptions(**{f.name: getattr(self, f.name) for f in fields(ExportOptions)})


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Check a bundle: hashes, golden outputs, batch sizes, and accuracy where data is given."""

    bundle: str = option(MISSING, "Bundle folder.", positional=True)
    model: str | None = option(None, "Checkpoint or quantized model to compare with.")
    data: str | None = option(None, f"Labelled images, to measure accuracy again: {DATA_KINDS}; {OR_ANNOTATED}.")
    bad_images: BadImages = option("fail", BAD_IMAGES)
    json: bool = option(False, "Print the checks as JSON.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(RayOptions):
    """What a bundle of any task finds in images; needs onnxruntime, NumPy and Pillow only."""

    bundle: str = option(MISSING, "Bundle folder.", positional=True)
    images: list[str] = option(
        [],
        "Image files, folders, glob patterns or @FILE with a path a line; into a folder also URLs (s3://...), Parquet "
        "files and WebDataset shards (.tar).",
        positional=True,
    )
    top_k: int | None = option(
        None, "Labels an image; default: 1 (classify). Nearest images of --against; default: 5 (embed)."
    )
    against: str | None = option(
        None, "Vectors of images (.npy, .parquet, .jsonl of an earlier run): print those nearest to each image (embed)."
    )
    batch_size: int | None = option(None, "Images a step; default: 32 (classify), 8 (other tasks).")
    threads: int = option(0, "Threads of the runtime; 0: all cores.")
    runtime: RuntimeChoice = option(
        "onnxruntime", "What runs the bundle; auto: the fastest that the gate has proved, measured once and remembered."
    )
    format: Literal["text", "jsonl", "csv", "parquet"] | None = option(
        None, "How results are printed; default: text (classify), jsonl (other tasks, and parts in a folder)."
    )
    output: str | None = option(
        None,
        "File for the results; default: standard output. Embeddings also as .npy (names beside it) or .parquet. "
        "FOLDER/ or a URL: parts (.jsonl or .parquet) and manifest.json.",
    )
    part_images: int = option(1024, "Images a part of results in a folder; a shard or row group is always one part.")
    draw: str | None = option(None, "Folder for pictures with what was found (all but classify).")
    boxes: str | None = option(None, "Objects whose keypoints are wanted: a detector's JSON lines or COCO (pose).")
    score_threshold: float | None = option(
        None, "Least score of an object or a label; default: 0.5, of several labels the bundle's own."
    )
    resume: bool = option(False, "Go on with the run that left OUTPUT.partial.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "top_k", "batch_size", "part_images")
        if self.threads < 0:
            raise ConfigError(f"threads is {self.threads}, expected 0 (all cores) or more")
        if self.score_threshold is not None and not 0 <= self.score_threshold <= 1:
            raise ConfigError(f"score_threshold is {self.score_threshold}, expected 0 to 1")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(LoadOptions):
    """Time bundles and checkpoints against each other, alternated in one run."""

    targets: list[str] = option(
        [],
        f"Bundles and networks, of which the first is the one that ratios refer to; a network is {NETWORK_KINDS}.",
        positional=True,
    )
    runtimes: list[Runtime] = option(["onnxruntime"], "Runtimes in which every bundle is timed.")
    batch_sizes: tuple[int, ...] = option((1, 32), "Batch sizes to time.")
    threads: int = option(0, "Threads; 0: all cores.")
    rounds: int = option(15, "How often each target takes its turn.")
    by_operation: bool = option(
        False, "Then tell where each file's time goes by operation, and how much of it runs on int8 kernels."
    )
    output: str | None = option(None, "JSON file for the result.")
    table: str | None = option(None, "Measure one model's products instead, for quantize --latency-table; JSON file.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "threads")
        if self.rounds < 3:
            raise ConfigError(f"rounds is {self.rounds}, expected at least 3 for a median and a spread")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch_sizes is {self.batch_sizes}, expected positive numbers")


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw one self-contained HTML page from a run folder."""

    run: str = option(MISSING, "Run folder: of demo, train, val, quantize, analyze or a bundle.", positional=True)
    output: str | None = option(None, "HTML file; default: RUN/report.html.")
    version: int = option(1, "Version of this configuration's format.")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(LoadOptions):
    """Turn any network, or a checkpoint of the papers' authors, into a leanvit checkpoint."""

    checkpoint: str = option(
        MISSING,
        f"Checkpoint of the authors (.pth, .pt, .safetensors), or the network: {NETWORK_KINDS}.",
        positional=True,
    )
    output: str = option(MISSING, "File to write, e.g. model.safetensors.", positional=True)
    family: str | None = option(
        None, "Of the authors' checkpoint: revit, reswin, mobilevit, exmobilevit_928, vitae, ... Default: found."
    )
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
    epochs: int = option(10, "Training epochs.")
    model: str = option("revit_micro.fmnist", "Architecture; with a tag (NAME.TAG) fine-tuned from those weights.")
    max_drop: float = option(0.5, "Largest accuracy drop of W8A8 that the gate lets pass, in points.")
    speed: bool = option(True, "Time a ViT-S at 224 px as well: float32 against W8A8 in every installed runtime.")
    seed: int = option(0, "Seed of split, weights, order and augmentation.")
    version: int = option(1, "Version of this configuration's format.")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "epochs")
        require_at_least(self, 0, "seed", "max_drop")
