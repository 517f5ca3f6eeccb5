"""Predictor: a bundle of any task, loaded and checked. Needs onnxruntime (or openvino), NumPy and Pillow; no torch.

A bundle is used only if every file is the one that was written, byte for byte, and if the network still
returns the recorded outputs for the recorded images on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from leanvit import _moved, imaging
from leanvit.annotations import Outputs
from leanvit.config import Runtime, RuntimeChoice
from leanvit.errors import BundleError, ConfigError, ImageError, LeanvitError, VerificationError
from leanvit.runtime.bundle import MODEL_NAME, Logits, load_golden, load_golden_records, read_manifest
from leanvit.runtime.decode import Box
from leanvit.runtime.engines import available, fastest, open_engine
from leanvit.runtime.golden_objects import MATCHED_SHARE, matched_share
from leanvit.runtime.task import Inputs, Options, Place, compare_values, kept_values, task_named
from leanvit.runtime.tasks import classify

AUTO_BATCH = 8
"""Images a step when runtimes are compared, of AUTO_SIDE pixels a side; of larger ones fewer."""

AUTO_SIDE = 224

Found = TypeVar("Found")


def run_prepared(
    run: Callable[[imaging.Pixels], Found],
    images: imaging.Pixels,
    folder: Path,
    size: tuple[int, int],
    channels: int = 3,
) -> Found:
    """What `run`, the engine of the bundle in `folder`, returns for prepared images (N, H, W, 3) uint8.

    size, channels: (height, width) and channels of its input. Raises ConfigError for another shape or dtype,
    BundleError where the graph does not run, EnvironmentProblem in a forked process where the runtime is lost there.
    """
    expected = (*size, channels)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
        raise ConfigError(
            f"images are {images.dtype} {images.shape}, expected uint8 (N, {', '.join(map(str, expected))}). "
            "Use the predictor's prepare() on each image."
        )
    try:
        return run(images)
    except LeanvitError:
        raise
    except Exception as error:  # the runtimes have no public type for what they raise
        reason = " ".join(str(error).split())[:200]
        raise BundleError(f"{folder}: can't be run ({reason}). Export the model again.") from error


class Predictor:
    """A bundle of any task, loaded and checked; many threads may call it at once, and it can be pickled.

    A process that was forked after it was made may call it in ONNX Runtime; OpenVINO does not survive a fork, which
    raises EnvironmentProblem.

    manifest: what bundle.json says. task: the row of leanvit.runtime.task.TASKS. labels: class names in the order of
    the network's outputs. runtime: what runs it.
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
        self.task = task_named(self.manifest.task, f"{self.folder}: ")
        self.labels = self.manifest.labels
        self.runtime = self._fastest(threads) if runtime == "auto" else runtime
        self._engine = open_engine(self.folder / MODEL_NAME, self.runtime, threads)
        if check:
            self._check_golden(2)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: the task by its name, for tasks are functions; the process that unpickles opens the file."""
        return {**self.__dict__, "task": self.task.name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises BundleError for a task that the process that unpickles does not know."""
        self.__dict__.update(state, task=task_named(state["task"], f"{state['folder']}: "))

    def _fastest(self, threads: int) -> Runtime:
        proved = self.manifest.runtimes or {"onnxruntime": self.manifest.minimum_sqnr_db}
        candidates = [runtime for runtime in available() if runtime in proved]
        if not candidates:
            raise ConfigError(
                f"{self.folder}: proved for {', '.join(proved)}, none of which is installed. "
                f'Run: pip install "leanvit[onnx]"'
            )
        height, width = self.size
        count = max(1, min(AUTO_BATCH, AUTO_BATCH * AUTO_SIDE**2 // (height * width)))
        images = np.random.default_rng(0).integers(0, 256, (count, height, width, self.channels), dtype=np.uint8)
        return fastest(self.folder / MODEL_NAME, candidates, images, threads, self.manifest.sha256)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return self.manifest.preprocess.input_size

    @property
    def channels(self) -> int:
        """Channels of the network's input: 3 are red, green and blue, 1 is grey."""
        return self.manifest.preprocess.channels

    @property
    def minimum_sqnr_db(self) -> float:
        """Least ratio of golden outputs to their error in this runtime, in dB."""
        return self.manifest.runtimes.get(self.runtime, self.manifest.minimum_sqnr_db)

    @property
    def minimum_share(self) -> float:
        """Least share of the objects in golden pictures that must be found again."""
        return float(self.manifest.answers.get("matched_share", MATCHED_SHARE))

    def _check_golden(self, count: int) -> None:
        images, expected = load_golden(self.folder)
        outputs = self.outputs(np.stack([self.prepare(image, "golden image") for image in images[:count]]))
        found = compare_values(self.task, expected[:count], kept_values(self.task, outputs))
        if found < self.minimum_sqnr_db:
            raise VerificationError(
                f"{self.folder}: golden images give {found:.1f} dB in {self.runtime} on this machine, expected at "
                f"least {self.minimum_sqnr_db:.0f} dB. Run: leanvit verify {self.folder}"
            )
        share = matched_share(outputs, load_golden_records(self.folder), count) if self.task.matched else None
        if share is not None and share < self.minimum_share:
            raise VerificationError(
                f"{self.folder}: {share:.0%} of the objects in golden images are found again in {self.runtime}, "
                f"expected {self.minimum_share:.0%}. Run: leanvit verify {self.folder}"
            )

    def prepare(self, source: str | Path | bytes, name: str | None = None) -> imaging.Pixels:
        """Decode one image and bring it to the input size as in training: (H, W, 3) uint8. Raises ImageError."""
        return imaging.load(source, self.manifest.preprocess, name)

    def inputs(self, pixels: imaging.Pixels, options: Options | None = None) -> Inputs:
        """What the network sees of one decoded picture (height, width, 3) uint8: one input, for pose one a box."""
        return self.task.inputs(pixels, self.manifest.preprocess, options or Options())

    def read(
        self,
        source: str | Path | bytes,
        options: Options | None = None,
        name: str | None = None,
        *,
        keep: bool = False,
    ) -> tuple[Inputs, tuple[str, ...], imaging.Pixels | None]:
        """`inputs` of one encoded image, the decoder's notes, and the pixels where they are to be kept.

        Raises ImageError.
        """
        if self.task.inputs is classify.inputs and not keep:  # no array of the whole picture is made
            decoded = imaging.decode_resized(source, self.manifest.preprocess, name)
            return Inputs(decoded.pixels[None], (Place(),), decoded.size), decoded.notes, None
        decoded = imaging.decode(source, name, channels=self.channels)
        return self.inputs(decoded.pixels, options), decoded.notes, decoded.pixels if keep else None

    def outputs(self, images: imaging.Pixels) -> Outputs:
        """Outputs of the network by name for prepared images (N, H, W, 3) uint8: leanvit.annotations.types.Outputs.

        Raises ConfigError for another shape or dtype, BundleError where the graph does not run.
        """
        return run_prepared(self._engine.outputs, images, self.folder, self.size, self.channels)

    def logits(self, images: imaging.Pixels) -> Logits:
        """A classifier's logits (N, classes) float32 of prepared images (N, H, W, 3) uint8.

        Raises ConfigError for another shape or dtype and for another task, BundleError where the graph does not run.
        """
        self._require_task("classify", "outputs")
        return np.asarray(self.outputs(images)["logits"], np.float32)

    def probabilities(self, images: imaging.Pixels) -> Logits:
        """Softmax of a classifier's logits: (N, classes) float32, each row sums to 1. Raises as `logits` does."""
        return classify.probabilities(self.logits(images))

    def top(self, images: imaging.Pixels, top_k: int) -> list[list[tuple[str, float]]]:
        """Of leanvit 0.1, with a FutureWarning: the `top_k` most probable (label, probability) pairs of each image."""
        _moved.warn("Predictor.top(images, top_k)", "Predictor.predict(source, top_k)", stacklevel=3)
        best = np.argsort(-(shares := self.probabilities(images)), axis=1, kind="stable")[:, :top_k]
        return [[(self.labels[i], float(row[i])) for i in own] for row, own in zip(shares, best, strict=True)]

    def results(
        self, pictures: Sequence[Inputs], options: Options | None = None, batch_size: int | None = None
    ) -> list[Any]:
        """What the network finds in each of several pictures, as `predict` returns it.

        pictures: of `inputs`. batch_size: network inputs that are run at a time; None: all at once.
        """
        images = [one.images for one in pictures if len(one.images)]
        outputs = self._in_batches(np.concatenate(images), batch_size) if images else {}
        found, first = [], 0
        for one in pictures:
            last = first + len(one.images)
            own = {name: values[first:last] for name, values in outputs.items()}
            found.append(self.task.decode(own, one, self.manifest, options or Options()))
            first = last
        return found

    def _in_batches(self, images: imaging.Pixels, batch_size: int | None) -> Outputs:
        step = batch_size or len(images)
        parts = [self.outputs(images[i : i + step]) for i in range(0, len(images), step)]
        return (
            parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )

    def predict(
        self,
        source: str | Path | bytes | imaging.Pixels,
        top_k: int | None = None,
        *,
        score_threshold: float | None = None,
        boxes: Sequence[Box] | None = None,
    ) -> Any:
        """What the network finds in one image: of a classifier [(label, probability), ...] best first, of a detector,
        segmenter of instances or pose network [leanvit.annotations.Found, ...], of a semantic segmenter a class map
        (height, width) uint8.

        source: path, encoded bytes, or decoded pixels (height, width, 3) uint8 RGB of any size. top_k: labels, 5
        where it is not given (classify). score_threshold: least score of an object or label, 0.5 where it is not given
        and the bundle has none of its own (detect, segment, multilabel, binary). boxes: (x1, y1, x2, y2) of the objects
        whose keypoints are wanted; None: the whole picture is one (pose).
        Raises ImageError where the image can't be decoded, ConfigError for an argument that does not fit the task.
        """
        asked = {"top_k": top_k, "score_threshold": score_threshold, "boxes": boxes}
        options = self.options(**{name: value for name, value in asked.items() if value is not None})
        if isinstance(source, np.ndarray):
            taken = (self.channels, max(3, self.channels))  # of a colour picture a grey one is made
            if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] not in taken:
                order = " in RGB order" if self.channels == 3 else ""
                raise ImageError(
                    f"pixels are {source.dtype} {source.shape}, expected uint8 (height, width, {self.channels}){order}."
                )
            inputs = self.inputs(source, options)
        else:
            inputs, *_ = self.read(source, options)
        return self.results([inputs], options)[0]

    def options(self, **asked: Any) -> Options:
        """Options with what is asked for. Raises ConfigError that names one that does not fit the task."""
        known = [field.name for field in fields(Options) if field.name in self.task.options]
        for name in asked:
            if name not in known:
                fitting = f"one of {', '.join(known)}" if known else "none"
                raise ConfigError(
                    f"{name} does not fit task {self.task.name} of {self.folder}, expected {fitting}. Leave it out."
                )
        return Options(**asked)

    def _require_task(self, name: str, instead: str) -> None:
        if self.task.name != name:
            raise ConfigError(
                f"{self.folder} is for task '{self.task.name}', expected {name}. Use Predictor.{instead} or .predict."
            )
