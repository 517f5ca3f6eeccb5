"""Proofs for networks and bundles of your own: `check_backbone(model)` and `check_bundle(folder)`.

Both return what was checked, and raise at the first promise that is broken. leanvit's own models and bundles
are tested with them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leanvit.errors import ModelError, VerificationError

TOLERANCE = 1e-4
"""Largest difference between two ways to compute one output, as a share of its largest value: float32 rounding."""

BATCHES = (1, 2, 5)
"""Batch sizes that an exported network must take; 2 is the one that it is exported with."""


@dataclass(frozen=True)
class Proof:
    """One promise that was kept: its name, and what was found."""

    name: str
    found: str


def check_backbone(model: nn.Module) -> list[Proof]:
    """Prove that a classifier keeps timm's contract as far as leanvit relies on it; returns what was checked.

    model: any nn.Module with a classifier, as `timm.create_model` returns it: images (B, C, H, W) float32 in,
    logits (B, num_classes) out. It is not changed: the checks run on a copy on the CPU with random weights,
    because fresh ones make logits and gradients zero. It takes seconds to a minute.
    Raises ModelError that names the promise, what was found, and what to do.
    """
    randomized = randomize_(copy.deepcopy(model).cpu())
    steps: tuple[Callable[[nn.Module], str], ...] = (
        _pretrained_cfg, _forward, _features, _pre_logits, _reset_classifier, _intermediates, _independent_images,
        _gradients, _checkpointing, _parameter_groups, _export,
    )  # fmt: skip
    return [Proof(step.__name__.strip("_"), step(copy.deepcopy(randomized))) for step in steps]


def check_bundle(folder: str | Path) -> list[Proof]:
    """Run the gate on a bundle of any task: hashes, ONNX file, golden outputs, every runtime; returns its checks.

    Checks that need labelled images are left out: `leanvit verify FOLDER --data ...` makes those as well.
    Raises VerificationError that names the first check that failed, BundleError where there is no bundle.
    """
    from leanvit.export.gate.check import require_passed
    from leanvit.export.gate.verify import verify_bundle
    from leanvit.runtime.bundle import read_manifest

    if not Path(folder, "bundle.json").is_file():
        read_manifest(folder)  # says in one line what is missing
    result = verify_bundle(folder)
    require_passed(result, folder)
    proofs = [Proof(c["name"], c["found"]) for c in result["checks"] if c["passed"]]
    if not proofs:
        raise VerificationError(f"{folder}: the gate made no check, expected several. Export the model again.")
    return proofs


def randomize_(model: nn.Module) -> nn.Module:
    """Give every weight and statistic of `model` a random value, in place, from a fixed seed; returns it in eval mode.

    Activations stay near 1: weights have the deviation 1.4 / sqrt(inputs), vectors move by 0.05.
    """
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=1.4 / parameter[0].numel() ** 0.5, generator=generator)
        else:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _broken(promise: str, found: str, remedy: str) -> ModelError:
    return ModelError(f"check_backbone, {promise}: {found}. {remedy}")


def _attribute(model: nn.Module, name: str, promise: str) -> Any:
    value = getattr(model, name, None)
    if value is None:
        raise _broken(
            promise, f"{type(model).__name__} has no {name}", f"Define it, as every model of timm does: {name}"
        )
    return value


def _images(model: nn.Module, batch: int = 2) -> Tensor:
    """Noise of the input size that the model states."""
    size = _attribute(model, "pretrained_cfg", "pretrained_cfg")["input_size"]
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(1))


def _require_shape(found: Any, expected: tuple[int, ...], promise: str, what: str) -> None:
    if not isinstance(found, Tensor):
        raise _broken(promise, f"{what} is a {type(found).__name__}, expected a tensor", "Return one tensor.")
    if tuple(found.shape) != expected:
        raise _broken(promise, f"{what} has shape {tuple(found.shape)}, expected {expected}", "Correct the shape.")


def _require_equal(found: Tensor, expected: Tensor, promise: str, what: str) -> float:
    """Raise ModelError where two tensors differ by more than rounding; returns the difference as a share."""
    _require_shape(found, tuple(expected.shape), promise, what)
    share = float((found - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    if not share <= TOLERANCE:
        raise _broken(promise, f"{what} differs by {share:.2g} of its largest value, expected {TOLERANCE}",
                      "Compute both from the same modules in the same order.")  # fmt: skip
    return share


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    return dict(model.named_modules()).get(path)


def _paths(value: str | tuple[str, ...]) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)


def _pretrained_cfg(model: nn.Module) -> str:
    """pretrained_cfg says how images are prepared, and where the first and the last layer are."""
    promise = "pretrained_cfg"
    config = _attribute(model, "pretrained_cfg", promise)
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation", "num_classes", "first_conv", "classifier"):
        if config.get(key) is None:
            raise _broken(promise, f"the key '{key}' is missing", "Add it, see timm.models.PretrainedCfg.")
    channels = config["input_size"][0]
    for key in ("mean", "std"):
        if len(config[key]) != channels or min(config[key]) < 0 or (key == "std" and min(config[key]) <= 0):
            raise _broken(promise, f"{key} is {config[key]}, expected {channels} numbers in units where 255 is 1",
                          "Give one a channel.")  # fmt: skip
    if not 0 < config["crop_pct"] <= 1:
        raise _broken(promise, f"crop_pct is {config['crop_pct']}, expected a share in (0, 1]", "Give the share.")
    for key in ("first_conv", "classifier"):
        for path in _paths(config[key]):
            if _submodule(model, path) is None:
                raise _broken(
                    promise, f"{key} is '{path}', and there is no such module", "Name one of named_modules()."
                )
    return f"input {tuple(config['input_size'])}, first layer {config['first_conv']}, classifier {config['classifier']}"


@torch.no_grad()
def _forward(model: nn.Module) -> str:
    """Logits are (B, num_classes), finite, not all alike, and the same twice."""
    promise = "forward"
    classes = int(_attribute(model, "num_classes", promise))
    if classes < 1:
        raise _broken(promise, f"num_classes is {classes}", "Build the model with a classifier: num_classes=10.")
    logits = model(_images(model))
    _require_shape(logits, (2, classes), promise, "the output")
    if not bool(logits.isfinite().all()):
        raise _broken(promise, "the output is not finite", "Look for a division or a logarithm of 0.")
    if not float(logits.std()) > 0:
        raise _broken(promise, "all logits are equal for random images", "Use the input.")
    _require_equal(model(_images(model)), logits, promise, "a second pass in eval mode")
    return f"logits {tuple(logits.shape)}"


@torch.no_grad()
def _features(model: nn.Module) -> str:
    """forward is forward_head of forward_features."""
    promise = "features"
    x = _images(model)
    features = _attribute(model, "forward_features", promise)(x)
    found = _attribute(model, "forward_head", promise)(features)
    share = _require_equal(found, model(x), promise, "forward_head(forward_features(x)) against forward(x)")
    return f"features {tuple(features.shape)}, logits within {share:.1g}"


@torch.no_grad()
def _pre_logits(model: nn.Module) -> str:
    """forward_head(pre_logits=True) is what the classifier reads: (B, head_hidden_size)."""
    promise = "pre_logits"
    width = int(_attribute(model, "head_hidden_size", promise))
    features = _attribute(model, "forward_features", promise)(_images(model))
    found = _attribute(model, "forward_head", promise)(features, pre_logits=True)
    _require_shape(found, (2, width), promise, "forward_head(features, pre_logits=True)")
    return f"(2, {width})"


@torch.no_grad()
def _reset_classifier(model: nn.Module) -> str:
    """reset_classifier makes a head of another number of classes, and none for 0."""
    promise = "reset_classifier"
    reset = _attribute(model, "reset_classifier", promise)
    features = _attribute(model, "forward_features", promise)(_images(model))
    reset(5)
    _require_shape(model.forward_head(features), (2, 5), promise, "logits after reset_classifier(5)")  # type: ignore[operator]
    if model.num_classes != 5:
        raise _broken(promise, f"num_classes is {model.num_classes} after reset_classifier(5)", "Store the number.")
    reset(0)
    width = (2, int(_attribute(model, "head_hidden_size", promise)))
    _require_shape(model.forward_head(features), width, promise, "the output after reset_classifier(0)")  # type: ignore[operator]
    return "5 classes, then none"


@torch.no_grad()
def _intermediates(model: nn.Module) -> str:
    """forward_intermediates returns a map (B, C, H, W) for each entry of feature_info, and the final features."""
    promise = "intermediates"
    x = _images(model)
    infos = list(_attribute(model, "feature_info", promise))
    final, maps = _attribute(model, "forward_intermediates", promise)(x)
    _require_equal(final, model.forward_features(x), promise, "the final features")  # type: ignore[operator]
    if len(maps) != len(infos):
        raise _broken(promise, f"{len(maps)} maps, feature_info has {len(infos)} entries", "Return one an entry.")
    for index, (info, found) in enumerate(zip(infos, maps, strict=True)):
        sides = (x.shape[2] // info["reduction"], x.shape[3] // info["reduction"])
        _require_shape(found, (2, info["num_chs"], *sides), promise, f"map {index} ({info['module']})")
    return f"{len(maps)} maps"


@torch.no_grad()
def _independent_images(model: nn.Module) -> str:
    """The images of a batch do not see each other."""
    x = _images(model, 3)
    one_by_one = torch.cat([model(image[None]) for image in x])
    share = _require_equal(one_by_one, model(x), "independent_images", "the output of each image alone")
    return f"within {share:.1g}"


def _gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients of the mean square of the logits in training mode, the same random choices at every call."""
    model.train().zero_grad()
    torch.manual_seed(0)
    model(_images(model, 4)).square().mean().backward()
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name: None if p.grad is None else p.grad.clone() for name, p in trained}


def _gradients(model: nn.Module) -> str:
    """Every parameter learns: its gradient is there, finite, and not zero."""
    promise = "gradients"
    found = _gradients_of(model)
    problems = {
        "get none": [name for name, grad in found.items() if grad is None],
        "get none that is finite": [n for n, g in found.items() if g is not None and not bool(g.isfinite().all())],
        "get zeros only": [n for n, g in found.items() if g is not None and not bool(g.any())],
    }
    for words, names in problems.items():
        if names:
            raise _broken(promise, f"{', '.join(names[:3])} ({len(names)} of {len(found)} parameters) {words}",
                          "Use the parameter in forward, or set requires_grad=False.")  # fmt: skip
    return f"{len(found)} parameters"


def _checkpointing(model: nn.Module) -> str:
    """set_grad_checkpointing changes no gradient."""
    promise = "checkpointing"
    switch = _attribute(model, "set_grad_checkpointing", promise)
    plain = _gradients_of(copy.deepcopy(model))
    switch(True)
    recomputed = _gradients_of(model)
    scale = max(float(grad.abs().max()) for grad in plain.values() if grad is not None)
    for name, grad in plain.items():
        other = recomputed[name]
        if grad is None or other is None:
            raise _broken(promise, f"{name} gets no gradient", "Pass tensors to the checkpointed function.")
        # Sums in another order; against the largest gradient, as small ones are differences of large numbers.
        if not torch.allclose(other, grad, atol=TOLERANCE * scale, rtol=1e-3):
            raise _broken(promise, f"the gradient of {name} changes", "Recompute with the same random choices.")
    return "the same gradients"


def _group_problems(model: nn.Module) -> Iterator[str]:
    from timm.models._manipulate import group_parameters

    matcher = _attribute(model, "group_matcher", "parameter_groups")
    names = {name for name, _ in model.named_parameters()}
    for coarse in (False, True):
        groups = group_parameters(model, matcher(coarse=coarse), reverse=True)
        if missing := sorted(names - set(groups)):
            yield f"{missing[0]} is in no group (coarse={coarse})"
        classifier = _paths(_attribute(model, "pretrained_cfg", "parameter_groups")["classifier"])[0]
        if groups.get(f"{classifier}.weight") != max(groups.values()):
            yield f"the classifier '{classifier}' is not in the last group (coarse={coarse})"


def _parameter_groups(model: nn.Module) -> str:
    """group_matcher sorts every parameter from the stem to the classifier."""
    for problem in _group_problems(model):
        raise _broken("parameter_groups", problem, "Correct group_matcher: a learning rate for each layer needs it.")
    return "every parameter has its layer"


@torch.no_grad()
def _export(model: nn.Module) -> str:
    """torch.export takes the network with a batch of any size, and computes the same."""
    promise = "export"
    shapes = ({0: torch.export.Dim("batch", min=1)},)
    try:
        exported = torch.export.export(model, (_images(model),), dynamic_shapes=shapes).module()
    except Exception as error:  # what torch.export raises is a matter of its version
        reason = " ".join(str(error).split())[:300]
        raise _broken(promise, f"torch.export refuses the network: {reason}",
                      "Leave out what depends on the values of tensors.") from error  # fmt: skip
    for batch in BATCHES:
        x = _images(model, batch)
        _require_equal(exported(x), model(x), promise, f"the exported network at batch {batch}")
    return f"batches {', '.join(map(str, BATCHES))}"
