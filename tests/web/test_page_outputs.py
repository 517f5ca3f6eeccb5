"""The page reads outputs as leanvit.runtime does: objects, masks, maps, keypoints, labels, and the golden file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from leanvit.annotations.masks import decode_mask, encode_mask
from leanvit.config import Preprocess, to_dict
from leanvit.runtime.bundle import Manifest, sqnr_db, write_manifest
from leanvit.runtime.draw import colour
from leanvit.runtime.golden_objects import golden_records, matched_share
from leanvit.runtime.inputs import Inputs, Options, Place, letterboxed
from leanvit.runtime.task import TASKS, compare_values, kept_values
from leanvit.web.site import TASKS as TASKS_OF_THE_PAGE
from node_run import Node

SIZE = (64, 48)
PICTURE = (90, 121)
LABELS = tuple(f"class {i}" for i in range(6))

ANSWER = """
import { TASKS } from "./tasks.js";
import { place } from "./prepare.js";
const { task, manifest, options, names, inputs } = given.values;
const rows = [Object.fromEntries(names.map((name) => [name, array(name)]))];
const where = inputs ?? [{ place: place(given.values.size, manifest.preprocess.input_size) }];
const found = TASKS[task].answer(rows, where, manifest, options, given.values.size);
if (found.map) save("map", found.map.data);
tell(found);
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Node:
    return Node(tmp_path_factory.mktemp("modules"))


def manifest(task: str, labels: tuple[str, ...] = LABELS, **answers: Any) -> Manifest:
    form = Preprocess(SIZE, interpolation="bilinear", crop_mode="letterbox")
    return Manifest("net", "fp32", labels, form, 35.0, task=task, answers=answers)


def page_answer(node: Node, of: Manifest, outputs: dict[str, Any], options: Any = None, inputs: Any = None) -> Any:
    """What the page finds; outputs are those of one picture, with a first dimension of 1."""
    values = {
        "task": of.task, "manifest": to_dict(of), "names": list(outputs), "size": PICTURE, "inputs": inputs,
        "options": {"topK": 5, "scoreThreshold": 0.5, **(options or {})},
    }  # fmt: skip
    return node.run(ANSWER, values, **{name: value[0] for name, value in outputs.items()})


def expected_line(of: Manifest, outputs: dict[str, Any], options: Options | None = None) -> tuple[Any, Any]:
    pixels = np.zeros((*PICTURE, 3), np.uint8)
    options = options or Options()
    task = TASKS[of.task]
    inputs = letterboxed(pixels, of.preprocess, options)
    found = task.decode(outputs, inputs, of, options)
    return found, task.line(found, of)


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def test_every_task_of_a_bundle_has_its_row_in_the_page(node: Node) -> None:
    rows = node.run('import { TASKS } from "./tasks.js"; tell(TASKS);')
    # Other tests of this process may have registered tasks of their own.
    ours = {name for name, task in TASKS.items() if task.decode.__module__.startswith("leanvit.")}
    assert set(rows) == set(TASKS_OF_THE_PAGE) == ours
    for name, row in rows.items():
        task = TASKS[name]
        assert (row["continuous"], row["eachPicture"]) == (task.continuous, task.each_picture)
        assert row["all"] == (task.values_kept is None)


def near(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    values = [[one["probability"] for one in some] for some in (found, expected)]
    np.testing.assert_allclose(*values, atol=1.1e-6)


@pytest.mark.parametrize("top_k", [1, 4, 50])
def test_labels_of_a_classifier(node: Node, top_k: int) -> None:
    outputs = {"logits": numbers(1, 6)}
    _, line = expected_line(manifest("classify"), outputs, Options(top_k=top_k))
    found = page_answer(node, manifest("classify"), outputs, {"topK": top_k})
    near(found["predictions"], line["predictions"])


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.97])
def test_labels_that_count_each_for_itself(node: Node, threshold: float) -> None:
    outputs = {"logits": numbers(1, 6, seed=1)}
    _, line = expected_line(manifest("multilabel"), outputs, Options(score_threshold=threshold))
    found = page_answer(node, manifest("multilabel"), outputs, {"scoreThreshold": threshold})
    near(found["predictions"], line["predictions"])


def thresholds_at(outputs: dict[str, np.ndarray], shift: float) -> list[float]:
    """Thresholds below the probabilities, every second one by `shift` from its own."""
    probabilities = 1 / (1 + np.exp(-outputs["logits"][0].astype(np.float64)))
    return [float(p + (shift if i % 2 else -0.01)) for i, p in enumerate(probabilities)]


@pytest.mark.parametrize("asked", [None, 0.2])
@pytest.mark.parametrize("shift", [-0.01, 0.01])
def test_several_labels_are_called_at_the_bundle_s_own_thresholds(
    node: Node, asked: float | None, shift: float
) -> None:
    outputs = {"logits": numbers(1, 6, seed=2)}
    own = thresholds_at(outputs, shift)
    expected = expected_line(manifest("multilabel", thresholds=own), outputs, Options(score_threshold=asked))[1]
    found = page_answer(node, manifest("multilabel", thresholds=own), outputs, {"scoreThreshold": asked})
    near(found["predictions"], expected["predictions"])
    if asked is None:
        called = {0, 2, 4} | ({1, 3, 5} if shift < 0 else set())
        assert {one["label"] for one in found["predictions"]} == {LABELS[i] for i in called}


@pytest.mark.parametrize("task", ["multilabel", "binary", "detect"])
def test_without_a_score_the_one_of_predict_counts(node: Node, task: str) -> None:
    outputs = detections(masks=False) if task == "detect" else {"logits": numbers(1, 6, seed=1)}
    if task == "binary":
        outputs = {"logits": np.full((1, 1), -0.1, np.float32)}
    of = manifest(task, LABELS[:2] if task == "binary" else LABELS)
    found = page_answer(node, of, outputs, {"scoreThreshold": None})
    _, line = expected_line(of, outputs)
    key = "objects" if task == "detect" else "predictions"
    assert [one["label"] for one in found[key]] == [one["label"] for one in line[key]]
    assert found[key]


OPTIONS = """
globalThis.document = {
  createElement: (tag) => ({ tag, attributes: {}, append() {}, addEventListener() {},
    setAttribute(name, value) { this.attributes[name] = value; this[name] = String(value); } }),
};
const { optionInputs } = await import("./options.js");
const { queryOf } = await import("./client.js");
const info = { options: ["score_threshold"], drawn: [] };
tell(given.values.map((task) => queryOf(optionInputs(["scoreThreshold"], task, () => {}).values(), info)));
"""


def test_the_page_asks_for_no_score_where_a_bundle_may_have_its_own(node: Node) -> None:
    assert node.run(OPTIONS, ["multilabel", "detect"]) == ["", "score_threshold=0.5"]


@pytest.mark.parametrize("logit", [-800.0, -0.3, 0.0, 0.3, 800.0])
def test_one_logit_between_two_labels(node: Node, logit: float) -> None:
    two, outputs = manifest("binary", LABELS[:2]), {"logits": np.full((1, 1), logit, np.float32)}
    near(page_answer(node, two, outputs)["predictions"], expected_line(two, outputs)[1]["predictions"])


@pytest.mark.parametrize("normalize", [False, True])
def test_embeddings(node: Node, normalize: bool) -> None:
    of, outputs = manifest("embed", normalize=normalize), {"embeddings": numbers(1, 33)}
    found = page_answer(node, of, outputs)["embedding"]
    np.testing.assert_allclose(found, expected_line(of, outputs)[0], rtol=2e-7)


def detections(masks: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    corners = rng.uniform(-10, 60, (1, 14, 2, 2)).astype(np.float32)
    boxes = np.sort(corners, axis=2).reshape(1, 14, 4)
    boxes[0, 3] = boxes[0, 4] - 500  # outside of the picture
    scores = np.sort(rng.uniform(0, 1, (1, 14)).astype(np.float32))[:, ::-1].copy()
    scores[0, 10:] = 0
    found = {"boxes": boxes, "scores": scores, "labels": rng.integers(0, 6, (1, 14))}
    return found | ({"masks": rng.uniform(0, 1, (1, 14, 28, 28)).astype(np.float32)} if masks else {})


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_objects_and_their_masks(node: Node, threshold: float) -> None:
    of, outputs = manifest("segment"), detections(masks=True)
    found = page_answer(node, of, outputs, {"scoreThreshold": threshold})["objects"]
    expected, line = expected_line(of, outputs, Options(score_threshold=threshold))
    assert len(found) == len(expected) > 2
    for one, value, told in zip(found, expected, line["objects"], strict=True):
        assert (one["label"], one["score"]) == (told["label"], pytest.approx(told["score"], abs=1.1e-5))
        assert one["box"] == pytest.approx(told["box"], abs=0.011)
        mask = decode_mask(one["segmentation"], PICTURE)
        assert (mask != value.mask).mean() < 1e-4  # a value at the threshold, summed up in another order


def test_a_detector_has_no_masks(node: Node) -> None:
    found = page_answer(node, manifest("detect"), detections(masks=False))["objects"]
    assert {tuple(one) for one in found} == {("label", "score", "box")}


def test_class_maps(node: Node) -> None:
    of, outputs = manifest("semantic"), {"logits": numbers(1, 6, 16, 12)}
    found = page_answer(node, of, outputs)
    expected, line = expected_line(of, outputs)
    assert found["map"]["size"] == list(PICTURE)
    assert (node.saved("map").reshape(PICTURE) != expected).mean() < 1e-3
    assert list(found["shares"]) == list(line["shares"])
    assert list(found["shares"].values()) == pytest.approx(list(line["shares"].values()), abs=2e-3)


def test_keypoints(node: Node) -> None:
    of = manifest("pose")
    box, region = (3.0, 4.0, 60.0, 80.0), (-5.5, 0.25, 70.0, 90.0)
    outputs = {"heatmaps": numbers(1, 5, 16, 12)}
    outputs["heatmaps"][0, 0, 0, 11] = outputs["heatmaps"][0, 1, 7, 0] = 50  # at the border
    given = [{"place": {"region": region, "box": box}}]
    inputs = Inputs(np.zeros((1, *SIZE, 3), np.uint8), (Place(region=region, box=box),), PICTURE)
    expected = TASKS["pose"].line(TASKS["pose"].decode(outputs, inputs, of, Options()), of)["objects"][0]
    (found,) = page_answer(node, of, outputs, inputs=given)["objects"]
    np.testing.assert_allclose(found["keypoints"], expected["keypoints"], atol=1.1e-3)
    assert (found["box"], found["score"]) == (expected["box"], pytest.approx(expected["score"], abs=1.1e-5))


# --- golden.npz and bundle.json ---


def test_the_golden_file_is_read(node: Node, tmp_path: Path) -> None:
    arrays = {
        "image_0": np.frombuffer(b"\x89PNG", np.uint8), "logits": numbers(3, 4), "wide": numbers(2, 2).astype(float),
        "found_labels": np.array([[-1, 2**40]]), "labels": np.array(["ä", "two words", ""]), "one": np.array("{}"),
    }  # fmt: skip
    np.savez(node.folder / "golden.npz", **arrays)
    told = node.run(
        """
        import { readNpz } from "./npz.js";
        const bytes = fs.readFileSync("golden.npz");
        const found = readNpz(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
        tell(Object.fromEntries(Object.entries(found).map(([k, v]) => [k, [v.shape, Array.from(v.data)]])));
        """
    )
    assert set(told) == set(arrays)
    for name, value in arrays.items():
        assert told[name] == [list(value.shape), np.ravel(value).tolist()]


@pytest.mark.parametrize("task", ["classify", "semantic"])
def test_the_ratio_of_golden_values(node: Node, task: str) -> None:
    name = TASKS[task].outputs[0]
    outputs = {name: numbers(5, 9, 30, 40)}
    expected = kept_values(TASKS[task], outputs)
    found = expected + numbers(*expected.shape, seed=2, scale=0.01)
    code = """
    import { compare, keptValues, sqnr } from "./golden.js";
    import { row } from "./outputs.js";
    const rows = (name) => Array.from({ length: 5 }, (_, i) => row(array(name), i).data);
    const { all, each } = given.values;
    const kept = rows("raw").map((values) => keptValues(values, all));
    tell({ same: compare(rows("expected"), kept, each), near: compare(rows("expected"), rows("found"), each),
           nan: sqnr([1, 2], [NaN, 2]), zero: sqnr([0, 0], [1, 0]), short: sqnr([1, 2], [1]) });
    """
    row = TASKS[task]
    values = {"all": row.values_kept is None, "each": row.each_picture}
    told = node.run(code, values, raw=outputs[name], expected=expected, found=found)
    assert told["same"] == 200
    assert told["near"] == pytest.approx(compare_values(row, expected, found), abs=1e-6)
    truth, broken = np.array([1.0, 2]), np.array([np.nan, 2])
    assert (told["nan"], told["zero"]) == (sqnr_db(truth, broken), sqnr_db(np.zeros(2), truth)) == (-200, -200)
    assert told["short"] == -200


@pytest.mark.parametrize("damage", ["none", "labels", "scores", "boxes", "masks"])
def test_objects_of_golden_pictures_are_looked_for_again(node: Node, damage: str) -> None:
    outputs = detections(masks=True)
    records = golden_records(outputs)
    changed = {name: value.copy() for name, value in outputs.items()}
    if damage != "none":
        kept = changed[damage][:, :5]
        changed[damage][:, :5] = {"labels": kept + 1, "scores": kept * 0.4, "boxes": kept + 9, "masks": 1 - kept}[
            damage
        ]
    code = """
    import { matched } from "./golden.js";
    const names = ["boxes", "scores", "labels", "masks"];
    const records = Object.fromEntries(names.map((name) => [`found_${name}`, array(`found_${name}`)]));
    tell(matched([Object.fromEntries(names.map((name) => [name, array(name)]))], records));
    """
    told = node.run(code, **{name: value[0] for name, value in changed.items()}, **records)
    expected = matched_share(changed, records, 1)
    assert told["found"] / told["all"] == pytest.approx(expected)
    assert (expected == 1) == (damage == "none")


def test_a_changed_manifest_is_seen(node: Node, tmp_path: Path) -> None:
    write_manifest(node.folder, manifest("classify", ("ä", "b")))
    raw = (node.folder / "bundle.json").read_bytes()
    (node.folder / "changed.json").write_bytes(raw.replace(b"35.0", b"34.0"))
    (node.folder / "unsigned.json").write_text(json.dumps({"a": 1}), encoding="utf-8")
    code = """
    import { hasOwnDigest } from "./golden.js";
    const files = ["bundle.json", "changed.json", "unsigned.json"];
    tell(await Promise.all(files.map((file) => hasOwnDigest(fs.readFileSync(file)))));
    """
    assert node.run(code) == [True, False, False]


# --- drawing ---


def test_colours_are_those_of_drawn_pictures(node: Node) -> None:
    told = node.run('import { colour } from "./draw.js"; tell(Array.from({ length: 300 }, (_, i) => colour(i)));')
    apart = np.abs(np.array(told) - np.array([colour(label) for label in range(300)]))
    assert apart.max() <= 1  # halves are rounded in two ways


@pytest.mark.parametrize("compressed", [True, False])
def test_run_lengths_are_drawn_where_the_mask_is(node: Node, compressed: bool) -> None:
    mask = np.random.default_rng(0).uniform(size=(37, 23)) > 0.6
    mask[:, 4:6], mask[:, 9] = True, False
    runs = encode_mask(mask)
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat, prepend=False)).tolist()
    counts = np.diff([0, *edges, flat.size]).tolist()
    code = """
    import { maskOn } from "./draw.js";
    save("mask", maskOn(given.values, 1, 23, 37));
    save("half", maskOn(given.values, 0.5, 12, 19));
    tell(1);
    """
    node.run(code, runs if compressed else {**runs, "counts": counts})
    assert np.array_equal(node.saved("mask").reshape(mask.shape), mask)
    half = np.zeros((38, 24), bool)
    half[:37, :23] = mask
    assert np.array_equal(node.saved("half").reshape(19, 12), half.reshape(19, 2, 12, 2).any(axis=(1, 3)))


def test_boxes_that_a_user_types(node: Node) -> None:
    texts = ["", " ", "1 2 3 4", "-1.5,2;30, 1e2\n5, 5, 6, 9", "1.5 2 30 -4", "1 2 3", "1 2 3 four", "1 2 3 4 5"]
    code = """
    import { readBoxes } from "./options.js";
    const tried = (text) => { try { return readBoxes(text); } catch (error) { return error.message.slice(0, 9); } };
    tell(given.values.map(tried));
    """
    told = node.run(code, texts)
    assert told[:4] == [None, None, [[1, 2, 3, 4]], [[-1.5, 2, 30, 100], [5, 5, 6, 9]]]
    assert told[4:] == ["boxes are"] * 4
