"""A bundle as a model of a Triton repository, whose onnxruntime backend then serves the file that the gate has passed.

Source: Triton's docs/user_guide/model_repository.md and model_configuration.md, and its model_config.proto.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leanvit._version import __version__
from leanvit.config import ServeConfig
from leanvit.errors import BundleError, ConfigError, VerificationError
from leanvit.export.gate.check import require_passed
from leanvit.export.onnx.profiles import PROFILES
from leanvit.files import explain_os_error, read_json, write_atomic
from leanvit.runtime.bundle import MANIFEST_NAME, MODEL_NAME, SERVED_NAME, VERIFY_NAME, Manifest, read_manifest
from leanvit.runtime.engines import open_session

CONFIG_NAME = "config.pbtxt"
LABELS_NAME = "labels.txt"

DATA_TYPES = {
    "tensor(uint8)": "TYPE_UINT8", "tensor(float)": "TYPE_FP32", "tensor(float16)": "TYPE_FP16",
    "tensor(int64)": "TYPE_INT64", "tensor(int32)": "TYPE_INT32", "tensor(bool)": "TYPE_BOOL",
}  # fmt: skip
"""Triton's names of ONNX Runtime's types."""

Tensor = tuple[str, str, tuple[int, ...]]
"""Name, Triton's data type, and dims without the batch, -1 for a size that differs."""


def write_triton(bundle: str | Path, repository: str | Path, name: str | None = None) -> Path:
    """Add a bundle to a Triton repository as the next version of a model; returns its folder REPOSITORY/NAME/VERSION.

    The version folder is the bundle, byte for byte. Of a new model config.pbtxt and labels.txt are written too; of one
    that is there they stay as they are, and so do older versions. Where the newest version is this bundle already,
    nothing is written. name: of the model; default: that of the bundle's folder.
    Raises BundleError and VerificationError for a bundle that the gate has not passed in ONNX Runtime, ConfigError for
    a name that can't be served, and where a folder NAME is none of Triton or of a model with other tensors or labels.
    """
    bundle, repository = Path(bundle), Path(repository).resolve()
    manifest = _proved(bundle)
    name = name or bundle.resolve().name
    if not SERVED_NAME.fullmatch(name):
        raise ConfigError(
            f"'{name}' can't be the name of a model, expected letters, digits, _, - and . in it. Give the bundle's "
            "folder another name."
        )
    model = repository / name
    try:
        return _add_version(bundle, manifest, model) if model.exists() else _add_model(bundle, manifest, model)
    except OSError as error:
        raise explain_os_error(error, model) from error


def saturates(manifest: Manifest) -> bool:
    """Whether a bundle needs session.x64quantprecision on CPUs without VNNI, which Triton's backend can't set.

    Without it a ViT in w8a8 had 6 dB there in place of 57.
    """
    return manifest.profile not in PROFILES or PROFILES[manifest.profile].has_integer_kernels


def _proved(bundle: Path) -> Manifest:
    manifest = read_manifest(bundle)
    if VERIFY_NAME not in manifest.files:
        raise VerificationError(
            f"{bundle}: no {VERIFY_NAME}, expected a bundle that the gate has passed. Export again."
        )
    require_passed(read_json(bundle / VERIFY_NAME), bundle)
    if manifest.runtimes and "onnxruntime" not in manifest.runtimes:
        raise BundleError(
            f"{bundle}: proved for {', '.join(manifest.runtimes)}, expected onnxruntime, in which Triton runs it. "
            "Export with --runtimes onnxruntime."
        )
    return manifest


@contextlib.contextmanager
def _staging(repository: Path) -> Iterator[Path]:
    """A folder beside a repository, not inside: Triton takes hidden folders for models, and loads a model again where
    anything in its folder has changed."""
    folder = repository.with_name(f".{repository.name}.{os.getpid()}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _add_model(bundle: Path, manifest: Manifest, model: Path) -> Path:
    """A new model, which appears in the repository whole."""
    with _staging(model.parent) as staging:
        _copy(bundle, manifest, staging / "1")
        write_atomic(staging / CONFIG_NAME, _config(model.name, manifest, bundle).encode())
        if manifest.labels:
            write_atomic(staging / LABELS_NAME, _labels(manifest).encode())
        model.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(model)
    return model / "1"


def _add_version(bundle: Path, manifest: Manifest, model: Path) -> Path:
    """The next version of a model with the same tensors and labels."""
    # Triton passes over folders that are no numbers or begin with 0.
    numbers = [int(path.name) for path in model.iterdir() if path.name.isdecimal() and not path.name.startswith("0")]
    if not numbers or not (model / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{model} exists and is no model of Triton with {CONFIG_NAME} and versions; it is not overwritten. Move it "
            "away, or give the bundle's folder another name."
        )
    newest = model / str(max(numbers))
    if (newest / MANIFEST_NAME).is_file() and read_manifest(newest).sha256 == manifest.sha256:
        return newest
    _require_same(bundle, manifest, newest)
    target = model / str(max(numbers) + 1)
    with _staging(model.parent) as staging:
        _copy(bundle, manifest, staging)
        staging.rename(target)
    return target


def _require_same(bundle: Path, manifest: Manifest, newest: Path) -> None:
    """Raise ConfigError where config.pbtxt and labels.txt of a model are not those of a bundle."""
    model = newest.parent
    for kind, old, new in zip(("inputs", "outputs"), _tensors(newest), _tensors(bundle), strict=True):
        if old != new:
            raise ConfigError(
                f"{newest} has {kind} {_said(old)}, the bundle {_said(new)}, expected the same in all versions of a "
                "model. Give the bundle's folder another name."
            )
    labels = model / LABELS_NAME
    if labels.is_file() and labels.read_text(encoding="utf-8") != _labels(manifest):
        raise ConfigError(
            f"{labels} has other labels than the bundle, expected the same in all versions of a model. Give the "
            "bundle's folder another name."
        )


def _said(tensors: list[Tensor]) -> str:
    return ", ".join(f"{name} {kind} {list(dims)}" for name, kind, dims in tensors)


def _copy(bundle: Path, manifest: Manifest, target: Path) -> None:
    for name in (*manifest.files, MANIFEST_NAME):
        write_atomic(target / name, (bundle / name).read_bytes())


def _labels(manifest: Manifest) -> str:
    """A label a line, in the order of the outputs; a line break inside of one becomes a blank."""
    return "".join(f"{' '.join(label.splitlines())}\n" for label in manifest.labels)


def _tensors(folder: Path) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs and outputs of the ONNX file in a folder. Raises BundleError where Triton can't batch them."""
    session = open_session(folder / MODEL_NAME, threads=1)
    return _described(folder, session.get_inputs()), _described(folder, session.get_outputs())


def _described(folder: Path, tensors: list[Any]) -> list[Tensor]:
    found = []
    for tensor in tensors:
        if len(tensor.shape) < 2 or isinstance(tensor.shape[0], int) or tensor.type not in DATA_TYPES:
            raise BundleError(
                f"{folder / MODEL_NAME}: {tensor.name} is {tensor.type} {tensor.shape}, expected a batch of any size "
                "before one dimension or more. Export the model again."
            )
        dims = tuple(size if isinstance(size, int) else -1 for size in tensor.shape[1:])
        found.append((tensor.name, DATA_TYPES[tensor.type], dims))
    return found


def _config(name: str, manifest: Manifest, bundle: Path) -> str:
    """The text of config.pbtxt: the file's tensors, batches and queue as in `leanvit serve`, and one instance."""
    (pixels,), outputs = _tensors(bundle)
    lines = [
        f"# leanvit {__version__}: task {manifest.task}, profile {manifest.profile}.",
        "# Pixels are prepared as bundle.json in the version folder says: leanvit.imaging.load(image, preprocess).",
        f'name: "{name}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {ServeConfig().max_batch}",
        f"input [ {{ {_entry(pixels)} format: FORMAT_NHWC }} ]",
        *(f"output [ {{ {_entry(tensor)}{_label_file(tensor, manifest)} }} ]" for tensor in outputs),
        f"dynamic_batching {{ default_queue_policy {{ max_queue_size: {ServeConfig().max_queue} }} }}",
        "# One instance that takes all cores; Triton's own default is two that share them.",
        "instance_group [ { kind: KIND_CPU count: 1 } ]",
    ]
    if saturates(manifest):
        lines.insert(2, "# On a CPU without VNNI its int8 products saturate here: use `leanvit serve` there.")
    return "\n".join(lines) + "\n"


def _entry(tensor: Tensor) -> str:
    name, kind, dims = tensor
    return f'name: "{name}" data_type: {kind} dims: [ {", ".join(map(str, dims))} ]'


def _label_file(tensor: Tensor, manifest: Manifest) -> str:
    """Only logits of whole images have a place a label."""
    name, _, dims = tensor
    return f' label_filename: "{LABELS_NAME}"' if name == "logits" and dims == (len(manifest.labels),) else ""
