"""Predictor: classify images with a bundle. Needs onnxruntime (or openvino), NumPy and Pillow; no torch.

A bundle is used only if every file is the one that was written, byte for byte, and if the network still
gives the recorded outputs for the recorded images on this machine.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from leanvit import imaging
from leanvit.config import Preprocess, Runtime, RuntimeChoice, from_dict, to_dict
from leanvit.engines import available, fastest, open_engine
from leanvit.errors import BundleError, ConfigError, ImageError, VerificationError
from leanvit.files import sha256, write_atomic

SCHEMA_VERSION = 1
MANIFEST_NAME = "bundle.json"
MODEL_NAME = "model.onnx"
GOLDEN_NAME = "golden.npz"
VERIFY_NAME = "verify.json"
_UNSIGNED = "0" * 64
AUTO_BATCH = 8
"""Images a step when runtimes are compared."""

Logits = NDArray[np.float32]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Manifest:
    """What bundle.json holds.

    profile: execution profile of model.onnx. labels: class names in the order of the logits.
    minimum_sqnr_db: how close golden logits must be. plan: {site: [weight_bits, activation_bits]}, empty
    for float. accuracy: what was measured in the runtime and on what; None where no labelled data was
    given. data: training data, its split and seed. simulated: written for a compiler, no speed on a CPU is
    claimed. runtimes: {runtime: least SQNR of its golden logits in dB}, those that the gate has proved.
    files: SHA-256 of every other file. sha256: of this file, written with zeros in its place. task: "classify", or
    what else the network does (docs/tasks.md). answers: how its outputs are read: their names, for a pose network
    also `keypoints`, for a detector `score_threshold`.
    """

    architecture: str
    profile: str
    labels: tuple[str, ...]
    preprocess: Preprocess
    minimum_sqnr_db: float
    plan: dict[str, tuple[int, int]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] | None = None
    data: dict[str, Any] = field(default_factory=dict)
    input: dict[str, Any] = field(default_factory=dict)
    opset: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    simulated: bool = False
    runtimes: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    sha256: str = _UNSIGNED
    task: str = "classify"
    answers: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write bundle.json with its own digest inside."""
    values = to_dict(manifest)
    values["sha256"] = _UNSIGNED
    text = json.dumps(values, indent=2, allow_nan=False) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomic(folder / MANIFEST_NAME, text.replace(_UNSIGNED, digest).encode())


def read_manifest(folder: str | Path) -> Manifest:
    """Read a bundle's manifest and check every file against its SHA-256.

    Raises BundleError where the folder or a file is missing or the schema is another, VerificationError
    where a byte has changed.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path}: {error.strerror}, expected a bundle folder. Make one: leanvit export CHECKPOINT --output FOLDER"
        ) from error
    _check_own_digest(path, raw)
    values = json.loads(raw)
    if values.get("schema_version") != SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema version {values.get('schema_version')}, this leanvit reads {SCHEMA_VERSION}. "
            "Export the model again."
        )
    manifest = from_dict(Manifest, values, str(path))
    for name, digest in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file}: missing, bundle.json lists it. Copy the whole folder again.")
        if sha256(file) != digest:
            raise VerificationError(
                f"{file}: its SHA-256 differs from bundle.json; the file was changed or damaged. "
                "Copy the bundle again or export the model again."
            )
    return manifest


def _check_own_digest(path: Path, raw: bytes) -> None:
    found = re.search(rb'"sha256": "([0-9a-f]{64})"', raw)
    digest = found.group(1) if found else b""
    expected = hashlib.sha256(raw.replace(digest, _UNSIGNED.encode())).hexdigest() if digest else None
    if expected is None or expected != digest.decode():
        raise VerificationError(
            f"{path}: its SHA-256 differs from the one inside; the file was changed or damaged. "
            "Copy the bundle again or export the model again."
        )


def load_golden(folder: str | Path) -> tuple[list[bytes], Logits]:
    """Encoded golden images and the logits (N, classes) that the model gave for them at export.

    Raises BundleError where golden.npz was damaged before it was signed.
    """
    path = Path(folder) / GOLDEN_NAME
    try:
        with np.load(path, allow_pickle=False) as golden:
            count = len(golden["logits"])
            return [golden[f"image_{i}"].tobytes() for i in range(count)], golden["logits"].astype(np.float32)
    except Exception as error:  # a damaged archive makes NumPy raise what it likes
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BundleError(f"{path}: not readable ({reason}). Export the model again.") from error


def save_golden(folder: Path, images: Sequence[bytes], logits: Logits, **records: NDArray[Any]) -> None:
    """Write golden.npz: `image_0`... (encoded bytes as uint8), `logits` (N, classes) float32, and `records`."""
    buffer = io.BytesIO()
    arrays = {f"image_{i}": np.frombuffer(image, np.uint8) for i, image in enumerate(images)}
    np.savez(buffer, allow_pickle=False, logits=logits.astype(np.float32), **arrays, **records)
    write_atomic(folder / GOLDEN_NAME, buffer.getvalue())


def load_golden_records(folder: str | Path) -> dict[str, NDArray[Any]]:
    """What golden.npz holds beside images and logits; empty in bundles of the first versions."""
    with np.load(Path(folder) / GOLDEN_NAME, allow_pickle=False) as golden:
        return {name: golden[name] for name in golden.files if name != "logits" and not name.startswith("image_")}


def sqnr_db(truth: NDArray[Any], value: NDArray[Any]) -> float:
    """Signal to noise ratio in dB: 10 log10(sum truth^2 / sum (value - truth)^2), at most 200."""
    with np.errstate(invalid="ignore"):
        signal = float(np.square(truth.astype(np.float64)).sum())
        noise = float(np.square(value.astype(np.float64) - truth.astype(np.float64)).sum())
    if not np.isfinite(noise):
        return -200.0
    if noise == 0.0 or signal == 0.0:
        return 200.0 if noise == 0.0 else -200.0
    return float(np.clip(10 * np.log10(signal / noise), -200.0, 200.0))


def run_prepared(
    run: Callable[[imaging.Pixels], Answer], images: imaging.Pixels, folder: Path, size: tuple[int, int]
) -> Answer:
    """What `run`, the engine of the bundle in `folder`, gives for prepared images (N, H, W, 3) uint8.

    size: (height, width) of its input. Raises ConfigError for another shape or dtype, BundleError where the graph
    does not run.
    """
    expected = (*size, 3)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
        raise ConfigError(
            f"images are {images.dtype} {images.shape}, expected uint8 (N, {', '.join(map(str, expected))}). "
            "Use the predictor's prepare() on each image."
        )
    try:
        return run(images)
    except Exception as error:  # the runtimes have no public type for what they raise
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{folder}: can't be run ({reason}). Export the model again.") from error


class Predictor:
    """A bundle, loaded and checked.

    manifest: what bundle.json says. labels: class names in the order of the logits. runtime: what runs it.
    """

    runtime: Runtime

    def __init__(
        self, bundle: str | Path, *, threads: int = 0, runtime: RuntimeChoice = "onnxruntime", check: bool = True
    ) -> None:
        """Load a bundle folder.

        threads: of the runtime, 0 for all cores. runtime: "auto" measures those that the gate has proved for this
        bundle and that are installed, once on a machine, and takes the fastest. check: also run two golden images
        and compare.
        Raises BundleError, VerificationError, ConfigError, MissingDependencyError.
        """
        self.folder = Path(bundle)
        self.manifest = read_manifest(self.folder)
        if self.manifest.task != "classify":
            raise BundleError(
                f"{self.folder} is for task '{self.manifest.task}', expected a classifier. Use "
                "leanvit.downstream.predictor.TaskPredictor, or: leanvit predict"
            )
        self.labels = self.manifest.labels
        self.runtime = self._fastest(threads) if runtime == "auto" else runtime
        self._run = open_engine(self.folder / MODEL_NAME, self.runtime, threads)
        if check:
            self._check_golden(2)

    def _fastest(self, threads: int) -> Runtime:
        proved = self.manifest.runtimes or {"onnxruntime": self.manifest.minimum_sqnr_db}
        candidates = [runtime for runtime in available() if runtime in proved]
        if not candidates:
            raise ConfigError(
                f"{self.folder}: proved for {', '.join(proved)}, none of which is installed. "
                f'Run: pip install "leanvit[onnx]"'
            )
        images = np.random.default_rng(0).integers(
            0, 256, (AUTO_BATCH, *self.manifest.preprocess.input_size, 3), dtype=np.uint8
        )
        return fastest(self.folder / MODEL_NAME, candidates, images, threads, self.manifest.sha256)

    @property
    def minimum_sqnr_db(self) -> float:
        """Least ratio of golden logits to their error in this runtime, in dB."""
        return self.manifest.runtimes.get(self.runtime, self.manifest.minimum_sqnr_db)

    def _check_golden(self, count: int) -> None:
        images, expected = load_golden(self.folder)
        pixels = np.stack([self.prepare(image, "golden image") for image in images[:count]])
        found = sqnr_db(expected[:count], self.logits(pixels))
        if found < self.minimum_sqnr_db:
            raise VerificationError(
                f"{self.folder}: golden images give {found:.1f} dB in {self.runtime} on this machine, expected at "
                f"least {self.minimum_sqnr_db:.0f} dB. Run: leanvit verify {self.folder}"
            )

    def prepare(self, source: str | Path | bytes, name: str | None = None) -> imaging.Pixels:
        """Decode, resize and crop one image as in training: (H, W, 3) uint8. Raises ImageError."""
        return imaging.load(source, self.manifest.preprocess, name)

    def logits(self, images: imaging.Pixels) -> Logits:
        """Logits (N, classes) float32 of prepared images (N, H, W, 3) uint8.

        Raises ConfigError for another shape or dtype, BundleError where the graph does not run.
        """
        logits = run_prepared(self._run, images, self.folder, self.manifest.preprocess.input_size)
        return np.asarray(logits, np.float32)

    def probabilities(self, images: imaging.Pixels) -> Logits:
        """Softmax of the logits: (N, classes) float32, each row sums to 1."""
        logits = self.logits(images).astype(np.float64)
        exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (exponents / exponents.sum(axis=1, keepdims=True)).astype(np.float32)

    def top(self, images: imaging.Pixels, top_k: int) -> list[list[tuple[str, float]]]:
        """The `top_k` most probable (label, probability) pairs of each prepared image."""
        probabilities = self.probabilities(images)
        order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
        return [[(self.labels[i], float(row[i])) for i in best] for row, best in zip(probabilities, order, strict=True)]

    def predict(self, source: str | Path | bytes | imaging.Pixels, top_k: int = 5) -> list[tuple[str, float]]:
        """The `top_k` most probable (label, probability) pairs of one image, best first.

        source: path, encoded bytes, or decoded pixels (height, width, 3) uint8 RGB of any size.
        Raises ImageError where the image can't be decoded.
        """
        if isinstance(source, np.ndarray):
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
                raise ImageError(
                    f"pixels are {source.dtype} {source.shape}, expected uint8 (height, width, 3) in RGB order."
                )
            prepared = imaging.resize(source, self.manifest.preprocess)
        else:
            prepared = self.prepare(source)
        return self.top(prepared[None], top_k)[0]
