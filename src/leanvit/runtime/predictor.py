"""Predictor: classify images with a bundle. Needs onnxruntime (or openvino), NumPy and Pillow; no torch.

A bundle is used only if every file is the one that was written, byte for byte, and if the network still
gives the recorded outputs for the recorded images on this machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from leanvit import imaging
from leanvit.config import Runtime, RuntimeChoice
from leanvit.errors import BundleError, ConfigError, ImageError, VerificationError
from leanvit.runtime.bundle import MODEL_NAME, Logits, load_golden, read_manifest, sqnr_db
from leanvit.runtime.engines import available, fastest, open_engine

AUTO_BATCH = 8
"""Images a step when runtimes are compared."""

Answer = TypeVar("Answer")


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
                "leanvit.runtime.task_predictor.TaskPredictor, or: leanvit predict"
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
