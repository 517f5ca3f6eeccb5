"""The torch-free half of a task: how a bundle of it is read, drawn, compared and measured. One row of TASKS a task.

Everything that serves, exports, gates, compares or measures a bundle asks the row of its task and names no task
itself, so a task from outside the package is one file and one row:

    from leanvit.runtime.task import Task, letterboxed, register

    COUNT = register(Task(
        name="count", metric="mae", points=1.0, higher_is_better=False, outputs=("counts",), continuous="counts",
        data="scenes", inputs=letterboxed, decode=decode, line=line, text=text, measure=measure,
    ))

What the functions of a row take and return:

    inputs(pixels, preprocess, options) -> Inputs      decoded picture (height, width, 3) uint8 -> network inputs
    decode(outputs, inputs, manifest, options) -> Any  outputs of these inputs -> what Predictor.predict returns
    line(found, manifest) -> dict                      JSON values of a line of `leanvit predict`
    text(found, manifest) -> str                       the same in words, one line
    rows(found, manifest) -> list of lists             rows of a table with the columns `columns`
    draw(pixels, found, manifest) -> {key: pixels}     pictures by the key under which a line names their file
    measure(data, batches) -> dict                     metrics, the row's `metric` among them
    given(scene) -> indices                            the objects whose boxes the network is given when it is measured

The torch half (heads, losses, training) is in `leanvit.tasks`, under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from leanvit.annotations import Outputs, Scene
from leanvit.config import Preprocess
from leanvit.errors import BundleError, ConfigError, DataError, did_you_mean
from leanvit.imaging import Pixels
from leanvit.runtime.bundle import Manifest, sqnr_db
from leanvit.runtime.inputs import Inputs, Options, Place, letterboxed
from leanvit.runtime.tasks import classify, embed, labels, objects, pose, semantic

if TYPE_CHECKING:
    from leanvit.annotations.load import Task as Annotations

__all__ = [
    "TASKS", "Batch", "Inputs", "Options", "Place", "Task", "compare_values", "kept_values", "letterboxed",
    "measure_task", "register", "task_named",
]  # fmt: skip

VALUES_KEPT = 4096
"""Values of a picture's continuous output that golden.npz keeps: maps of large inputs would make it larger than the
network."""

Batch = tuple[Outputs, Sequence[Place]]
"""Outputs for N network inputs, by name, and where each of these inputs lies."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a bundle of a task is; the functions are described at the top of this file.

    name: as in bundle.json and in TASKS of `leanvit.tasks`. title: in words, for pages; the name where it is empty.

    metric: key of `measure` by which epochs and bundles are compared. points: what 1 unit of it is in points, 1 for
    percent, 100 for shares. higher_is_better: whether more of it is better.

    outputs: of the graph, which `decode` and `measure` read. continuous: the output without a threshold in it, whose
    SQNR the gate asks for. values_kept: how many of its values a picture golden.npz keeps, evenly spread; None: all.
    each_picture: whether the SQNR is that of the worst golden picture or of all together. matched: whether the
    objects of golden pictures (outputs boxes, scores, labels and masks) are looked for again.

    returns: what the continuous output says of an image: "label", logits of which the largest counts;
    "labels", logits that count each for itself; "vector", a point
    among others, compared by cosine; "other".

    data: what it is measured on: "images" are an ImageSet, "scenes" a SceneSet. annotations: of scenes, what
    leanvit.annotations.load.load_scenes reads: "detect" boxes, "segment" masks, "semantic" class maps, "pose"
    keypoints.
    batch_size: inputs a step where a user does not say.
    answers: what was measured that bundles keep: the name in their `answers`, and the key of `measure`.
    options: fields of PredictConfig that mean something for it, beside those that all tasks have.
    format: of `leanvit predict` where a user does not say. columns: of `rows`.
    drawn: the keys that `draw` returns. caption: what its pictures show, for the report's page.
    """

    name: str
    metric: str
    outputs: tuple[str, ...]
    continuous: str
    data: Literal["images", "scenes"]
    annotations: Annotations = "detect"
    inputs: Callable[[Pixels, Preprocess, Options], Inputs]
    decode: Callable[[Outputs, Inputs, Manifest, Options], Any]
    line: Callable[[Any, Manifest], dict[str, Any]]
    text: Callable[[Any, Manifest], str]
    measure: Callable[..., dict[str, Any]]
    rows: Callable[[Any, Manifest], list[list[Any]]] | None = None
    columns: tuple[str, ...] = ()
    draw: Callable[[Pixels, Any, Manifest], dict[str, Pixels]] | None = None
    drawn: tuple[str, ...] = ()
    given: Callable[[Scene], Sequence[int]] | None = None
    points: float = 100.0
    higher_is_better: bool = True
    values_kept: int | None = VALUES_KEPT
    each_picture: bool = True
    matched: bool = False
    returns: Literal["label", "labels", "vector", "other"] = "other"
    batch_size: int = 8
    answers: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    format: Literal["text", "jsonl"] = "jsonl"
    caption: str = "What was found"
    title: str = ""

    def drop(self, before: float, after: float) -> float:
        """How much worse `after` is than `before`, both of `metric`, in points; negative where it is better."""
        return self.points * (before - after if self.higher_is_better else after - before)

    def better(self, new: float, old: float) -> bool:
        """Whether `new` is a better value of `metric` than `old`."""
        return self.drop(old, new) < 0


_OBJECTS: dict[str, Any] = {
    "continuous": "objectness",
    "matched": True,
    "data": "scenes",
    "inputs": letterboxed,
    "decode": objects.decode,
    "line": objects.line,
    "text": objects.text,
    "rows": objects.rows,
    "draw": objects.draw,
    "drawn": ("drawn",),
    "options": ("score_threshold", "draw"),
    "caption": "Objects",
}

_ROWS = (
    Task(
        name="classify", title="classification",
        metric="top1", points=1.0, outputs=("logits",), continuous="logits", values_kept=None,
        each_picture=False, data="images", inputs=classify.inputs, decode=classify.decode, line=classify.line,
        text=classify.text, rows=classify.rows, columns=classify.COLUMNS, measure=classify.measure, batch_size=128,
        options=("top_k",), format="text", caption="The most probable label", returns="label",
    ),
    Task(
        name="embed", title="embedding", metric="knn_top1", outputs=("embeddings",), continuous="embeddings",
        values_kept=None, data="images", inputs=classify.inputs, decode=embed.decode, line=embed.line, text=embed.text,
        measure=embed.measure, batch_size=128, options=("against",), returns="vector",
        caption="The first numbers of the embedding",
    ),
    Task(
        name="multilabel", title="classification with any number of labels",
        metric="mAP", outputs=("logits",), continuous="logits", values_kept=None, each_picture=False, data="images",
        inputs=classify.inputs, decode=labels.decode, line=classify.line, text=labels.text, rows=classify.rows,
        columns=classify.COLUMNS, measure=labels.measure, batch_size=128, options=("score_threshold",), format="text",
        returns="labels", caption="Labels over their thresholds", answers={"thresholds": "best_thresholds"},
    ),
    Task(
        name="binary", title="classification by one logit",
        metric="top1", points=1.0, outputs=("logits",), continuous="logits", values_kept=None, each_picture=False,
        data="images", inputs=classify.inputs, decode=labels.decode_two, line=classify.line, text=classify.text,
        rows=classify.rows, columns=classify.COLUMNS, measure=labels.measure_two, batch_size=128,
        options=("score_threshold",), format="text", returns="labels", caption="Both labels, the likelier first",
    ),
    Task(name="detect", title="detection", metric="box_AP50", outputs=("boxes", "scores", "labels"),
         measure=objects.measure_boxes, columns=objects.COLUMNS, **_OBJECTS),
    Task(name="segment", title="instance segmentation",
         metric="mask_AP50", outputs=("boxes", "scores", "labels", "masks"),
         measure=objects.measure_masks, annotations="segment", columns=objects.MASK_COLUMNS, **_OBJECTS),
    Task(
        name="semantic", title="semantic segmentation",
        metric="miou", outputs=("logits",), continuous="logits", data="scenes", inputs=letterboxed,
        decode=semantic.decode, line=semantic.line, text=semantic.text, rows=semantic.rows, columns=semantic.COLUMNS,
        draw=semantic.draw, drawn=("drawn", "map"), measure=semantic.measure, annotations="semantic", options=("draw",),
        caption="The class of every pixel",
    ),
    Task(
        name="pose", title="pose", metric="pck@0.1", outputs=("heatmaps",), continuous="heatmaps", data="scenes",
        inputs=pose.inputs, decode=pose.decode, line=pose.line, text=pose.text, rows=pose.rows, columns=pose.COLUMNS,
        draw=pose.draw, drawn=("drawn",), given=pose.given, measure=pose.measure, annotations="pose",
        options=("boxes", "draw"),
        caption="The keypoints of one object that fills the picture, for a bundle holds no boxes of the objects",
    ),
)  # fmt: skip

TASKS: dict[str, Task] = {row.name: row for row in _ROWS}
"""Every task by its name; `register` adds one from outside the package."""


def register(task: Task) -> Task:
    """Add a task from outside the package to TASKS and return it. Raises ConfigError where the name is taken."""
    if TASKS.get(task.name, task) is not task:
        raise ConfigError(f"task '{task.name}' is there already, expected a name of its own. Choose another one.")
    TASKS[task.name] = task
    return task


def task_named(name: str, where: str = "") -> Task:
    """The task of this name. Raises BundleError that names the known ones; where: what its message begins with."""
    if name not in TASKS:
        raise BundleError(
            f"{where}task '{name}' is unknown, expected one of {', '.join(TASKS)}.{did_you_mean(name, TASKS)} Import "
            "the module that registers it (leanvit.runtime.task.register) first, or update leanvit."
        )
    return TASKS[name]


def kept_values(task: Task, outputs: Outputs) -> Floats:
    """What golden.npz keeps of the continuous output: (N, values) float32, evenly spread where they are too many.

    Raises BundleError where the graph has no such output.
    """
    if task.continuous not in outputs:
        raise BundleError(
            f"the graph returns {', '.join(outputs)}, expected {task.continuous} for task {task.name}. Export it again."
        )
    values = outputs[task.continuous]
    flat = values.reshape(len(values), -1).astype(np.float32)
    step = 1 if task.values_kept is None else -(-flat.shape[1] // task.values_kept)
    return np.ascontiguousarray(flat[:, ::step])


def compare_values(task: Task, expected: Floats, found: Floats) -> float:
    """SQNR in dB of kept values (N, values): of the worst picture, for over all together a broken one might hide, or
    of all together where the task says so."""
    if not task.each_picture:
        return sqnr_db(expected, found)
    return min(sqnr_db(*pair) for pair in zip(expected, found, strict=True))


def measure_task(task: Task, data: Any, batches: Iterable[Batch], thresholds: Sequence[float] = ()) -> dict[str, Any]:
    """The task's metrics over a split; `task.metric` names the one that counts.

    data: ImageSet or SceneSet, as `task.data` says. batches: outputs for its pictures or crops, and where those lie.
    thresholds: least probability of each label, of a task that has such.
    Raises DataError for a split on which the task can't be measured.
    """
    metrics = task.measure(data, batches, thresholds) if thresholds else task.measure(data, batches)
    if metrics[task.metric] is None:
        raise DataError(
            f"{data.name}: nothing is annotated that task {task.name} is measured on, expected some. Annotate the "
            "pictures, or give others."
        )
    return metrics
