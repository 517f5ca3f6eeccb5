"""leanvit.optimize: one call from a network and a folder of pictures to the best proven file; killed, it goes on."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import leanvit
from common import Outcome, save_image, smooth
from leanvit.checkpoint import save_checkpoint
from leanvit.config import OptimizeOptions
from leanvit.errors import VerificationError
from leanvit.files import read_json
from leanvit.optimize import api, attempt
from leanvit.quant.costs import site_key
from leanvit.quant.graph import trace
from leanvit.runtime.bundle import MODEL_NAME, read_manifest
from leanvit.runtime.predictor import Predictor
from small_vit import clock, pictures, small_info, small_vit

pytest_plugins = ("toy_tasks",)

FAST = clock(fp32=10.0, w8a8=5.0, w4a8=5.0, w4a16=9.0, mixed=5.0)
MAX_DROP = 10.0
"""Of 12 validation images none may be another than the float network says: one is 8.3 points."""


def run(data: Path, output: Path, timer: Any = FAST, **changes: Any) -> dict[str, Any]:
    # By throughput, no single products are timed.
    options = OptimizeOptions(**{"max_drop": MAX_DROP, "by": "throughput", **changes})
    return api.run(small_vit(), str(data), output, options, info=small_info(), timer=timer)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures without labels: 48 to calibrate on, 12 to measure on."""
    return pictures(tmp_path_factory.mktemp("data") / "photos", 60)


@pytest.fixture(scope="module")
def shared_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run; shared, so nobody may change it."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    options = OptimizeOptions(max_drop=MAX_DROP, by="throughput")
    assert leanvit.optimize(small_vit(), data, output, options, info=small_info(), timer=FAST) == output / "bundle"
    return output


@pytest.fixture
def finished(shared_run: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(shared_run, tmp_path / "run"))


def forget(output: Path, kind: str, key: str = "") -> None:
    """Take lines out of the journal of a run, as if it had been killed before them."""
    path = output / "journal.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [line for line in lines if line["kind"] != kind or key not in ("", line["key"])]
    assert len(kept) < len(lines)
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def test_one_call_leaves_a_proven_file_that_agrees_with_the_network(shared_run: Path, data: Path) -> None:
    manifest = read_manifest(shared_run / "bundle")
    assert manifest.profile == "w8a8"
    assert read_json(shared_run / "bundle" / "verify.json")["passed"]
    files = [Predictor(shared_run / name) for name in ("bundle", "candidates/float")]
    said = [[file.predict(path, top_k=1)[0][0] for path in sorted(data.glob("*.png"))] for file in files]
    agreement = 100 * np.mean([a == b for a, b in zip(*said, strict=True)])
    assert agreement >= 100 - MAX_DROP  # of all pictures, those of the calibration included


def test_the_result_says_what_was_tried_and_what_was_held(shared_run: Path) -> None:
    result = read_json(shared_run / "optimize.json")
    assert (result["best"], result["speed"], result["metric"]) == ("w8a8", 2.0, "agreement")
    assert (result["images"], result["calibration_images"], result["labelled"]) == (12, 48, False)
    assert result["one_image"] == pytest.approx(100 / 12)
    rows = {row["name"]: row for row in result["files"]}
    assert set(rows) == {"float", "w8a8", "w8a8-merged", "w8a8-best"}
    assert rows["w8a8-best"]["state"] == "not tried"
    assert rows["w8a8-merged"]["why"] == "1 blocks are too few to gain from merged tokens"
    assert rows["float"]["near"] == {"agreement": 100.0, "kl": 0.0}
    assert 0 < rows["w8a8"]["near"]["kl"] < 0.01
    # One block of 32 channels on 17 tokens, by hand: what multiplies two activations is in float.
    attention = 2 * 17 * 17 * 32
    linears = 16 * 192 * 32 + 17 * (32 * 96 + 32 * 32 + 2 * 32 * 128) + 3 * 32
    explained = rows["w8a8"]["explain"]
    assert (explained["integer_macs"], explained["macs"]) == (linears, linears + attention)


def test_the_page_shows_every_file_and_why(shared_run: Path) -> None:
    page = (shared_run / "report.html").read_text()
    for words in ("pareto-time", "pareto-size", "w8a8-best", "multiply-adds run on integer kernels", "blocks.0.attn.qk",
                  "What to try next", "agreement"):  # fmt: skip
        assert words in page


def test_a_finished_run_given_again_makes_nothing_anew(finished: Path, data: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(api, "attempt", lambda *arguments: pytest.fail("a file was made again"))
    before = read_json(finished / "optimize.json")
    after = run(data, finished, timer=lambda *arguments: pytest.fail("files were timed again"))
    assert [row["sha256"] for row in after["files"] if row["state"] == "made"] == [
        row["sha256"] for row in before["files"] if row["state"] == "made"
    ]
    assert after["best"] == before["best"]


def test_a_run_killed_at_half_goes_on_to_the_same_result(
    shared_run: Path, data: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    real, made = api.attempt, list[str]()

    def killed(shop: Any, setting: Any, rows: Any) -> Any:
        made.append(setting.name)
        if setting.name == "w8a8":
            raise KeyboardInterrupt
        return real(shop, setting, rows)

    monkeypatch.setattr(api, "attempt", killed)
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "run")
    assert not (tmp_path / "run" / "bundle").exists()

    def counted(shop: Any, setting: Any, rows: Any) -> Any:
        made.append(setting.name)
        return real(shop, setting, rows)

    monkeypatch.setattr(api, "attempt", counted)
    run(data, tmp_path / "run")
    assert made == ["float", "w8a8", "w8a8"]
    files = [folder / "bundle" / MODEL_NAME for folder in (shared_run, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def stopped_at(monkeypatch: pytest.MonkeyPatch, data: Path, output: Path) -> list[str]:
    """The first file that a run would make, which is not made."""
    asked: list[str] = []

    def stop(shop: Any, setting: Any, rows: Any) -> Any:
        asked.append(setting.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "attempt", stop)
    with pytest.raises(KeyboardInterrupt):
        run(data, output)
    return asked


def test_a_damaged_file_is_made_again(finished: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finished / "candidates" / "w8a8" / MODEL_NAME).write_bytes(b"")
    assert stopped_at(monkeypatch, data, finished) == ["w8a8"]


def test_another_picture_starts_anew(finished: Path, data: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    changed = Path(shutil.copytree(data, tmp_path / "changed"))
    save_image(changed / "7.png", smooth(32, 32, seed=999))
    assert stopped_at(monkeypatch, changed, finished) == ["float"]
    assert "starts anew" in capsys.readouterr().err
    assert not (finished / "candidates").exists()


def test_where_nothing_is_faster_the_float_file_is_left(finished: Path, data: Path) -> None:
    forget(finished, "times")
    result = run(data, finished, timer=clock(fp32=10.0, w8a8=20.0))
    assert (result["best"], read_manifest(finished / "bundle").profile) == ("float", "fp32")
    row = next(row for row in result["files"] if row["name"] == "w8a8")
    assert row["lost"] == "slower than float: 2.00 times its time"


def test_products_that_are_slower_in_8_bits_stay_in_float(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(network: Any, example: Any, **options: Any) -> dict[str, Any]:
        keys = {name: site_key(site) for name, site in trace(network, example).sites.items()}
        slow = {keys[name] for name in ("blocks.0.attn.proj", "head")}
        return {"sites": {k: {"float_ms": 1.0, "int8_ms": 2.0 if k in slow else 0.5} for k in keys.values()}}

    monkeypatch.setattr(attempt, "measure_table", table)
    result = run(data, tmp_path / "run", by="latency")
    again = run(data, tmp_path / "run", by="latency", timer=lambda *arguments: pytest.fail("files were timed again"))
    assert again["files"] == result["files"]
    rows = {row["name"]: row for row in result["files"]}
    assert rows["w8a8"]["slower_sites"] == ["blocks.0.attn.proj", "head"]
    plans = {name: read_manifest(tmp_path / "run" / "candidates" / name).plan for name in ("w8a8", "w8a8-where-faster")}
    assert set(plans["w8a8"]) - set(plans["w8a8-where-faster"]) == {"blocks.0.attn.proj", "head"}
    priced = {entry["site"]: entry["lifting_ms"] for entry in rows["w8a8"]["explain"]["costs"]}
    assert (priced["blocks.0.attn.proj"], priced["blocks.0.mlp.fc1"]) == (-1.0, 0.5)


def test_what_has_no_time_left_is_named(finished: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget(finished, "file", "w8a8")
    result = run(data, finished, minutes=0.001)
    assert result["best"] == "float"
    assert "w8a8 (8 bits, MPTQ-ViT) is left out" in capsys.readouterr().err
    assert any("--minutes: w8a8" in sentence for sentence in result["next"])


def test_a_folder_that_is_no_bundle_is_not_overwritten_and_no_work_done_before_that_is_said(
    data: Path, tmp_path: Path
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "thesis.txt").write_text("mine")
    with pytest.raises(VerificationError, match="not overwritten"):
        run(data, tmp_path)
    assert (tmp_path / "bundle" / "thesis.txt").read_text() == "mine"
    assert not (tmp_path / "journal.jsonl").exists()


def test_the_verb_prints_what_was_tried_and_what_to_do_with_it(
    data: Path, tmp_path: Path, leanvit: Callable[..., Outcome]
) -> None:
    save_checkpoint(tmp_path / "model.safetensors", small_vit(), small_info())
    done = leanvit(
        "optimize", tmp_path / "model.safetensors", "--data", data, "--output", tmp_path / "run", "--max-drop", MAX_DROP
    )
    assert done.code == 0, done.err
    result = read_json(tmp_path / "run" / "optimize.json")
    times = {row["name"]: min(row["milliseconds"].values()) for row in result["files"] if row["milliseconds"]}
    assert times[result["best"]] <= times["float"]
    assert "w8a8" in done.out
    assert f"next: leanvit predict {tmp_path / 'run' / 'bundle'} IMAGE" in done.out
    assert leanvit("predict", tmp_path / "run" / "bundle", next(data.glob("*.png"))).code == 0
    assert leanvit("report", tmp_path / "run").code == 0


# --- slow ---


@pytest.mark.slow
def test_smallest_is_not_larger_than_any_that_holds(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path / "run", by="size")
    rows = {row["name"]: row for row in result["files"]}
    assert {"w8a8", "w4a8", "w4a16"} <= set(rows)
    holding = [row for row in rows.values() if row["state"] == "made" and row["drop"] <= MAX_DROP]
    assert rows[result["best"]]["bytes"] == min(row["bytes"] for row in holding)


@pytest.mark.slow
def test_a_killed_process_goes_on(shared_run: Path, data: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from leanvit.config import OptimizeOptions\n"
        "from leanvit.optimize import api\n"
        "from small_vit import clock, small_info, small_vit\n"
        f"options = OptimizeOptions(max_drop={MAX_DROP}, by='throughput')\n"
        "timer = clock(fp32=10.0, w8a8=5.0)\n"
        "api.run(small_vit(), sys.argv[2], sys.argv[3], options, info=small_info(), timer=timer)\n"
    )
    helpers = str(Path(__file__).parents[1] / "helpers")
    process = subprocess.Popen([sys.executable, "-c", code, helpers, str(data), str(tmp_path / "run")])
    journal = tmp_path / "run" / "journal.jsonl"
    # At half: the float file is made, the 8-bit one is on its way.
    while process.poll() is None and not (journal.is_file() and '"float"' in journal.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    subprocess.run([sys.executable, "-c", code, helpers, str(data), str(tmp_path / "run")], check=True)
    files = [folder / "bundle" / MODEL_NAME for folder in (shared_run, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    plans = [read_manifest(folder / "bundle").plan for folder in (shared_run, tmp_path / "run")]
    assert plans[0] == plans[1]
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line.get("key") for line in lines if line.get("kind") == "file"] == ["float", "w8a8"]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["detect", "semantic"])
def test_a_network_of_another_task(task: str, toys: Any, tmp_path: Path) -> None:
    network, info = toys.load(task, "fp32")
    options = OptimizeOptions(max_drop=100.0, calibration_images=32)
    timer = clock(fp32=10.0, w8a8=5.0)
    result = api.run(network, str(toys.scenes), tmp_path / "run", options, info=info, timer=timer)
    assert result["task"] == task
    assert result["best"] == "w8a8"
    predictor = Predictor(tmp_path / "run" / "bundle")
    picture = np.asarray(Image.open(next((toys.scenes / "images" / "val").glob("*"))).convert("RGB"))
    predictor.predict(picture)
    explained = next(row for row in result["files"] if row["name"] == "w8a8")["explain"]
    assert explained["integer_macs"] > 0
    assert explained["integer_macs"] + sum(entry["macs"] for entry in explained["float"]) == explained["macs"]
    assert explained["costs"]
