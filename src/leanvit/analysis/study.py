"""Every measure on one model or on two, over the same images: what `leanvit analyze` writes.

A part that a model does not have (rollout where attention is in windows, alpha where there is none) is left out with
its reason; the others are done all the same.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from leanvit.analysis.alpha import learned_alpha
from leanvit.analysis.attention import AttentionLayer, attention_layers
from leanvit.analysis.cost import cost_at
from leanvit.analysis.distance import attention_distance, uniform_distance
from leanvit.analysis.diversity import layer_tokens, rank_one_residual, token_diversity
from leanvit.analysis.field import area_share, effective_field
from leanvit.analysis.rollout import rollout_map
from leanvit.analysis.running import evaluating
from leanvit.analysis.shortcut import require_scales, shortcut_ablation
from leanvit.bench import machine
from leanvit.checkpoint import CheckpointInfo
from leanvit.config import AnalyzeConfig, command_line
from leanvit.data.classes import agreed
from leanvit.data.loader import Loader, to_input
from leanvit.data.sets import ImageSet, load_split
from leanvit.errors import DataError, ImageError, LeanvitError, ModelError, PartialError
from leanvit.files import write_atomic, write_json
from leanvit.progress import Bar, note, print_table
from leanvit.quant.sinks import SINK_TIMES, norm_facts
from leanvit.runtime.bundle import versions

Json = dict[str, Any]
Arrays = dict[str, NDArray[Any]]
RESULT_NAME = "analysis.json"
ARRAYS_NAME = "analysis.npz"
PARTS = ("attention", "rollout", "distance", "diversity", "norms", "alpha", "shortcut", "field", "cost")


@dataclass
class Subject:
    """One model and the images to look at it with.

    pixels: (N, H, W, 3) uint8. images: the validation split in the order of the seed, for what needs many.
    """

    name: str
    model: nn.Module
    info: CheckpointInfo
    images: ImageSet
    pixels: NDArray[np.uint8]
    config: AnalyzeConfig
    device: torch.device
    bar: Bar
    arrays: Arrays = field(default_factory=dict)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of the model's input in pixels."""
        return self.info.preprocess.input_size

    def batches(self) -> Iterator[Tensor]:
        """The images as the model takes them."""
        for start in range(0, len(self.pixels), self.config.batch_size):
            part = torch.from_numpy(self.pixels[start : start + self.config.batch_size])
            yield to_input(part, self.info.preprocess, self.device)
            self.bar.advance(detail=self.name)

    def over_layers(self, measure: Callable[[Tensor, list[AttentionLayer]], list[Tensor]]) -> list[NDArray[Any]]:
        """`measure` of the attention in every batch, each of its results (B, ...) joined over the images."""
        found = [[t.cpu().numpy() for t in measure(x, attention_layers(self.model, x))] for x in self.batches()]
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    @functools.cached_property
    def layers(self) -> list[AttentionLayer]:
        """Attention of the first image: for what does not depend on the image."""
        first = torch.from_numpy(self.pixels[:1])
        return attention_layers(self.model, to_input(first, self.info.preprocess, self.device))


def choose_images(images: ImageSet, info: CheckpointInfo, config: AnalyzeConfig) -> NDArray[np.int64]:
    """Indices of readable images in the order of the seed, `config.images` of them if there are as many.

    Raises DataError where none can be read.
    """
    chosen: list[int] = []
    for index in np.random.default_rng(config.seed).permutation(len(images)).tolist():
        try:
            images.pixels(index, info.preprocess)
        except ImageError as error:
            note(f"{error} Another image takes its place.")
            continue
        chosen.append(index)
        if len(chosen) == config.images:
            break
    if not chosen:
        raise DataError(f"{images.name}: no image can be read, expected at least one. Check --data.")
    return np.asarray(chosen, np.int64)


def study(
    models: list[tuple[str, nn.Module, CheckpointInfo]], config: AnalyzeConfig, device: torch.device
) -> tuple[Json, Arrays]:
    """Look into every model; see the module.

    models: (name, model, info). Returns what analysis.json holds but for where and when, and the arrays of
    analysis.npz by '<index of the model>/<part>/...'.
    Raises DataError where the images can't be used, ModelError where no part can be done.
    """
    images = load_split(config.data, "val", val_fraction=models[0][2].val_fraction, seed=models[0][2].seed)
    chosen = choose_images(images, models[0][2], config)
    order = np.random.default_rng(config.seed).permutation(len(images))
    result: Json = {"data": images.name, "images": len(chosen), "models": []}
    result["labels"] = [images.classes[int(images.labels[i])] for i in chosen]
    arrays: Arrays = {}
    parts = [part for part in PARTS if not config.parts or part in config.parts]
    with Bar("analyze", None) as bar:
        for index, (name, model, info) in enumerate(models):
            if (info.val_fraction, info.seed) != (models[0][2].val_fraction, models[0][2].seed):
                note(f"{name} was trained on another split than {models[0][0]}: it may have seen some of these images")
            pixels = np.stack([images.pixels(int(i), info.preprocess) for i in chosen])
            subject = Subject(name, model.to(device), info, images.subset(order), pixels, config, device, bar)
            result["models"].append(_study_one(subject, parts))
            arrays.update({f"{index}/{key}": value for key, value in subject.arrays.items()})
    if not any(model["done"] for model in result["models"]):
        raise ModelError("; ".join(dict.fromkeys(r for m in result["models"] for r in m["left_out"].values())))
    return result, arrays


def _study_one(subject: Subject, parts: list[str]) -> Json:
    entry: Json = {
        "name": subject.name,
        "architecture": subject.info.architecture,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "input_size": list(subject.size),
        "predicted": _predictions(subject),
        "done": [],
        "left_out": {},
    }
    subject.arrays["pixels"] = subject.pixels
    for part in parts:
        try:
            entry[part] = _MEASURES[part](subject)
            entry["done"].append(part)
        except LeanvitError as error:
            # One measure that a model lacks, or whose data does not fit, must not cost the others.
            entry["left_out"][part] = str(error)
    return entry


def _predictions(subject: Subject) -> list[str]:
    with torch.inference_mode(), evaluating(subject.model):
        found = [index for x in subject.batches() for index in subject.model(x).argmax(1).tolist()]
    return [subject.info.labels[index] for index in found]


def _attention(subject: Subject) -> Json:
    maps = subject.over_layers(lambda x, layers: [layer.received() for layer in layers])
    for index, received in enumerate(maps):
        subject.arrays[f"attention/{index:03d}"] = received.astype(np.float32)
    return {"layers": [_describe(layer) for layer in subject.layers]}


def _describe(layer: AttentionLayer) -> Json:
    _, groups, heads, queries, keys = layer.weights.shape
    return {"name": layer.name, "groups": groups, "heads": heads, "queries": queries, "keys": keys}


def _rollout(subject: Subject) -> Json:
    (maps,) = subject.over_layers(lambda x, layers: [rollout_map(layers)])
    subject.arrays["rollout"] = maps.astype(np.float32)
    return {"layers": len(subject.layers)}


def _distance(subject: Subject) -> Json:
    size = subject.size
    found = subject.over_layers(lambda x, layers: [attention_distance(layer, size) for layer in layers])
    rows = []
    for index, (layer, heads) in enumerate(zip(subject.layers, found, strict=True)):
        subject.arrays[f"distance/{index:03d}"] = heads.astype(np.float32)
        rows.append(
            {"name": layer.name, "heads": heads.mean(0).tolist(), "mean": float(heads.mean()),
             "uniform": uniform_distance(layer, size)}
        )  # fmt: skip
    return {"unit": "pixel", "layers": rows}


def _diversity(subject: Subject) -> Json:
    def measure(x: Tensor, layers: list[AttentionLayer]) -> list[Tensor]:
        tokens = layer_tokens(subject.model, x, layers)
        return [torch.stack([token_diversity(t), rank_one_residual(t)], 1) for t in tokens.values()]

    found = subject.over_layers(measure)
    names = _blocks(subject)
    subject.arrays["diversity"] = np.stack(found, 1).astype(np.float32)
    rows = [
        {"name": name, "diversity": float(values[:, 0].mean()), "residual": float(values[:, 1].mean())}
        for name, values in zip(names, found, strict=True)
    ]
    return {"layers": rows}


def _norms(subject: Subject) -> Json:
    def measure(x: Tensor, layers: list[AttentionLayer]) -> list[Tensor]:
        return [norm_facts(tokens) for tokens in layer_tokens(subject.model, x, layers).values()]

    found = subject.over_layers(measure)
    subject.arrays["norms"] = np.stack(found, 1).astype(np.float32)
    rows = [
        {"name": name, "median": float(facts[:, 0].mean()), "largest": float(facts[:, 1].mean()),
         "times": float((facts[:, 1] / np.maximum(facts[:, 0], 1e-12)).mean()), "sinks": float(facts[:, 2].mean())}
        for name, facts in zip(_blocks(subject), found, strict=True)
    ]  # fmt: skip
    return {"sink_times": SINK_TIMES, "layers": rows}


def _blocks(subject: Subject) -> list[str]:
    """Names of the blocks around attention layers, in order."""
    return list(dict.fromkeys(layer.name.rpartition(".")[0] for layer in subject.layers))


def _shortcut(subject: Subject) -> Json:
    info, config = subject.info, subject.config
    require_scales(subject.model)
    _, images = agreed(info.labels, subject.images, config.data)
    count = min(config.accuracy_images or len(subject.images), len(subject.images))
    loader = Loader(images.subset(np.arange(count)), info.preprocess, 64, "skip")

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, labels in loader:
            yield to_input(pixels, info.preprocess, subject.device), labels.to(subject.device)
            subject.bar.advance(detail=f"{subject.name}, shortcut")

    return shortcut_ablation(subject.model, batches())


def _field(subject: Subject) -> Json:
    gradients = [effective_field(subject.model, x, seed=subject.config.seed) for x in subject.batches()]
    mean = torch.cat(gradients).mean(0)
    subject.arrays["field"] = mean.cpu().numpy().astype(np.float32)
    return {"area50": area_share(mean, 0.5), "area95": area_share(mean, 0.95)}


def _cost(subject: Subject) -> Json:
    side = max(subject.size)
    sides = subject.config.resolutions or [side, 3 * side // 2, 2 * side, 3 * side]
    measure = subject.config.measure

    def tick() -> None:
        subject.bar.advance(detail=f"{subject.name}, cost")

    rows = cost_at(subject.model, sides, measure=measure, device=subject.device, tick=tick)
    return {"rows": rows, "device": str(subject.device), "threads": torch.get_num_threads() if measure else None}


_MEASURES: dict[str, Callable[[Subject], Json]] = {
    "attention": _attention,
    "rollout": _rollout,
    "distance": _distance,
    "diversity": _diversity,
    "norms": _norms,
    "alpha": lambda subject: learned_alpha(subject.model),
    "shortcut": _shortcut,
    "field": _field,
    "cost": _cost,
}


def save_study(result: Json, arrays: Arrays, folder: str | Path) -> Path:
    """Write analysis.npz, then analysis.json, whole or not at all; returns the path of the latter.

    Raises EnvironmentProblem where the folder can't be written.
    """
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(Path(folder) / ARRAYS_NAME, buffer.getvalue())
    write_json(Path(folder) / RESULT_NAME, result)
    return Path(folder) / RESULT_NAME


def describe_run(config: AnalyzeConfig, result: Json) -> Json:
    """What `study` returned, below the command, the machine, the versions and the date that it was made with."""
    return {
        "command": command_line("analyze", config),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "machine": machine(),
        "versions": versions(),
        **result,
    }


def print_study(result: Json) -> None:
    """A table of the last layer of each model on standard output; on standard error, what was left out."""
    rows = []
    for model in result["models"]:
        distance, diversity = (model.get(part, {}).get("layers") for part in ("distance", "diversity"))
        cells = [distance and f"{distance[-1]['mean']:.2f}"]
        cells += [diversity and f"{diversity[-1][key]:.3f}" for key in ("diversity", "residual")]
        cells += ["field" in model and f"{100 * model['field'][key]:.1f}" for key in ("area50", "area95")]
        rows.append([model["name"], *(cell or "" for cell in cells)])
        if model["left_out"]:
            note(f"{model['name']}: {', '.join(model['left_out'])} left out; the page and {RESULT_NAME} say why")
    columns = ["model, last layer", "distance, px", "1 - cosine", "residual", "field 50%", "field 95%"]
    print_table(f"{result['images']} images of {result['data']}", columns, rows)


def require_parts(result: Json, config: AnalyzeConfig) -> None:
    """Raise PartialError where a part that was asked for by name could be done for no model."""
    for part in config.parts:
        reasons = [model["left_out"].get(part) for model in result["models"]]
        if all(reasons):
            raise PartialError(f"{part} was left out: {reasons[0]} The other parts are in {config.output}.")
