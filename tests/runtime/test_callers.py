"""One predictor, many callers: threads, forked and spawned processes, in every runtime, each with its own image."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import shutil
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common import smooth
from leanvit import Predictor
from leanvit.errors import BundleError, EnvironmentProblem
from leanvit.imaging import encode_png
from leanvit.runtime.engines import available
from leanvit.runtime.task import TASKS, task_named
from toy_tasks import ToyTasks

pytest_plugins = ("toy_tasks",)

THREADS, CALLS, IMAGES = 16, int(os.environ.get("LEANVIT_CALLS", "400")), 50
"""The environment's LEANVIT_CALLS=10000 is for a long run."""

RUNTIMES = [name for name in available() if name != "openvino-bf16"]
THREADED = available()
"""Every runtime of this machine: bfloat16 rounds coarsely, but the same image always alike."""


def pictures(side: int) -> list[np.ndarray]:
    return [smooth(side, side, seed) for seed in range(IMAGES)]


@pytest.mark.parametrize("runtime", THREADED)
def test_every_thread_gets_the_answer_of_its_own_image(shared_bundle: Path, runtime: Any) -> None:
    predictor = Predictor(shared_bundle, runtime=runtime, threads=1)
    images = pictures(40)
    alone = [dict(predictor.predict(image, top_k=10)) for image in images]
    far = [max(abs(one[label] - other[label]) for label in one) for one, other in itertools.pairwise(alone)]
    assert min(far) > 1e-4, "images so alike that a swap would not show"
    order = np.random.default_rng(0).integers(0, IMAGES, CALLS).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda index: dict(predictor.predict(images[index], top_k=10)), order))
    for index, one in zip(order, found, strict=True):
        assert one == pytest.approx(alone[index], abs=1e-5)


@pytest.mark.parametrize("runtime", THREADED)
def test_every_thread_gets_the_objects_of_its_own_picture(toys: ToyTasks, runtime: Any) -> None:
    predictor = Predictor(toys.bundle("detect", "fp32"), runtime=runtime, threads=1)
    prepared = [predictor.prepare(encode_png(image))[None] for image in pictures(64)]
    alone = [first_outputs(predictor, image) for image in prepared]
    assert all(not np.array_equal(one["scores"], other["scores"]) for one, other in itertools.pairwise(alone))
    order = np.random.default_rng(0).integers(0, IMAGES, CALLS).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda index: first_outputs(predictor, prepared[index]), order))
    for index, one in zip(order, found, strict=True):
        assert one.keys() == alone[index].keys()
        assert all(np.allclose(one[name], alone[index][name], atol=1e-4) for name in one)


def first_outputs(predictor: Predictor, prepared: np.ndarray) -> dict[str, np.ndarray]:
    return dict(predictor.outputs(prepared))


@pytest.mark.parametrize(
    ("runtime", "method"), [("onnxruntime", "fork"), *((runtime, "spawn") for runtime in RUNTIMES)]
)
def test_forked_and_spawned_processes_compute_the_same(
    shared_bundle: Path, runtime: Any, method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # A spawned process may stand in another folder than the one to which the path of the bundle refers.
    monkeypatch.chdir(shared_bundle.parent)
    predictor = Predictor(shared_bundle.name, runtime=runtime, threads=2)
    prepared = np.stack([predictor.prepare(encode_png(image)) for image in pictures(40)[:8]])
    alone = predictor.outputs(prepared)
    monkeypatch.chdir(tmp_path)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, context) as pool:
        for found in [pool.submit(first_outputs, predictor, prepared) for _ in range(2)]:
            np.testing.assert_allclose(found.result(timeout=120)["logits"], alone["logits"], atol=1e-5)
    np.testing.assert_array_equal(predictor.outputs(prepared)["logits"], alone["logits"])


def inherited(predictor: Predictor, prepared: np.ndarray, sent: Any) -> None:
    """What a child does with the predictor that it inherited, not unpickled."""
    try:
        with ThreadPoolExecutor(4) as pool:
            sent.send((os.getpid(), list(pool.map(lambda _: predictor.outputs(prepared)["logits"], range(8)))))
    except EnvironmentProblem as error:
        sent.send((os.getpid(), error))


def in_a_child(predictor: Predictor, prepared: np.ndarray) -> tuple[int, Any]:
    """Process and result of a forked child that uses the predictor it inherited, while this process is using it."""
    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(predictor.outputs, prepared) for _ in range(40)]
        received, sent = context.Pipe(duplex=False)
        child = context.Process(target=inherited, args=(predictor, prepared, sent), daemon=True)
        child.start()
        assert received.poll(60), "the child hangs"
        result = received.recv()
        child.join(10)
        assert len([call.result() for call in calls]) == 40
    assert child.pid != os.getpid()
    return child.pid or 0, result


def test_a_child_that_inherits_a_predictor_in_use_may_use_it(shared_bundle: Path) -> None:
    predictor = Predictor(shared_bundle, threads=2)
    prepared = np.stack([predictor.prepare(encode_png(image)) for image in pictures(40)[:8]])
    alone = predictor.outputs(prepared)["logits"]
    child, (process, found) = in_a_child(predictor, prepared)
    assert process == child
    for one in found:
        np.testing.assert_allclose(one, alone, atol=1e-5)


@pytest.mark.skipif("openvino" not in RUNTIMES, reason="OpenVINO is not installed")
def test_openvino_in_a_forked_child_is_refused_and_does_not_hang(shared_bundle: Path) -> None:
    predictor = Predictor(shared_bundle, runtime="openvino", threads=2)
    prepared = np.stack([predictor.prepare(encode_png(image)) for image in pictures(40)[:8]])
    child, (process, found) = in_a_child(predictor, prepared)
    assert process == child
    assert isinstance(found, EnvironmentProblem)
    assert "onnxruntime" in str(found)


def test_a_pickled_predictor_knows_its_task_and_refuses_another_file(bundle: Path, tmp_path: Path) -> None:
    predictor = Predictor(bundle)
    data = pickle.dumps(predictor)
    assert len(data) < 50_000, "the model's weights do not belong into the pickle"
    again = pickle.loads(data)
    assert again.task is TASKS["classify"] is task_named("classify")
    image = smooth(40, 40, 1)
    assert again.predict(image) == predictor.predict(image)
    changed = pickle.loads(data)
    with open(bundle / "model.onnx", "ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"model\.onnx: gone or another file"):
        changed.predict(image)
    assert predictor.predict(image) == again.predict(image)
    shutil.rmtree(bundle)
    with pytest.raises(BundleError, match="Load the bundle again"):
        pickle.loads(data).predict(image)
