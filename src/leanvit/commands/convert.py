"""leanvit convert: a checkpoint of the authors' programs becomes a leanvit checkpoint.

Pickles can run code when they are read. They are opened only with weights_only=True, in a child process
with a memory limit, which hands plain tensors back as safetensors.
"""

from __future__ import annotations

import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from leanvit import errors
from leanvit.checkpoint import CheckpointInfo, load_checkpoint, read_tensors, save_checkpoint
from leanvit.config import ConvertConfig, Preprocess
from leanvit.errors import CheckpointError, ConfigError, VerificationError
from leanvit.models import model_names
from leanvit.models._convert import FAMILIES, from_official, unwrap
from leanvit.models.exmobilevit import ExMobileViT

MEMORY_LIMIT_BYTES = 16 * 2**30
TIMEOUT_SECONDS = 600.0


def convert_checkpoint(config: ConvertConfig) -> str:
    """Convert `config.checkpoint` to `config.output`; returns the architecture's name.

    The family is recognised by trying each one. Raises CheckpointError where the file can't be read safely or
    fits no family, ConfigError for an unknown family or a network that is none of the registered ones.
    """
    tensors = read_foreign(config.checkpoint)
    family, model = _build(tensors, config.family)
    architecture = _architecture(family, model)
    preprocess = _preprocess(architecture)
    info = CheckpointInfo(
        architecture=architecture,
        labels=tuple(str(i) for i in range(int(model.num_classes))),
        preprocess=preprocess,
        # The authors' ExMobileViT pools a corner of its maps; only their weights want that.
        kwargs={"pool": "official"} if isinstance(model, ExMobileViT) else {},
    )
    save_checkpoint(config.output, model, info)
    _require_equal(model, load_checkpoint(config.output)[0], preprocess, config.output)
    return architecture


@torch.inference_mode()
def _require_equal(model: nn.Module, loaded: nn.Module, preprocess: Preprocess, path: str) -> None:
    """Raise VerificationError where the written checkpoint does not return the converted network's logits."""
    x = torch.randn(1, 3, *preprocess.input_size, generator=torch.Generator().manual_seed(0))
    difference = float((model(x) - loaded(x)).abs().max())
    if difference > 1e-4:
        raise VerificationError(
            f"{path}: logits differ by {difference:.2g} from the converted network, expected at most 1e-4. "
            "Report this with the family's name."
        )


def read_foreign(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file or of a pickle of the authors, unwrapped.

    Raises CheckpointError where the file is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file, expected a checkpoint (.pth, .pt or .safetensors).")
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "weights.safetensors"
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_unpickle, args=(path, target, sender), daemon=True)
        process.start()
        sender.close()
        try:
            problem = receiver.recv() if receiver.poll(TIMEOUT_SECONDS) else "it took more than ten minutes"
        except EOFError:
            problem = "the reader was ended, perhaps for want of memory"
        process.join(5)
        process.kill()
        if problem:
            raise CheckpointError(
                f"{path}: not a checkpoint that can be read safely ({problem}). "
                "Save its state_dict alone with torch.save, or as safetensors, where it was made."
            )
        return load_file(target)


def _unpickle(path: Path, target: Path, sender: Any) -> None:
    """Body of the child process: sends '' when `target` is written, else the reason."""
    try:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
        weights = unwrap(torch.load(path, map_location="cpu", weights_only=True))
        # Clones, because tensors of a checkpoint may share storage, which safetensors refuses.
        save_file({name: tensor.clone().contiguous() for name, tensor in weights.items()}, str(target))
        sender.send("")
    except Exception as error:
        sender.send((" ".join(str(error).split()) or type(error).__name__)[:200])


def _build(tensors: dict[str, Tensor], family: str | None) -> tuple[str, Any]:
    if family is not None:
        return family, from_official(family, tensors)
    problems = []
    for name in FAMILIES:
        try:
            return name, from_official(name, tensors)
        except (CheckpointError, ConfigError) as error:
            problems.append(f"{name}: {str(error)[:80]}")
    tried = "; ".join(problems[:3])
    raise CheckpointError(f"the checkpoint fits no family of the authors' ({tried}...). Give --family.")


def _architecture(family: str, model: Any) -> str:
    """The registered name whose network has these parameters."""
    import timm

    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in model_names():
        with torch.device("meta"):
            candidate = timm.create_model(name, num_classes=model.num_classes)
        same = {name: tuple(t.shape) for name, t in candidate.state_dict().items()} == shapes
        if same and type(candidate) is type(model):
            return name
    raise ConfigError(
        f"the checkpoint is a {family} of sizes that no registered architecture has. "
        "Build it in Python: leanvit.models.from_official(family, state_dict)."
    )


def _preprocess(architecture: str) -> Preprocess:
    """Preprocessing of a registered architecture."""
    import timm

    from leanvit.checkpoint import preprocess_for

    with torch.device("meta"):
        return preprocess_for(timm.create_model(architecture))


def run(config: ConvertConfig) -> int:
    """Convert a checkpoint of the authors."""
    print(f"{config.output}: {convert_checkpoint(config)}")
    return errors.EXIT_OK
