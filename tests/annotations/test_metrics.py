"""Metrics of scenes: against pycocotools, scikit-learn and torchmetrics, and values computed by hand."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from sklearn.metrics import jaccard_score
from torchmetrics.classification import MulticlassJaccardIndex

from leanvit.annotations import IGNORED, Found, Instance, KeypointScheme, Scene, SceneSet
from leanvit.annotations.metrics import CocoScores, SegmentationScores, coco_metrics, oks, pck
from leanvit.errors import ConfigError, DataError, MissingDependencyError, NumericalError

SIZE = (150, 180)
CATEGORIES = (7, 40, 2)  # not sorted: the place of a class is not the place of its id
CLASSES = ("shirt", "boot", "bag")
SIGMAS = (0.026, 0.1, 0.05, 0.08)
SCHEME = KeypointScheme(("a", "b", "c", "d"), (1, 0, 2, 3), SIGMAS)


# --- random cases, written twice: as leanvit's types and as the files of COCO ---


@dataclass
class Case:
    rng: np.random.Generator
    kind: str
    scenes: list[Scene] = field(default_factory=list)
    found: dict[int, list[Found]] = field(default_factory=dict)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def scene_set(self) -> SceneSet:
        return SceneSet("case", tuple(self.scenes), CLASSES, CATEGORIES, SCHEME)

    def box(self) -> list[float]:
        side = 2 ** self.rng.uniform(3.5, 7, 2)
        corner = self.rng.uniform(0, np.maximum((SIZE[1], SIZE[0]) - side, 1))
        return [*corner, *np.minimum(side, (SIZE[1], SIZE[0]) - corner)]

    def near(self, box: list[float]) -> list[float]:
        moved = np.array(box) + self.rng.normal(0, 0.06, 4) * np.array([box[2], box[3], box[2], box[3]])
        return [*np.clip(moved[:2], 0, None), *np.maximum(moved[2:], 2)]

    def points(self, box: list[float], visible: bool) -> np.ndarray:
        places = np.array(box[:2]) + self.rng.uniform(0, 1, (len(SIGMAS), 2)) * box[2:]
        visibility = self.rng.integers(0, 3, len(SIGMAS)) if visible else np.zeros(len(SIGMAS))
        return np.column_stack([places, visibility]).astype(np.float32)

    def fill(self, image_id: int) -> None:
        instances = [self.truth(image_id) for _ in range(self.rng.integers(0, 6))]
        self.scenes.append(Scene(Path(f"{image_id}.png"), image_id, SIZE, tuple(instances)))
        answers = [self.answer(image_id, *self.guess(one)) for one in instances for _ in range(self.rng.integers(0, 3))]
        answers += [self.answer(image_id, int(self.rng.integers(3)), self.box()) for _ in range(self.rng.integers(3))]
        if answers or self.rng.random() < 0.5:
            self.found[image_id] = answers

    def guess(self, one: Instance) -> tuple[int, list[float], np.ndarray | None]:
        x1, y1, x2, y2 = one.box
        label = one.label if self.rng.random() < 0.85 else int(self.rng.integers(3))
        return label, self.near([x1, y1, x2 - x1, y2 - y1]), one.keypoints

    def truth(self, image_id: int) -> Instance:
        box, label, crowd = self.box(), int(self.rng.integers(3)), bool(self.rng.random() < 0.15)
        points = self.points(box, visible=self.rng.random() < 0.85)
        segmentation, area = self.outline(box, crowd)
        self.annotations.append(
            {
                "id": len(self.annotations) + 1,
                "image_id": image_id,
                "category_id": CATEGORIES[label],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
                "segmentation": copy.deepcopy(segmentation),
                "keypoints": points.astype(float).ravel().tolist(),
                "num_keypoints": int((points[:, 2] > 0).sum()),
            }
        )
        if not (points[:, 2] > 0).any() and self.rng.random() < 0.5:
            # Without keypoints leanvit holds None; COCO holds zeros.
            self.annotations[-1]["keypoints"] = [0.0] * 3 * len(SIGMAS)
            points = None
        corners = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        return Instance(label, corners, segmentation, points, area, crowd)

    def outline(self, box: list[float], crowd: bool) -> tuple[Any, float]:
        """Polygon of an ellipse, or run lengths: as a list for crowds, as COCO has them, or compressed."""
        angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
        x, y = box[0] + box[2] * (np.cos(angle) + 1) / 2, box[1] + box[3] * (np.sin(angle) + 1) / 2
        polygon = [np.column_stack([x, y]).ravel().tolist()]
        encoded = coco_mask.merge(coco_mask.frPyObjects(polygon, *SIZE))
        area = float(coco_mask.area(encoded))
        if crowd:
            return {"size": list(SIZE), "counts": run_lengths(coco_mask.decode(encoded))}, area
        if self.rng.random() < 0.3:
            return {"size": list(SIZE), "counts": encoded["counts"].decode()}, area
        return polygon, area

    def answer(self, image_id: int, label: int, box: list[float], points: np.ndarray | None = None) -> Found:
        score = float(self.rng.random())
        entry: dict[str, Any] = {"image_id": image_id, "category_id": CATEGORIES[label], "score": score}
        mask = self.ellipse(box)
        around = self.points(box, visible=True) if points is None else points.copy()
        around[:, :2] += self.rng.normal(0, 2, (len(SIGMAS), 2))
        around[:, 2] = self.rng.random(len(SIGMAS))
        if self.kind == "bbox":
            entry["bbox"] = box
        elif self.kind == "segm":
            entry["segmentation"] = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        else:
            entry["keypoints"] = around.astype(float).ravel().tolist()
        self.results.append(entry)
        return Found(label, score, (box[0], box[1], box[0] + box[2], box[1] + box[3]), mask, around)

    def ellipse(self, box: list[float]) -> np.ndarray:
        y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
        middle, half = np.array(box[:2]) + np.array(box[2:]) / 2, np.array(box[2:]) / 2
        return ((x - middle[0]) / half[0]) ** 2 + ((y - middle[1]) / half[1]) ** 2 <= 1


def run_lengths(mask: np.ndarray) -> list[int]:
    flat = np.concatenate([[0], mask.ravel(order="F"), [0]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()


def case(seed: int, kind: str) -> Case:
    made = Case(np.random.default_rng(seed), kind)
    for image_id in (31, 4, 159, 26):
        made.fill(image_id)
    return made


def by_pycocotools(made: Case) -> dict[str, Any]:
    truth = COCO()
    truth.dataset = {
        "images": [{"id": s.image_id, "height": SIZE[0], "width": SIZE[1]} for s in made.scenes],
        "categories": [{"id": id, "name": name} for id, name in zip(CATEGORIES, CLASSES, strict=True)],
        "annotations": made.annotations,
        "info": {},
    }
    truth.createIndex()
    results = COCO()
    results.dataset = {**truth.dataset, "annotations": []}
    results.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(made.results) if made.results else results, made.kind)
    if made.kind == "keypoints":
        evaluation.params.kpt_oks_sigmas = np.array(SIGMAS)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ["AP", "AP50", "AP75", "APm", "APl", "AR20"]
    if made.kind != "keypoints":
        names = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100"]
    expected: dict[str, Any] = dict(zip(names, evaluation.stats, strict=False))
    for k, id in enumerate(sorted(CATEGORIES)):
        values = evaluation.eval["precision"][0, :, k, 0, -1]
        expected[CLASSES[CATEGORIES.index(id)]] = values[values > -1].mean() if (values > -1).any() else -1
    return expected


@pytest.mark.parametrize("seed", range(68))
@pytest.mark.parametrize("kind", ["bbox", "segm", "keypoints"])
def test_same_as_pycocotools(seed: int, kind: str) -> None:
    made = case(seed, kind)
    expected = by_pycocotools(made)
    found = coco_metrics(made.scene_set, made.found, kind)  # type: ignore[arg-type]
    found.update(found.pop("per_class"))
    if kind == "keypoints":
        assert found.pop("APs") is None
    assert found.keys() == expected.keys() - {"AR1", "AR10"}
    numbers = {name: -1 if value is None else value for name, value in found.items()}
    assert numbers == pytest.approx({name: expected[name] for name in numbers}, abs=1e-6)


def test_the_random_cases_are_worth_the_comparison() -> None:
    cases = [case(seed, "bbox") for seed in range(68)]
    objects = [one for made in cases for scene in made.scenes for one in scene.instances]
    values = [coco_metrics(made.scene_set, made.found, "bbox")["AP"] for made in cases]
    assert {one.crowd for one in objects} == {True, False}
    assert {type(one.segmentation) for one in objects} == {list, dict}
    assert any(not scene.instances for made in cases for scene in made.scenes)
    assert any(len(made.found) < len(made.scenes) for made in cases)
    known = [value for value in values if value is not None]
    assert min(known) < 0.1 < 0.5 < max(known)
    assert len(set(known)) > 50


def test_the_scene_set_is_left_as_it_was() -> None:
    made = case(3, "segm")
    before = copy.deepcopy([one.segmentation for scene in made.scenes for one in scene.instances])
    coco_metrics(made.scene_set, made.found, "segm")
    assert [one.segmentation for scene in made.scenes for one in scene.instances] == before


# --- corners ---


def one_box(crowd: bool = False) -> SceneSet:
    instance = Instance(0, (10.0, 10.0, 60.0, 60.0), None, None, 2500.0, crowd)
    return SceneSet("one", (Scene(Path("a.png"), 5, (100, 100), (instance,)),), ("cat", "dog"))


def test_perfect_nothing_and_absent() -> None:
    perfect = coco_metrics(one_box(), {5: [Found(0, 0.9, (10.0, 10.0, 60.0, 60.0))]}, "bbox")
    assert perfect["AP"] == perfect["AP50"] == perfect["APm"] == perfect["AR100"] == pytest.approx(1.0)
    assert perfect["APs"] is None
    assert perfect["per_class"] == {"cat": pytest.approx(1.0), "dog": None}
    nothing = coco_metrics(one_box(), {}, "bbox")
    assert nothing["AP"] == 0
    assert nothing["per_class"] == {"cat": 0.0, "dog": None}
    crowd = coco_metrics(one_box(crowd=True), {5: [Found(0, 0.9, (10.0, 10.0, 60.0, 60.0))]}, "bbox")
    assert crowd["AP"] is None
    empty = coco_metrics(
        SceneSet("none", (Scene(Path("a.png"), 1, (9, 9)),), ("cat",), keypoints=SCHEME), {}, "keypoints"
    )
    assert empty["AP"] is None
    assert empty["per_class"] == {"cat": None}


def test_an_empty_mask_is_a_miss() -> None:
    polygon = [[10.0, 10.0, 60.0, 10.0, 60.0, 60.0, 10.0, 60.0]]
    instance = Instance(0, (10.0, 10.0, 60.0, 60.0), polygon, None, 2500.0)
    scene_set = SceneSet("one", (Scene(Path("a.png"), 5, (100, 100), (instance,)),), ("cat",))
    found = [Found(0, 0.9, (10.0, 10.0, 60.0, 60.0), np.zeros((100, 100), bool))]
    assert coco_metrics(scene_set, {5: found}, "segm")["AP"] == 0


@pytest.mark.parametrize(
    ("kind", "image_id", "found", "error", "words"),
    [
        ("bbox", 6, Found(0, 0.5, (0, 0, 1, 1)), DataError, "picture 6: not in case"),
        ("bbox", 5, Found(3, 0.5, (0, 0, 1, 1)), DataError, "label 3 found, expected 0 to 2"),
        ("bbox", 5, Found(0, float("nan"), (0, 0, 1, 1)), NumericalError, "not finite"),
        ("bbox", 5, Found(0, 0.5, (0, 0, float("inf"), 1)), NumericalError, "not finite"),
        ("segm", 5, Found(0, 0.5, (0, 0, 1, 1)), DataError, "mask of shape None found, expected (150, 180)"),
        ("segm", 5, Found(0, 0.5, (0, 0, 1, 1), np.ones((3, 4), bool)), DataError, "mask of shape (3, 4)"),
        ("keypoints", 5, Found(0, 0.5, (0, 0, 1, 1)), DataError, "keypoints of shape None found, expected (4, 3)"),
        (
            "keypoints", 5, Found(0, 0.5, (0, 0, 1, 1), None, np.full((4, 3), np.nan, np.float32)), NumericalError,
            "keypoints are not finite",
        ),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_counted(
    kind: Any, image_id: int, found: Found, error: type[Exception], words: str
) -> None:
    scores = CocoScores(SceneSet("case", (Scene(Path("a.png"), 5, SIZE),), CLASSES, CATEGORIES, SCHEME), kind)
    with pytest.raises(error, match=re.escape(words)):
        scores.update(image_id, [found])


def test_a_picture_counts_once() -> None:
    scores = CocoScores(one_box(), "bbox")
    scores.update(5, [])
    with pytest.raises(DataError, match="added twice"):
        scores.update(5, [])


def test_truth_that_the_kind_lacks() -> None:
    with pytest.raises(DataError, match=r"a\.png: an object without mask"):
        coco_metrics(one_box(), {}, "segm")
    with pytest.raises(ConfigError, match="no keypoints"):
        coco_metrics(one_box(), {}, "keypoints")


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faster_coco_eval", None)
    with pytest.raises(MissingDependencyError, match="faster_coco_eval is not installed"):
        coco_metrics(one_box(), {}, "bbox")


# --- class maps ---


def random_maps(seed: int, classes: int = 6, absent: int = 4) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(3):
        truth = rng.integers(0, classes, (17, 23)).astype(np.uint8)
        found = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, classes, truth.shape)).astype(np.uint8)
        truth[truth == absent], found[found == absent] = 0, 0
        truth[rng.random(truth.shape) < 0.1] = IGNORED
        maps.append((truth, found))
    return maps


@pytest.mark.parametrize("seed", range(10))
def test_iou_as_in_scikit_learn_and_torchmetrics(seed: int) -> None:
    maps = random_maps(seed)
    scores = SegmentationScores(6)
    for truth, found in maps:
        scores.update(truth, found)
    result = scores.result()
    truth, found = (np.concatenate([pair[i].ravel() for pair in maps]) for i in (0, 1))
    known = truth != IGNORED
    each = jaccard_score(truth[known], found[known], labels=range(6), average=None, zero_division=0)
    assert result["per_class"][4] is None
    rest = [0, 1, 2, 3, 5]
    np.testing.assert_allclose([result["per_class"][k] for k in rest], each[rest], rtol=1e-12)
    assert result["pixel_accuracy"] == pytest.approx((truth == found)[known].mean())
    recalls = [(found[truth == k] == k).mean() for k in rest]
    assert result["mean_accuracy"] == pytest.approx(np.mean(recalls))
    metric = MulticlassJaccardIndex(6, ignore_index=IGNORED)
    expected = metric(torch.from_numpy(found.astype(np.int64)), torch.from_numpy(truth.astype(np.int64)))
    assert result["miou"] == pytest.approx(expected.item(), abs=1e-6)


def test_iou_by_hand() -> None:
    scores = SegmentationScores(3)
    scores.update(np.uint8([[0, 0, 1, IGNORED]]), np.uint8([[0, 1, IGNORED, 2]]))
    assert scores.result() == {
        "miou": 0.25,  # class 0: 1 of 2 pixels; class 1: none of 2; class 2 only where nothing is known
        "pixel_accuracy": pytest.approx(1 / 3),
        "mean_accuracy": 0.25,
        "per_class": [0.5, 0.0, None],
    }


def test_class_maps_that_cannot_be_counted() -> None:
    assert SegmentationScores(2).result() == {
        "miou": None, "pixel_accuracy": None, "mean_accuracy": None, "per_class": [None, None],
    }  # fmt: skip
    with pytest.raises(DataError, match=r"value 2 in a class map, expected 0 to 1 or 255"):
        SegmentationScores(2).update(np.uint8([[0, 2]]), np.uint8([[0, 0]]))
    with pytest.raises(DataError, match=r"shape \(2, 1\) found, expected \(1, 2\)"):
        SegmentationScores(2).update(np.uint8([[0, 2]]), np.uint8([[0], [0]]))


# --- keypoints ---


def test_pck_by_hand() -> None:
    truth = np.array([[[10, 10, 2], [20, 20, 2], [5, 5, 1]], [[0, 0, 2], [8, 8, 0], [9, 9, 0]]], float)
    found = truth + np.array([[[3, 4, 9], [3.1, 4, 9], [0, 0, 9]], [[0, 2.1, 9], [0, 0, 9], [0, 0, 9]]])
    sizes = np.array([50, 20])  # tolerances of 5 and 2 pixels: right, wrong, hidden; wrong, absent, absent
    assert pck(truth, found, sizes) == {"pck": pytest.approx(1 / 3), "mean": 0.25, "per_keypoint": [0.5, 0.0, None]}
    hidden = pck(truth, found, sizes, hidden=True)
    assert hidden == {"pck": 0.5, "mean": pytest.approx(0.5), "per_keypoint": [0.5, 0.0, 1.0]}
    assert pck(truth, found, sizes, alpha=0.2)["pck"] == 1
    absent = pck(truth * [1, 1, 0], found, sizes)
    assert absent == {"pck": None, "mean": None, "per_keypoint": [None, None, None]}


def test_oks_by_hand() -> None:
    truth = np.array([[[0, 0, 2], [10, 0, 1], [99, 99, 0]], [[1, 1, 0], [1, 1, 0], [1, 1, 0]]], float)
    found = np.array([[[3, 4, 1], [10, 0, 1], [0, 0, 1]], [[1, 1, 1], [1, 1, 1], [1, 1, 1]]], float)
    values = oks(truth, found, np.array([100.0, 100.0]), (0.25, 0.1, 0.1))
    # 25 pixels squared, over twice the area times (2 * 0.25) squared: exp(-0.5); the other one is exact.
    assert values[0] == pytest.approx((np.exp(-0.5) + 1) / 2)
    assert np.isnan(values[1])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_oks_as_in_pycocotools(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([rng.uniform(0, 90, (1, 4, 2)), rng.integers(0, 3, (1, 4, 1))], axis=2)
    truth[0, 0, 2] = 2
    found = truth + rng.normal(0, 4, truth.shape)
    area = rng.uniform(100, 5000)
    evaluation = COCOeval(iouType="keypoints")
    evaluation.params.kpt_oks_sigmas = np.array(SIGMAS)
    evaluation._gts = {(1, 1): [{"keypoints": truth.ravel(), "bbox": [0, 0, 90, 90], "area": area}]}
    evaluation._dts = {(1, 1): [{"keypoints": found.ravel(), "score": 1.0}]}
    expected = evaluation.computeOks(1, 1)[0, 0]
    assert oks(truth, found, np.array([area]), SIGMAS)[0] == pytest.approx(expected, abs=1e-12)
